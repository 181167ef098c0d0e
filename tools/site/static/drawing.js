// Small charts in SVG, in pixels of the page, so that letters keep their size on a narrow screen.

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  made.append(...children)
  return made
}

function canvas(width, height, label) {
  return resized(svg('svg', { role: 'group', 'aria-label': label }), width, height)
}

function resized(root, width, height) {
  for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) {
    root.setAttribute(key, value)
  }
  return root
}

function text(x, y, words, attributes = {}) {
  return svg('text', { x, y, 'font-size': 12, 'text-anchor': 'middle', ...attributes }, words)
}

// Rectangles side by side, or below each other on a narrow screen; `shares` are their parts of the width.
function layout(width, height, shares) {
  const whole = shares.reduce((sum, share) => sum + share)
  if (width < 520) return shares.map((_, i) => ({ left: 0, top: i * height, width, height }))
  let left = 0
  return shares.map((share) => {
    const box = { left, top: 0, width: (width * share) / whole, height }
    left += box.width
    return box
  })
}

const bottom = (boxes) => Math.max(...boxes.map((box) => box.top + box.height))

// Axes in a rectangle; `x` and `y` give the pixel of a value, `valueX` and `valueY` the value at a pixel.
class Axes {
  constructor(parent, box, { xlim, ylim, log = false, margin = [28, 16, 40, 44] }) {
    const [top, right, below, left] = margin
    this.group = svg('g')
    parent.append(this.group)
    this.left = box.left + left
    this.right = box.left + box.width - right
    this.top = box.top + top
    this.bottom = box.top + box.height - below
    const scale = log ? Math.log10 : Number
    const [x0, x1] = xlim.map(scale)
    const perX = (this.right - this.left) / (x1 - x0)
    const perY = (this.bottom - this.top) / (ylim[1] - ylim[0])
    this.x = (value) => this.left + (scale(value) - x0) * perX
    this.y = (value) => this.bottom - (value - ylim[0]) * perY
    this.valueX = (pixel) => x0 + (pixel - this.left) / perX
    this.valueY = (pixel) => ylim[0] + (this.bottom - pixel) / perY
  }

  add(name, attributes, ...children) {
    const made = svg(name, attributes, ...children)
    this.group.append(made)
    return made
  }

  frame({ title = '', xlabel = '', ylabel = '', xticks = [], yticks = [], ...names }) {
    const { xnames = xticks, ynames = yticks } = names
    const { left, right, top, bottom } = this
    const line = { fill: 'none', stroke: '#000', 'stroke-width': 0.8 }
    this.add('path', { d: `M${left} ${top}V${bottom}H${right}`, ...line })
    xticks.forEach((tick, i) => {
      this.add('path', { d: `M${this.x(tick)} ${bottom}v4`, ...line })
      this.group.append(text(this.x(tick), bottom + 16, xnames[i]))
    })
    yticks.forEach((tick, i) => {
      this.add('path', { d: `M${left} ${this.y(tick)}h-4`, ...line })
      this.group.append(text(left - 7, this.y(tick) + 4, ynames[i], { 'text-anchor': 'end' }))
    })
    const [middle, height] = [(left + right) / 2, (top + bottom) / 2]
    this.group.append(text(middle, top - 10, title, { 'font-size': 13 }), text(middle, bottom + 33, xlabel))
    this.group.append(text(0, 0, ylabel, { transform: `translate(${left - 34} ${height}) rotate(-90)` }))
  }

  rect(x0, y0, x1, y1, fill, attributes = {}) {
    const [a, b] = [this.x(x0), this.x(x1)].sort((p, q) => p - q)
    const [c, d] = [this.y(y0), this.y(y1)].sort((p, q) => p - q)
    return this.add('rect', { x: a, y: c, width: b - a, height: d - c, fill, ...attributes })
  }

  line(xs, ys, stroke, attributes = {}) {
    const points = xs.map((x, i) => `${this.x(x)},${this.y(ys[i])}`).join(' ')
    return this.add('polyline', { points, fill: 'none', stroke, 'stroke-width': 1.5, ...attributes })
  }
}

// Round numbers from 0 to `most`, at most seven.
function ticks(most) {
  const power = 10 ** Math.floor(Math.log10(most / 6))
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => most / size <= 6)
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step)
}

// A legend in a row of colored squares that wraps; returns how high it is.
function legend(parent, left, top, width, names, colors) {
  let [x, y] = [left, top]
  names.forEach((name, i) => {
    const wide = 34 + 6.6 * name.length
    if (x > left && x + wide > left + width) [x, y] = [left, y + 18]
    parent.append(svg('rect', { x, y, width: 12, height: 12, fill: colors[i] }))
    parent.append(text(x + 17, y + 10.5, name, { 'text-anchor': 'start' }))
    x += wide
  })
  return y + 18 - top
}

// A mark that the pointer and arrow keys move: `now` is the value, the least and the most, which screen readers
// say as `words`; `moveTo(x, y)` gets pixels of the drawing, `step(dx, dy)` the direction of a key. The view
// captures the pointer, since each move draws the marks anew.
function draggable(mark, label, [value, least, most], words, { moveTo, step }) {
  const role = { role: 'slider', tabindex: 0, 'aria-label': label, 'aria-valuetext': words }
  const now = { 'aria-valuenow': value, 'aria-valuemin': least, 'aria-valuemax': most }
  for (const [key, word] of Object.entries({ ...role, ...now })) mark.setAttribute(key, word)
  mark.style.cursor = 'grab'
  mark.addEventListener('touchstart', (event) => event.preventDefault()) // the page does not scroll
  mark.addEventListener('pointerdown', (down) => {
    const view = mark.ownerSVGElement.parentElement
    view.setPointerCapture(down.pointerId)
    view.onpointermove = (event) => {
      const box = view.getBoundingClientRect()
      moveTo(event.clientX - box.left, event.clientY - box.top)
    }
    view.onpointerup = view.onpointercancel = () => (view.onpointermove = null)
    down.preventDefault()
    mark.focus()
  })
  mark.addEventListener('keydown', (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key]
    if (!way) return
    event.preventDefault()
    step(...way)
  })
  return mark
}
