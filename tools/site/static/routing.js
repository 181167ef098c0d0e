// Explorers that the page calculates with the formulas of the lessons, those about routing. Each has its
// `numbers`, from the controls' values and the lesson's data, a `sentence` with the main ones, and a drawing.

const computed = {}
const million = (n, digits = 2) => (n / 1e6).toFixed(digits)
const percent = (share) => `${Math.round(100 * share)}%`
const range = (n) => [...Array(n).keys()]
const sum = (numbers) => numbers.reduce((total, n) => total + n, 0)
const isLight = (color) => color === '#F0E442'
const bounded = (x, low, high) => Math.min(Math.max(x, low), high)

function softmax(logits) {
  const raw = logits.map((logit) => Math.exp(logit - Math.max(...logits)))
  return raw.map((x) => x / sum(raw))
}

// Experts by falling logit, the first of equal ones first.
function best(logits, k) {
  return range(logits.length).sort((a, b) => logits[b] - logits[a] || a - b).slice(0, k)
}

// topk_route for one token.
function route(logits, k) {
  const probs = softmax(logits)
  const ids = best(logits, k)
  return { probs, ids, gates: ids.map((e) => probs[e]), normalized: softmax(ids.map((e) => logits[e])) }
}

// 01 router: one token, eight experts; its logits can be dragged.
computed['01_router/explorer'] = {
  numbers({ top_k, temperature }, data, state) {
    const logits = (state.logits ??= [...data.logits])
    return { logits: [...logits], ...route(logits.map((logit) => logit / temperature), top_k) }
  },
  sentence({ ids, gates }) {
    return `Experts ${ids.join(', ')}. Their gates sum to ${sum(gates).toFixed(2)}, normalized to 1.`
  },
  draw(width, { palette, state, again }, { logits, probs, ids, gates, normalized }) {
    const boxes = layout(width, 250, [1, 1, 1])
    const root = canvas(width, bottom(boxes), 'logits, probabilities and gates')
    const ticks = { xlabel: 'expert', xticks: range(8) }
    const left = new Axes(root, boxes[0], { xlim: [-0.6, 7.6], ylim: [-3, 3] })
    left.frame({ title: 'logits: drag them', yticks: [-2, 0, 2], ...ticks })
    logits.forEach((logit, e) => {
      left.rect(e - 0.4, 0, e + 0.4, logit, ids.includes(e) ? palette[e] : '#bbbbbb')
      const place = { cx: left.x(e), cy: left.y(logit), r: 7 }
      const mark = left.add('circle', { ...place, fill: palette[e], stroke: '#000' })
      const move = (value) => {
        state.logits[e] = Math.round(20 * bounded(value, -3, 3)) / 20
        again()
      }
      draggable(mark, `logit of expert ${e}`, [logit, -3, 3], logit.toFixed(2), {
        moveTo: (_, y) => move(left.valueY(y)),
        step: (dx, dy) => move(logit + (dx + dy) / 10),
      })
    })
    for (const [box, norm, heights] of [[boxes[1], 'False', gates], [boxes[2], 'True', normalized]]) {
      const axes = new Axes(root, box, { xlim: [-0.6, 7.6], ylim: [0, 1.05] })
      const names = { title: `norm_topk_prob=${norm}`, ylabel: 'probability, gate' }
      axes.frame({ ...names, yticks: [0, 0.5, 1], ...ticks })
      probs.forEach((p, e) => axes.rect(e - 0.4, 0, e + 0.4, p, '#dddddd'))
      ids.forEach((e, i) => axes.rect(e - 0.25, 0, e + 0.25, heights[i], palette[e]))
    }
    return root
  },
}

// 01 router, the plane: four arrows and a token that can be dragged.
function drawCones(axes, arrows, palette) {
  const edge = (i) => [Math.cos, Math.sin].map((of) => 5 * of((i * Math.PI) / 360))
  const scores = ([x, y]) => arrows.map((arrow) => x * arrow[0] + y * arrow[1])
  const winners = range(720).map((i) => best(scores(edge(i + 0.5)), 1)[0])
  const wedge = { 'fill-opacity': 0.3, 'clip-path': 'url(#plane)' }
  let begin = 0
  for (const i of range(720)) {
    if (i < 719 && winners[i + 1] === winners[begin]) continue
    const corners = [[0, 0], ...range(i + 2 - begin).map((n) => edge(begin + n))]
    const [xs, ys] = [0, 1].map((k) => corners.map((corner) => corner[k]))
    axes.line(xs, ys, 'none', { fill: palette[winners[begin]], ...wedge })
    begin = i + 1
  }
}

