// Explorers that the page calculates, those about sizes and time; routing.js says what each has.

const nearest = (values, x) =>
  values.reduce((at, value, i) => (Math.abs(value - x) < Math.abs(values[at] - x) ? i : at), 0)

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
    const weights = `${million(cost[1])}M of ${million(cost[2])}M weights active`
    const count = `${K} of ${E} experts: ${sets.toLocaleString('en')} possible sets`
    return `${count}; ${million(cost[0])} MFLOPs per token, ${weights}.`
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
    const limits = { xlim: [0.02, 20000], ylim: [3.6, -0.6], log: true }
    const bars = new Axes(root, boxes[1], { ...limits, margin: [28, 12, 40, 110] })
    bars.frame({
      title: 'black ticks: matched dense',
      xlabel: 'millions, logarithmic',
      xticks: [0.1, 10, 1000],
      xnames: ['0.1', '10', '1,000'],
      yticks: range(4),
      ynames: COSTS,
    })
    cost.forEach((n, i) => {
      bars.rect(0.02, i - 0.35, n / 1e6, i + 0.35, '#bbbbbb')
      bars.rect((matched[i] / 1e6) * 0.96, i - 0.42, (matched[i] / 1e6) * 1.04, i + 0.42, '#000')
      const words = `${million(n)}M = ${(n / matched[i]).toFixed(1)} × dense`
      const end = Math.max(bars.x(n / 1e6), bars.x(matched[i] / 1e6)) + 6
      const place = end + 6.5 * words.length > bars.right ? [bars.right, 'end'] : [end, 'start']
      bars.group.append(text(place[0], bars.y(i) + 4, words, { 'text-anchor': place[1] }))
    })
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
    const used = (n_layer - sparse + sparse * K) * mlp
    const weights = vocab_size * C + n_layer * 4 * C * C + used + sparse * C * E
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
    const now = [warmup, 0, Math.max(...controls[0].values)]
    const mark = draggable(svg('circle', place), 'end of the warmup and peak', now, `${warmup} steps, ${peak}`, {
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
    const xlabel = 'rows of each expert; dashed: even share'
    axes.frame({ xlabel, ylabel: 'process', xticks, yticks: range(P) })
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
