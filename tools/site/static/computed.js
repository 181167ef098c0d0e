// The explorers that the page calculates, with the formulas of the lessons: `numbers` from the controls' values and
// the lesson's data, a `sentence` with the main ones, and a drawing.

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
      const mark = left.add('circle', { cx: left.x(e), cy: left.y(logit), r: 7, fill: palette[e], stroke: '#000' })
      const move = (value) => {
        state.logits[e] = Math.round(20 * bounded(value, -3, 3)) / 20
        again()
      }
      draggable(mark, `logit of expert ${e}`, logit, {
        moveTo: (_, y) => move(left.valueY(y)),
        step: (dx, dy) => move(logit + (dx + dy) / 10),
      })
    })
    for (const [box, norm, heights] of [[boxes[1], 'False', gates], [boxes[2], 'True', normalized]]) {
      const axes = new Axes(root, box, { xlim: [-0.6, 7.6], ylim: [0, 1.05] })
      axes.frame({ title: `norm_topk_prob=${norm}`, yticks: [0, 0.5, 1], ylabel: 'probability, gate', ...ticks })
      probs.forEach((p, e) => axes.rect(e - 0.4, 0, e + 0.4, p, '#dddddd'))
      ids.forEach((e, i) => axes.rect(e - 0.25, 0, e + 0.25, heights[i], palette[e]))
    }
    return root
  },
}

// 02 experts: what one MoE layer of width C costs.
const COSTS = ['FLOPs / token', 'active weights', 'weights', 'bytes in training']

function layerCost(E, K, F, C) {
  const stored = E * 2 * C * F + E * C
  return [K * 4 * C * F + 2 * E * C, K * 2 * C * F + E * C, stored, 16 * stored]
}

computed['02_experts/explorer'] = {
  numbers({ E, K, F }, { C }) {
    const weights = 2 * C * K * F
    const sets = range(K).reduce((count, i) => (count * (E - i)) / (i + 1), 1)
    return { cost: layerCost(E, K, F, C), matched: [2 * weights, weights, weights, 16 * weights], sets }
  },
  sentence({ cost, sets }, { E, K }) {
    const all = `${million(cost[0])} MFLOPs per token, ${million(cost[1])}M of ${million(cost[2])}M weights active`
    return `${K} of ${E} experts: ${sets.toLocaleString('en')} possible sets; ${all}.`
  },
  draw(width, { values: { E, K, F }, palette }, { cost, matched }) {
    const boxes = layout(width, 230, [1, 2])
    const root = canvas(width, bottom(boxes), 'experts and costs')
    const experts = new Axes(root, boxes[0], { xlim: [-0.6, 7.6], ylim: [-7.6, 0.6], margin: [28, 4, 8, 4] })
    const cell = Math.min(experts.x(1) - experts.x(0), experts.y(0) - experts.y(1))
    const side = cell * 0.92 * Math.sqrt(F / 1024)
    for (const e of range(E)) {
      const at = { x: experts.left + cell * ((e % 8) + 0.5) - side / 2, width: side, height: side }
      const y = experts.top + cell * (Math.floor(e / 8) + 0.5) - side / 2
      experts.add('rect', { ...at, y, fill: palette[e % 8], opacity: e < K ? 1 : 0.22 })
    }
    const bars = new Axes(root, boxes[1], { xlim: [0.02, 20000], ylim: [3.6, -0.6], log: true, margin: [28, 12, 40, 110] })
    bars.frame({
      title: 'black ticks: matched dense',
      xlabel: 'millions, logarithmic',
      xticks: [0.1, 1, 10, 100, 1000, 10000],
      xnames: ['0.1', '1', '10', '100', '1,000', '10,000'],
      yticks: range(4),
      ynames: COSTS,
    })
    cost.forEach((n, i) => {
      bars.rect(0.02, i - 0.35, n / 1e6, i + 0.35, '#bbbbbb')
      bars.rect((matched[i] / 1e6) * 0.96, i - 0.42, (matched[i] / 1e6) * 1.04, i + 0.42, '#000')
      const words = `${million(n)}M = ${(n / matched[i]).toFixed(1)} × dense`
      const end = Math.max(bars.x(n / 1e6), bars.x(matched[i] / 1e6)) + 6
      const inside = end + 6.5 * words.length > bars.right
      const place = inside ? [bars.x(Math.min(n, matched[i]) / 1e6) - 6, 'end'] : [end, 'start']
      bars.group.append(text(place[0], bars.y(i) + 4, words, { 'text-anchor': place[1] }))
    })
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
    const dropped = (k) => range(16).map((i) => sum(kept.slice(128 * i, 128 * i + 128).map((row) => 1 - row[k])) / 128)
    const [first, second] = [dropped(0), dropped(1)]
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
    const shape = { x: x0, y: 6, width: x1 - x0, height: 240, fill: 'transparent', stroke: '#000', 'stroke-width': 2 }
    const move = (n) => setControl(0, bounded(Math.round(n), 0, 31))
    root.append(
      draggable(svg('rect', shape), 'replaced token', token, {
        moveTo: (x) => move(below.valueX(x)),
        step: (dx, dy) => move(token + dx + dy),
      }),
    )
    return root
  },
}