computed['01_router/walk-picture'] = {
  numbers({ top_k, temperature, norm_topk_prob }, data, state) {
    state.arrows ??= data.arrows.map((arrow) => [...arrow])
    state.token ??= [...data.token]
    const [x, y] = state.token
    const logits = state.arrows.map((arrow) => (x * arrow[0] + y * arrow[1]) / temperature)
    const { probs, ids, gates, normalized } = route(logits, top_k)
    return { logits, probs, ids, gates: norm_topk_prob ? normalized : gates }
  },
  sentence({ ids, gates }) {
    return ids.map((e, i) => `expert ${e}: gate ${gates[i].toFixed(2)}`).join(', ')
  },
  draw(width, { palette, state, again }, { probs, ids, gates }) {
    const boxes = layout(width, Math.min(width, 330), [1, 1])
    const root = canvas(width, bottom(boxes), 'tokens and experts in the plane, and gates')
    const plane = new Axes(root, boxes[0], { xlim: [-3, 3], ylim: [-3, 3] })
    const [x, y] = [plane.left, plane.top]
    const size = { x, y, width: plane.right - x, height: plane.bottom - y }
    root.append(svg('clipPath', { id: 'plane' }, svg('rect', size)))
    drawCones(plane, state.arrows, palette)
    const ticks = { xticks: [-2, 0, 2], yticks: [-2, 0, 2], xlabel: 'feature 0', ylabel: 'feature 1' }
    plane.frame({ title: 'drag the token and the arrows', ...ticks })
    const handle = (point, label, mark) => {
      const move = (to) => {
        to.forEach((value, k) => (point[k] = Math.round(20 * bounded(value, -2.9, 2.9)) / 20))
        again()
      }
      const words = point.map((value) => value.toFixed(2)).join(', ')
      draggable(mark, label, [point[0], -2.9, 2.9], words, {
        moveTo: (px, py) => move([plane.valueX(px), plane.valueY(py)]),
        step: (dx, dy) => move([point[0] + dx / 10, point[1] + dy / 10]),
      })
      plane.group.append(mark)
    }
    state.arrows.forEach((arrow, e) => {
      const [cx, cy] = [plane.x(arrow[0]), plane.y(arrow[1])]
      const opacity = ids.includes(e) ? 1 : 0.45
      plane.line([0, arrow[0]], [0, arrow[1]], '#000', { 'stroke-width': 2, opacity })
      const tip = svg('g', {}, svg('circle', { cx, cy, r: 10, fill: palette[e], stroke: '#000' }))
      tip.append(text(cx, cy + 4, e, { fill: '#fff', 'font-weight': 'bold' }))
      handle(arrow, `arrow of expert ${e}`, tip)
    })
    const place = { cx: plane.x(state.token[0]), cy: plane.y(state.token[1]), r: 8 }
    const white = { fill: '#fff', stroke: '#000', 'stroke-width': 2.5 }
    handle(state.token, 'token', svg('circle', { ...place, ...white }))
    const bars = new Axes(root, boxes[1], { xlim: [-0.6, 3.6], ylim: [0, 1.05] })
    probs.forEach((p, e) => bars.rect(e - 0.4, 0, e + 0.4, p, '#dddddd'))
    ids.forEach((e, i) => bars.rect(e - 0.25, 0, e + 0.25, gates[i], palette[e]))
    const names = { title: 'probabilities (pale) and gates', xlabel: 'expert' }
    bars.frame({ ...names, xticks: range(4), yticks: [0, 0.5, 1] })
    return root
  },
}

// 04 capacity: token dropping.
function evenShares(factor, assignments, experts) {
  return Math.floor(((factor * assignments) / experts) * (1 + 1e-12))
}

function expertCapacity(tokens, experts, k, factor) {
  const slots = evenShares(factor, k * tokens, experts)
  return Math.max(slots + (slots % 2), 4)
}

// Which assignments have a slot, (N, K), by the priority of the assignments n·K + k.
function keptSlots(ids, gates, capacity, priority) {
  const [N, K] = [ids.length, ids[0].length]
  const order = range(N * K)
  const gate = gates.flat()
  if (priority === 'choice') order.sort((a, b) => (a % K) - (b % K) || a - b)
  if (priority === 'gate') order.sort((a, b) => gate[b] - gate[a] || a - b)
  const taken = {}
  const kept = ids.map((row) => row.map(() => false))
  for (const assignment of order) {
    const [n, k] = [Math.floor(assignment / K), assignment % K]
    const e = ids[n][k]
    taken[e] = (taken[e] ?? 0) + 1
    kept[n][k] = taken[e] <= capacity
  }
  return kept
}

// topk_route of many tokens, rounded to float32 as PyTorch rounds: an order may depend on it.
function routeAll(rows, k) {
  const routed = rows.map((logits) => route(logits, k))
  return { ids: routed.map(({ ids }) => ids), gates: routed.map(({ gates }) => gates.map(Math.fround)) }
}

function float32(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))
  return new Float32Array(bytes.buffer)
}

