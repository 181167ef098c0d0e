// Explorers: native controls, and a view that follows them. A recorded explorer shows one of its frames; a
// computed one is calculated and drawn by its entry of `computed`.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  made.append(...children)
  return made
}

// Each kind of control: an element, and `set(at)` that shows position `at`; it calls `moved(at)`.
const controlKinds = {
  range({ label, labels, id }, moved) {
    const input = element('input', { type: 'range', min: 0, max: labels.length - 1, id })
    const value = element('span')
    input.addEventListener('input', () => moved(Number(input.value)))
    const set = (at) => {
      input.value = at
      input.setAttribute('aria-valuetext', labels[at])
      value.textContent = labels[at]
    }
    return [element('div', {}, element('label', { for: id }, label), input, value), set]
  },
  select({ label, labels, id }, moved) {
    const select = element('select', { id }, ...labels.map((text) => element('option', {}, text)))
    select.addEventListener('change', () => moved(select.selectedIndex))
    const set = (at) => (select.selectedIndex = at)
    return [element('div', {}, element('label', { for: id }, label), select), set]
  },
  radio({ label, labels, id }, moved) {
    const inputs = labels.map((_, at) => {
      const input = element('input', { type: 'radio', name: id })
      input.addEventListener('change', () => moved(at))
      return input
    })
    const choices = labels.map((text, at) => element('label', {}, inputs[at], text))
    const set = (at) => (inputs[at].checked = true)
    return [element('fieldset', {}, element('legend', {}, label), ...choices), set]
  },
  checkbox({ label, id }, moved) {
    const input = element('input', { type: 'checkbox', id })
    input.addEventListener('change', () => moved(Number(input.checked)))
    const set = (at) => (input.checked = at === 1)
    return [element('div', {}, element('label', { for: id }, label), input), set]
  },
  text({ label, labels, id }) {
    const lines = labels[0].split('\n').length
    const input = element(lines > 1 ? 'textarea' : 'input', { rows: lines, disabled: '', id })
    input.value = labels[0]
    return [element('div', { class: 'wide' }, element('label', { for: id }, label), input), () => {}]
  },
}

// Shows the frame at the positions `at`; frames are in the order of the last control first.
function recordedView(spec, view) {
  const counts = spec.controls.map(({ labels }) => labels.length)
  const frameAt = (at) => spec.frames[at.reduce((n, position, i) => n * counts[i] + position, 0)]
  if (spec.html) return (at) => (view.innerHTML = spec.html[frameAt(at)])
  const picture = view.querySelector('img')
  const load = () => spec.pictures.forEach((name) => (new Image().src = spec.folder + name))
  view.parentElement.addEventListener('focusin', load, { once: true })
  view.parentElement.addEventListener('pointerenter', load, { once: true })
  return (at) => {
    picture.src = spec.folder + spec.pictures[frameAt(at)]
    const values = spec.controls.map(({ label, labels }, i) => `${label} ${labels[at[i]]}`)
    picture.alt = `${spec.title}, ${values.join(', ')}`
  }
}

// Draws the entry of `computed`; `box.numbers` is what it calculated, and a sentence repeats the main ones.
function computedView(spec, view, box, setControl) {
  const { numbers, sentence, draw } = computed[spec.computed]
  const said = element('output', { class: 'numbers' })
  const state = {}
  const show = (at) => {
    const values = {}
    spec.controls.forEach(({ name, values: all }, i) => (values[name] = all[at[i]]))
    box.numbers = numbers(values, spec.data, state)
    said.textContent = sentence(box.numbers, values, spec.data)
    const focused = view.contains(document.activeElement) && document.activeElement.getAttribute('aria-label')
    const again = () => show(at)
    view.replaceChildren(draw(view.clientWidth, { ...spec, values, state, again, setControl }, box.numbers))
    if (focused) view.querySelector(`[aria-label="${focused}"]`)?.focus()
  }
  view.after(said)
  return show
}

function startExplorer(box) {
  const spec = JSON.parse(box.querySelector('script').textContent)
  const view = box.querySelector('.view')
  const at = spec.controls.map((control) => control.at)
  const setControl = (i, position) => {
    at[i] = position
    setters[i](position)
    show(at)
  }
  const made = spec.controls.map((control, i) =>
    controlKinds[control.kind]({ ...control, id: `${box.id}-${i}` }, (position) => setControl(i, position)),
  )
  const setters = made.map(([, set]) => set)
  const row = element('div', { class: 'controls' }, ...made.map(([control]) => control))
  view.before(row)
  const show = spec.computed ? computedView(spec, view, box, setControl) : recordedView(spec, view)
  setters.forEach((set, i) => set(at[i]))
  if (spec.computed) {
    let width = 0
    new ResizeObserver(() => {
      if (view.clientWidth === width) return
      width = view.clientWidth
      show(at)
    }).observe(view)
    show(at)
  }
}

for (const box of document.querySelectorAll('.explorer')) startExplorer(box)
