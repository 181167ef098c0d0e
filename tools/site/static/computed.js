// The explorers that the page calculates, with the formulas of the lessons: `numbers` from the controls' values and
// the lesson's data, a `sentence` with the main ones, and a drawing.

const computed = {}
const million = (n, digits = 2) => (n / 1e6).toFixed(digits)
const percent = (share) => `${Math.round(100 * share)}%`
const range = (n) => [...Array(n).keys()]
const sum = (numbers) => numbers.reduce((total, n) => total + n, 0)
const isLight = (color) => color === '#F0E442'
const bounded = (x, low, high) => Math.min(Math.max(x, low), high)
const nearest = (values, x) => values.reduce((at, value, i) => (Math.abs(value - x) < Math.abs(values[at] - x) ? i : at), 0)

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

// 01 router, the plane: four arrows and a token that can be dragged.
function drawCones(axes, arrows, palette) {
  const score = ([x, y], angle) => x * Math.cos(angle) + y * Math.sin(angle)
  const winners = range(720).map((i) => best(arrows.map((arrow) => score(arrow, ((i + 0.5) * Math.PI) / 360)), 1)[0])
  const edge = (i) => [Math.cos, Math.sin].map((of) => 5 * of((i * Math.PI) / 360))
  let begin = 0
  for (const i of range(720)) {
    if (i < 719 && winners[i + 1] === winners[begin]) continue
    const corners = [[0, 0], ...range(i + 2 - begin).map((n) => edge(begin + n))]
    const [xs, ys] = [0, 1].map((k) => corners.map((corner) => corner[k]))
    axes.line(xs, ys, 'none', { fill: palette[winners[begin]], 'fill-opacity': 0.3, 'clip-path': 'url(#plane)' })
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
      draggable(mark, label, point.join(', '), {
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
    handle(state.token, 'token', svg('circle', { ...place, fill: '#fff', stroke: '#000', 'stroke-width': 2.5 }))
    const bars = new Axes(root, boxes[1], { xlim: [-0.6, 3.6], ylim: [0, 1.05] })
    probs.forEach((p, e) => bars.rect(e - 0.4, 0, e + 0.4, p, '#dddddd'))
    ids.forEach((e, i) => bars.rect(e - 0.25, 0, e + 0.25, gates[i], palette[e]))
    const names = { title: 'probabilities (pale) and gates', xlabel: 'expert' }
    bars.frame({ ...names, xticks: range(4), yticks: [0, 0.5, 1] })
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

// 07 model: parameters and FLOPs of a model with experts in every few layers.
const PARTS = {
  embeddings: '#7F7F7F',
  attention: '#56B4E9',
  MLPs: '#009E73',
  'routers, norms': '#000000',
  'experts, active': '#D55E00',
  'experts, idle': '#F7C9A9',
}

computed['07_model/explorer'] = {
  numbers({ n_experts: E, top_k, moe_every }, { C, n_layer, vocab_size, block_size }) {
    const K = Math.min(top_k, E)
    const sparse = Math.ceil(n_layer / moe_every)
    const mlp = 8 * C * C
    const parts = [(vocab_size + block_size) * C, n_layer * 4 * C * C, (n_layer - sparse) * mlp]
    parts.push(sparse * E * C + (2 * n_layer + 1) * C, sparse * K * mlp, sparse * (E - K) * mlp)
    const weights = vocab_size * C + n_layer * 4 * C * C + (n_layer - sparse) * mlp + sparse * (K * mlp + C * E)
    const total = sum(parts)
    return { parts, total, active: total - parts[5], flops: 6 * weights + 12 * n_layer * C * block_size }
  },
  sentence({ total, active, flops }) {
    const sizes = `${million(total, 1)}M parameters in total, ${million(active, 1)}M active`
    return `${sizes}, ${million(flops, 0)} MFLOPs per token.`
  },
  draw(width, _, { parts }) {
    const root = canvas(width, 0, 'parameters by part')
    const top = 8 + legend(root, 8, 8, width - 8, Object.keys(PARTS), Object.values(PARTS))
    const bars = new Axes(root, { left: 0, top, width, height: 150 }, {
      xlim: [0, 260],
      ylim: [1.5, -0.5],
      margin: [4, 12, 40, 52],
    })
    let left = 0
    Object.values(PARTS).forEach((color, i) => {
      const right = left + parts[i] / 1e6
      bars.rect(left, -0.35, right, 0.35, color)
      if (i < 5) bars.rect(left, 0.65, right, 1.35, color)
      left = right
    })
    const names = { yticks: [0, 1], ynames: ['total', 'active'] }
    bars.frame({ xlabel: 'million parameters', xticks: [0, 50, 100, 150, 200, 250], ...names })
    return resized(root, width, top + 150)
  },
}

// 08 optim: the learning rate of each of a thousand steps.
function rateAt(step, { warmup, peak, floor, steps }) {
  if (step < warmup) return (peak * (step + 1)) / (warmup + 1)
  const done = Math.min((step - warmup) / Math.max(steps - warmup, 1), 1)
  return floor + (peak - floor) * 0.5 * (1 + Math.cos(Math.PI * done))
}

computed['08_optim/schedule-explore'] = {
  numbers({ warmup_iters: warmup, peak, floor, max_iters: steps }) {
    const rates = range(1000).map((step) => rateAt(step, { warmup, peak, floor: floor * peak, steps }))
    return { rates, sum: sum(rates) / 1000 }
  },
  sentence: (numbers) => `Sum of all rates: ${numbers.sum.toFixed(2)}.`,
  draw(width, { values, palette, controls, setControl }, { rates }) {
    const root = canvas(width, 240, 'learning rate by step')
    const axes = new Axes(root, { left: 0, top: 0, width, height: 240 }, {
      xlim: [0, 1000],
      ylim: [0, 10.5],
      margin: [14, 18, 40, 48],
    })
    axes.line([0, ...range(1000), 999], [0, ...rates, 0], 'none', { fill: palette[0], 'fill-opacity': 0.2 })
    axes.line(range(1000), rates, palette[0], { 'stroke-width': 2 })
    const xticks = [0, 200, 400, 600, 800, 1000]
    axes.frame({ xlabel: 'step', ylabel: 'rate, in 1/1000', xticks, yticks: [0, 2, 4, 6, 8, 10] })
    const { warmup_iters: warmup, peak } = values
    const place = { cx: axes.x(warmup), cy: axes.y(rates[warmup]), r: 8, fill: palette[1], stroke: '#000' }
    const move = (x, y) => {
      setControl(0, nearest(controls[0].values, x))
      setControl(1, nearest(controls[1].values, y))
    }
    const mark = draggable(svg('circle', place), 'end of the warmup and peak', `${warmup} steps, ${peak}`, {
      moveTo: (x, y) => move(axes.valueX(x), axes.valueY(y)),
      step: (dx, dy) => move(warmup + 10 * dx, peak + 0.1 * dy),
    })
    axes.group.append(mark)
    return root
  },
}

// 12 expert parallelism: the rows of each process, at the number of assignments of each expert.
computed['12_expert_parallel/waiting-explorer'] = {
  numbers({ skew, capacity, P }, { counts }) {
    const wanted = counts[skew]
    const rows = capacity < 4 ? wanted.map((n) => Math.min(n, Math.fround(capacity * 512))) : wanted
    const perProcess = range(P).map((p) => sum(rows.slice((p * 16) / P, ((p + 1) * 16) / P)))
    const dropped = Math.trunc(8192 - sum(rows))
    return { rows, dropped, waiting: (Math.max(...perProcess) * P) / 8192 }
  },
  sentence({ dropped, waiting }) {
    return `${waiting.toFixed(2)} even shares at most, ${percent(dropped / 8192)} dropped.`
  },
  draw(width, { values: { P }, palette }, { rows }) {
    const height = 56 + Math.max(120, 18 * P)
    const root = canvas(width, height, 'rows of each process')
    const each = 16 / P
    const loads = range(P).map((p) => sum(rows.slice(p * each, (p + 1) * each)))
    const most = Math.max(...loads, 8192 / P) * 1.05
    const limits = { xlim: [0, most], ylim: [P - 0.5, -0.5], margin: [8, 12, 42, 48] }
    const axes = new Axes(root, { left: 0, top: 0, width, height }, limits)
    for (const p of range(P)) {
      let left = 0
      for (const e of range(16).slice(p * each, (p + 1) * each)) {
        axes.rect(left, p - 0.42, left + rows[e], p + 0.42, palette[e % 8], { stroke: '#fff' })
        const fill = isLight(palette[e % 8]) ? '#000' : '#fff'
        const middle = axes.x(left + rows[e] / 2)
        if (axes.x(rows[e]) - axes.left > 18) axes.group.append(text(middle, axes.y(p) + 4, e, { fill }))
        left += rows[e]
      }
    }
    const even = axes.x(8192 / P)
    axes.add('path', { d: `M${even} ${axes.top}V${axes.bottom}`, stroke: '#000', 'stroke-dasharray': '5 3' })
    const xticks = ticks(most)
    axes.frame({ xlabel: 'rows of each expert; dashed: even share', ylabel: 'process', xticks, yticks: range(P) })
    return root
  },
}

// 26 sizing: models of n layers of width 64·n that a budget trains with 20 tokens per active weight.
const [VOCABULARY, CONTEXT] = [50304, 256]

function family(n, E, K) {
  const C = 64 * n
  const F = Math.floor((4 * C) / K)
  const sparse = E > 1 ? n : 0
  const experts = sparse * E * 2 * C * F
  const dense = (n - sparse) * 8 * C * C
  const other = VOCABULARY * C + n * 4 * C * C + dense
  const routers = sparse * C * E
  const total = other + CONTEXT * C + (2 * n + 1) * C + routers + experts
  const active = total - experts + (experts * K) / E
  const flops = 6 * (other + routers + (experts * K) / E) + 12 * n * C * CONTEXT
  return { n, C, F, E, K, sparse, copied: other + experts, total, active, flops }
}

function afford(budget, E, K) {
  const off = ({ flops, active }) => Math.abs(Math.log(budget / flops / (20 * active)))
  const members = range(159).map((i) => family(i + 2, E, K))
  const model = members.reduce((a, b) => (off(b) < off(a) ? b : a))
  return { ...model, tokens: budget / model.flops }
}

// Bytes of a training step in bfloat16 with 8 sequences, by part.
function stepBytes({ n, C, F, E, K, sparse, copied, total }) {
  const tokens = 8 * CONTEXT
  const kept = [4 * C * (2 * n + 1), n * (10 * C + 4 * n), (n - sparse) * 18 * C]
  kept.push(sparse * (4 * C + 8 * E + 40 * K), sparse * 2 * K * (2 * C + 2 * F))
  const head = tokens * 2 * C + 4 * VOCABULARY * C + 256 * VOCABULARY * 14
  return [4 * total, 4 * total, 8 * total, 2 * copied, tokens * sum(kept), head]
}

computed['26_sizing/explorer'] = {
  numbers({ dollars, experts, top_k, price, mfu }, { peak }) {
    const budget = (dollars / price) * 3600 * peak * mfu
    const plans = [afford(budget, 1, 1), afford(budget, experts, Math.min(top_k, experts))]
    const days = (plans[1].flops * plans[1].tokens) / (8 * peak * mfu) / 86400
    const pick = (key) => plans.map((plan) => plan[key])
    const sizes = { layers: pick('n'), total: pick('total'), active: pick('active'), tokens: pick('tokens') }
    return { budget, days, ...sizes, bytes: plans.map(stepBytes) }
  },
  sentence({ budget, days, layers, total, active, tokens }) {
    const billion = (n, digits) => (n / 1e9).toFixed(digits)
    const plan = (name, i) =>
      `${name}: ${layers[i]} layers of width ${64 * layers[i]}, ${billion(total[i], 2)} billion weights, ` +
      `${billion(active[i], 2)} active, ${billion(tokens[i], 1)} billion tokens.`
    const run = `${budget.toExponential(1)} FLOPs, ${days.toFixed(1)} days on 8 GPUs.`
    return `${run} ${plan('Dense', 0)} ${plan('Mixture', 1)}`
  },
  draw(width, { palette }, { bytes }) {
    const root = canvas(width, 0, 'memory per GPU')
    const names = ['weights', 'gradients', 'moments', 'copies', 'activations', 'head']
    const top = 8 + legend(root, 8, 8, width - 8, names, palette)
    const most = (Math.max(...bytes.map(sum), 30e9) / 1e9) * 1.05
    const limits = { xlim: [0, most], ylim: [1.5, -0.5], margin: [4, 12, 42, 60] }
    const axes = new Axes(root, { left: 0, top, width, height: 150 }, limits)
    bytes.forEach((parts, i) => {
      let left = 0
      parts.forEach((size, part) => {
        axes.rect(left, i - 0.3, left + size / 1e9, i + 0.3, palette[part])
        left += size / 1e9
      })
    })
    for (const limit of [24, 80].filter((gigabytes) => gigabytes < most)) {
      const d = `M${axes.x(limit)} ${axes.top}V${axes.bottom}`
      axes.add('path', { d, stroke: '#000', 'stroke-dasharray': '2 3' })
    }
    const xticks = ticks(most)
    const xlabel = 'memory per GPU, GB (dotted: 24 and 80)'
    axes.frame({ xlabel, xticks, yticks: [0, 1], ynames: ['dense', 'mixture'] })
    return resized(root, width, top + 150)
  },
}