computed['04_capacity/explorer'] = {
  numbers({ capacity_factor, skew, priority }, { noise }, state) {
    const [N, E] = [2048, 8]
    const all = (state.noise ??= float32(noise))
    const lower = range(E).map((e) => Math.fround(Math.fround(skew) * Math.fround(Math.log(e + 1))))
    const rows = range(N).map((n) => range(E).map((e) => Math.fround(all[n * E + e] - lower[e])))
    const { ids, gates } = routeAll(rows, 2)
    const kept = keptSlots(ids, gates, expertCapacity(N, E, 2, capacity_factor), priority)
    const parts = range(16).map((i) => kept.slice(128 * i, 128 * i + 128))
    const [first, second] = [0, 1].map((k) => parts.map((part) => sum(part.map((row) => 1 - row[k])) / 128))
    return { first, second, dropped: (sum(first) + sum(second)) / 32 }
  },
  sentence({ first, second, dropped }) {
    const of = `${percent(sum(first) / 16)} of the first choices, ${percent(sum(second) / 16)} of the second`
    return `${percent(dropped)} of the assignments are dropped: ${of}.`
  },
  draw(width, { palette }, { first, second }) {
    const root = canvas(width, 260, 'share dropped by position')
    const axes = new Axes(root, { left: 0, top: 0, width, height: 260 }, { xlim: [-0.6, 15.6], ylim: [0, 1] })
    first.forEach((share, i) => {
      axes.rect(i - 0.4, 0, i + 0.4, share / 2, palette[0])
      axes.rect(i - 0.4, share / 2, i + 0.4, (share + second[i]) / 2, palette[1])
    })
    const xticks = [0, 3, 6, 9, 12, 15]
    axes.frame({ xlabel: 'sixteenth of the sequence', ylabel: 'share dropped', xticks, yticks: [0, 0.5, 1] })
    legend(root, axes.left + 10, 8, width - 60, ['first choices', 'second choices'], palette)
    return root
  },
}

// 04 capacity, the leak: whose output changes when one token is replaced.
const SIDES = { own: '#808080', later: '#56B4E9', earlier: '#D55E00' }

computed['04_capacity/leak-explore'] = {
  numbers({ token, priority, factor, rows }, { logits, others }) {
    const capacity = expertCapacity(32 / rows, 4, 2, factor)
    const changed = logits.map((row, n) => (n === token ? others[n] : row))
    const [before, after] = [logits, changed].map((tokens) => {
      const { ids, gates } = routeAll(tokens, 2)
      const groups = ids.map((row, n) => row.map((e) => e * rows + Math.floor((n * rows) / 32)))
      return { ids, kept: keptSlots(groups, gates, capacity, priority) }
    })
    const outputs = range(32).filter((n) => {
      const [a, b] = [before.kept[n], after.kept[n]]
      return n === token ? a.some(Boolean) || b.some(Boolean) : a.some((kept, k) => kept !== b[k])
    })
    const earlier = outputs.filter((n) => n < token).length
    return { before, after, outputs, earlier, later: outputs.filter((n) => n > token).length }
  },
  sentence({ earlier, later }) {
    return `Outputs that change: ${earlier} earlier (vermilion), ${later} later (blue).`
  },
  draw(width, { values: { token }, palette, setControl }, { before, after, outputs }) {
    const root = canvas(width, 290, 'assignments before and after, and outputs that change')
    const part = (top, height, ylim) =>
      new Axes(root, { left: 0, top, width, height }, { xlim: [-0.5, 31.5], ylim, margin: [6, 12, 6, 60] })
    for (const [top, { ids, kept }, name] of [[0, before, 'before'], [94, after, 'after']]) {
      const axes = part(top, 94, [1.5, -0.5])
      for (const [n, row] of ids.entries()) {
        row.forEach((e, k) => {
          axes.rect(n - 0.5, k - 0.5, n + 0.5, k + 0.5, palette[e])
          if (kept[n][k]) return
          const [x, y] = [axes.x(n), axes.y(k)]
          const d = `M${x - 4} ${y - 4}l8 8m0 -8l-8 8`
          axes.add('path', { d, stroke: '#fff', 'stroke-width': 2 })
        })
      }
      axes.frame({ ylabel: name, yticks: [0, 1], ynames: ['1st', '2nd'] })
    }
    const below = part(188, 62, [0, 1])
    for (const n of outputs) {
      const color = n === token ? SIDES.own : n > token ? SIDES.later : SIDES.earlier
      below.rect(n - 0.45, 0, n + 0.45, 1, color)
    }
    below.frame({ ylabel: 'output', xticks: [0, 8, 16, 24, 31] })
    root.append(text((below.left + below.right) / 2, 286, 'token: drag the frame'))
    const [x0, x1] = [below.x(token - 0.5), below.x(token + 0.5)]
    const place = { x: x0, y: 6, width: x1 - x0, height: 240 }
    const frame = svg('rect', { ...place, fill: 'transparent', stroke: '#000', 'stroke-width': 2 })
    const move = (n) => setControl(0, bounded(Math.round(n), 0, 31))
    root.append(
      draggable(frame, 'replaced token', [token, 0, 31], token, {
        moveTo: (x) => move(below.valueX(x)),
        step: (dx, dy) => move(token + dx + dy),
      }),
    )
    return root
  },
}
