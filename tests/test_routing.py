"""Every way to run the experts gives the same result, and every way to route is what it says it is."""

import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanomoe import experts as module
from nanomoe.config import BadInput, ModelConfig, TrainConfig, check
from nanomoe.experts import MoE, activate
from nanomoe.losses import Losses, balance_loss, sequence_balance_loss, total_loss, update_bias
from nanomoe.model import GPT, flops_per_token, initialize
from nanomoe.router import (
    ExpertChoiceRouter,
    HashRouter,
    Routing,
    TopKRouter,
    even_shares,
    make_router,
    topk_route,
)
from nanomoe.metrics import health, step_stats
from nanomoe.optim import make_optimizer

BASE = ModelConfig(n_embd=16, n_head=1, n_experts=6, top_k=2, expert_width=24)


def filled(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def one_expert(layer: MoE, e: int, x: torch.Tensor) -> torch.Tensor:
    "What expert e says of rows (S, C), from its weights alone."
    w = layer.experts
    hidden = x @ w.c_fc[e] + (0 if w.fc_bias is None else w.fc_bias[e])
    return activate(hidden, w.activation) @ w.c_proj[e] + (0 if w.proj_bias is None else w.proj_bias[e])


def by_loop(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    "Token by token, choice by choice."
    r, rows = layer.router(x.flatten(0, 1)), x.flatten(0, 1)
    out = [
        sum(g * one_expert(layer, e, row[None])[0] for e, g in zip(ids.tolist(), gates))
        for row, ids, gates in zip(rows, r.expert_ids, r.gates)
    ]
    return torch.stack(out).view(x.shape)


def by_one_hot(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    "All experts on all tokens, then an einsum with the gates."
    r, rows = layer.router(x.flatten(0, 1)), x.flatten(0, 1)
    weight = torch.einsum('nke,nk->ne', F.one_hot(r.expert_ids, layer.cfg.n_experts).to(x.dtype), r.gates)
    everything = torch.stack([one_expert(layer, e, rows) for e in range(layer.cfg.n_experts)])  # (E, N, C)
    return torch.einsum('ne,enc->nc', weight, everything).view(x.shape)


def by_padding(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    "Queues so long that nothing is dropped."
    layer.cfg = replace(layer.cfg, capacity_factor=float(layer.cfg.n_experts))
    try:
        y, r = layer(x)
    finally:
        layer.cfg = replace(layer.cfg, capacity_factor=None)
    assert r.kept is None
    return y


def dropless(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    return layer(x)[0]


def by_compiled(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend='aot_eager')(x)[0]


def by_checkpointing(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)


def by_grouped_mm(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    "Dropless with the kernel that CUDA uses, put in place by the fixture below for the backward pass too."
    assert module.loop_over_experts is module.by_grouped_mm
    return layer(x)[0]


@pytest.fixture(autouse=True)
def kernel_of_cuda(request, monkeypatch):
    if 'way' in request.fixturenames and request.getfixturevalue('way') is by_grouped_mm:
        monkeypatch.setattr(module, 'loop_over_experts', module.by_grouped_mm)
        monkeypatch.setattr(module, 'outer_loop_over_experts', module.outer_by_grouped_mm)


WAYS = [by_one_hot, by_padding, dropless, by_grouped_mm, by_compiled, by_checkpointing]
CASES = {
    'plain': (BASE, 20),
    'biases': (replace(BASE, bias=True), 20),
    'swiglu': (replace(BASE, activation='swiglu'), 20),
    'gates over the chosen': (replace(BASE, norm_topk_prob=True, activation='gelu_tanh'), 20),
    'sigmoid': (replace(BASE, router='sigmoid', norm_topk_prob=True), 20),
    'one token': (BASE, 1),
    'one expert': (replace(BASE, n_experts=1, top_k=1), 9),
    'all experts': (replace(BASE, top_k=6), 7),
    'one choice': (replace(BASE, top_k=1), 13),
    'odd widths': (replace(BASE, n_embd=10, expert_width=7), 13),
    'fine-grained': (replace(BASE, n_experts=32, top_k=8, expert_width=4), 30),
}


def compared(way, layer: MoE, x: torch.Tensor, grad: torch.Tensor) -> float:
    "Worst difference of output and all gradients from the loop's."
    got = []
    for run in (by_loop, way):
        layer.zero_grad()
        leaf = x.detach().requires_grad_() if x.is_contiguous() else x.detach().clone().mT.requires_grad_()
        y = run(layer, leaf if x.is_contiguous() else leaf.mT)
        y.backward(grad.to(y.dtype))
        got.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*got):
        assert (a is None) == (b is None)
    return max((a - b).abs().max().item() for a, b in zip(*got) if a is not None)


@pytest.mark.parametrize('way', WAYS, ids=lambda f: f.__name__.removeprefix('by_'))
@pytest.mark.parametrize('case', CASES)
def test_every_way_is_the_loop(case, way):
    cfg, n = CASES[case]
    exact = way is not by_grouped_mm  # torch has no grouped_mm of float64
    layer = filled(MoE(cfg)).to(torch.float64 if exact else torch.float32).train()
    x = torch.randn(1, n, cfg.n_embd, dtype=layer.experts.c_fc.dtype)
    worst = compared(way, layer, x, torch.randn_like(x))
    assert worst < (1e-12 if exact else 2e-5)
    print(f'{case:22s} {way.__name__:16s} {worst:.1e}')


@pytest.mark.parametrize('way', WAYS, ids=lambda f: f.__name__.removeprefix('by_'))
def test_experts_without_a_token_have_gradients_of_zero(way):
    layer = filled(MoE(BASE)).train()
    with torch.no_grad():
        layer.router.score.weight[2:] = -layer.router.score.weight[:1].sign() * 9
    x = layer.router.score.weight[:1].detach().sign() * torch.rand(1, 11, 16)
    assert layer(x)[1].expert_ids.unique().tolist() == [0, 1]
    assert compared(way, layer, x, torch.ones_like(x)) < 2e-5
    used = layer.experts.c_fc.grad.abs().amax((1, 2)) > 0
    assert used.tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize('way', WAYS, ids=lambda f: f.__name__.removeprefix('by_'))
def test_strides_do_not_matter(way):
    layer = filled(MoE(BASE)).train()
    x = torch.randn(1, 16, 14).mT  # (1, 14, 16), not contiguous
    assert not x.is_contiguous()
    assert compared(way, layer, x, torch.randn(16).expand(1, 14, 16)) < 2e-5  # nor is the gradient


@pytest.mark.parametrize('way', WAYS, ids=lambda f: f.__name__.removeprefix('by_'))
def test_autocast_computes_in_bfloat16_and_stays_near(way):
    layer = filled(MoE(BASE)).train()
    x = torch.randn(1, 20, 16)
    want = by_loop(layer, x)
    with torch.autocast('cpu', torch.bfloat16):
        got = way(layer, x)
    assert (got - want).norm() < 0.02 * want.norm()
    if way is not by_one_hot:
        assert got.dtype == torch.bfloat16


ROUTERS = {
    'softmax': BASE,
    'softmax, chosen': replace(BASE, norm_topk_prob=True),
    'softmax, K=1': replace(BASE, top_k=1),
    'noisy': replace(BASE, router='noisy'),
    'sigmoid': replace(BASE, router='sigmoid'),
    'sigmoid, chosen': replace(BASE, router='sigmoid', norm_topk_prob=True),
    'sigmoid, K=1': replace(BASE, router='sigmoid', top_k=1),
    'jitter': replace(BASE, jitter=0.1),
    'bias': replace(BASE, balance='bias'),
    'expert choice': replace(BASE, router='expert_choice', capacity_factor=1.0, eval_capacity_factor=1.0),
    'hash': replace(BASE, router='hash', vocab_size=50),
}


@pytest.mark.parametrize('name', [name for name in ROUTERS if name != 'hash'])
def test_a_finite_difference_confirms_the_routers_gradient(name):
    layer = filled(MoE(ROUTERS[name])).double().train()
    x, up = torch.randn(1, 30, 16).double(), torch.randn(1, 30, 16).double()
    weight, direction = layer.router.score.weight, torch.randn(6, 16).double()

    def loss():
        torch.manual_seed(1)  # the same noise each time
        y, r = layer(x)
        return (y * up).sum(), r.expert_ids

    value, before = loss()
    slope = (torch.autograd.grad(value, weight)[0] * direction).sum()
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight += step * direction
        value, ids = loss()
        assert torch.equal(ids, before)  # no choice flipped on the way
        values.append(value)
        with torch.no_grad():
            weight -= step * direction
    assert slope.abs() > 1e-3
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ROUTERS)
def test_a_routing_keeps_its_promises(name):
    cfg = ROUTERS[name]
    router = filled(make_router(cfg)).eval()
    r = router(torch.randn(40, 16), torch.randint(50, (40,)))
    K = 6 if name == 'expert choice' else cfg.top_k
    assert r.logits.shape == r.probs.shape == (40, 6) and r.expert_ids.shape == r.gates.shape == (40, K)
    torch.testing.assert_close(r.probs.sum(-1), torch.ones(40))
    assert all(len(set(row)) == K for row in r.expert_ids.tolist())  # K different experts
    if name != 'hash':
        score = r.probs.gather(1, r.expert_ids)
        if r.assigned is not None:
            score = score + r.assigned  # taken ones first
        assert (score.diff() <= 0).all(), 'best first'
    if 'chosen' in name:
        torch.testing.assert_close(r.gates.sum(-1), torch.ones(40))


def test_sigmoid_by_hand():
    router = filled(make_router(replace(BASE, router='sigmoid', norm_topk_prob=True)))
    x = torch.randn(5, 16)
    for row, ids, gates in zip(x, *router(x)[2:4]):
        score = 1 / (1 + torch.exp(-router.score.weight @ row))
        best = sorted(range(6), key=lambda e: -score[e])[:2]
        assert ids.tolist() == best
        torch.testing.assert_close(gates, score[best] / score[best].sum())


@pytest.mark.parametrize('norm', [False, True])
def test_sigmoids_that_underflow_make_no_nan(norm):
    """Logits so low that every sigmoid is 0 in float32, for all experts or for those that a bias chooses.

    Gradients too.
    """
    logits = torch.tensor(
        [[0.5, 0.1, -0.3, 0.2], [-95.0] * 4, [-300.0, -200.0, -150.0, -120.0], [3.0, 3.0, -110.0, -110.0]],
        requires_grad=True,
    )
    for bias in (None, torch.tensor([0.0, 0.0, 5.0, 5.0])):
        r = topk_route(logits, 2, norm, 'sigmoid', bias)
        assert r.gates.isfinite().all() and r.probs.isfinite().all()
        torch.testing.assert_close(r.probs.sum(-1), torch.ones(4))
        if norm:
            torch.testing.assert_close(r.gates.sum(-1), torch.ones(4))
        cfg = replace(BASE, n_experts=4, router='sigmoid', norm_topk_prob=norm, balance='switch')
        loss = total_loss(torch.zeros(()), [r], cfg).total + r.gates.sum()
        assert torch.autograd.grad(loss, logits, retain_graph=True)[0].isfinite().all()
    exact = logits[:1].double().sigmoid()
    torch.testing.assert_close(r.probs[:1].double(), exact / exact.sum(), rtol=1e-6, atol=0)


def test_shares_are_those_of_the_decimal_number():
    """For every factor of two digits, as exact fractions have it: floating point alone gives one too few for
    hundreds of cases.
    """
    for hundredths in range(5, 305, 5):
        for n, E in itertools.product((10, 60, 100, 390, 12288), (2, 3, 5, 8, 10)):
            assert even_shares(hundredths / 100, n, E) == Fraction(hundredths, 100) * n // E


def test_muon_leaves_a_matrix_without_gradients_where_it_is():
    """An expert that gets no token any more: old momentum, orthogonalized, would move it at full speed for
    hundreds of steps.
    """
    torch.manual_seed(0)
    model = GPT(
        replace(BASE, block_size=8, vocab_size=11, n_layer=1, n_head=2, n_experts=4, top_k=1, moe_every=1)
    )
    optimizer = make_optimizer(model, TrainConfig(optimizer='muon', weight_decay=0.0, learning_rate=1e-2))
    w, frozen = model.h[0].mlp.experts.c_fc, model.h[0].attn.c_attn.weight.requires_grad_(False)
    for step in range(10):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 0.01 if p.requires_grad else None
        if step >= 5:
            w.grad[2] = 0
        before = w.detach().clone(), frozen.clone()
        optimizer.step()
        moved = (w.detach() - before[0]).flatten(1).norm(dim=1)
        assert (moved > 0).tolist() == [True, True, step < 5, True] and torch.equal(frozen, before[1])


def test_expert_choice_by_hand():
    cfg = replace(BASE, router='expert_choice', capacity_factor=1.5, eval_capacity_factor=1.0)
    layer = filled(MoE(cfg)).double().eval()
    x = torch.randn(1, 12, 16).double()
    y, r = layer(x)
    probs, want, taken = (
        (layer.router.score(x[0])).softmax(-1),
        torch.zeros(12, 16).double(),
        torch.zeros(12, 6),
    )
    for e in range(6):
        for n in sorted(range(12), key=lambda n: -probs[n, e])[:4]:  # 1.0 · K · N / E = 4 tokens each
            want[n] += probs[n, e] * one_expert(layer, e, x[0, n][None])[0]
            taken[n, e] = 1
    torch.testing.assert_close(y[0], want)
    assert torch.equal(torch.zeros(12, 6).scatter(1, r.expert_ids, r.assigned.float()), taken)
    assert layer.train()(x)[1].assigned.sum() == 6 * 6  # 1.5 · 4 in training


def test_hash_is_a_table_of_token_ids():
    router = make_router(ROUTERS['hash'])
    ids = torch.tensor([3, 7, 3])
    r = router(torch.randn(3, 16), ids)
    assert torch.equal(r.expert_ids[0], r.expert_ids[2]) and (r.gates == 0.5).all()
    counts = router.table.flatten().bincount(minlength=6)
    assert counts.sum() == 100 and not list(router.parameters())
    with pytest.raises(ValueError, match='token ids'):
        router(torch.randn(3, 16))


def test_jitter_is_for_training_only():
    router = filled(make_router(replace(BASE, jitter=0.1)))
    x = torch.randn(400, 16)
    assert torch.equal(router.eval()(x).logits, router.score(x))
    ratio = router.train()(torch.eye(16)).logits / router.score(torch.eye(16))  # one feature, one factor
    assert 0.9 <= ratio.min() < 0.95 and 1.05 < ratio.max() <= 1.1


def test_noise_is_for_training_only_and_its_size_is_learned():
    router = filled(make_router(replace(BASE, router='noisy')))
    x = torch.randn(50, 16)
    assert not torch.equal(router(x).logits, router(x).logits)
    router(x).gates.square().sum().backward()
    assert router.noise.weight.grad.abs().max() > 0
    assert torch.equal(router.eval()(x).logits, router.score(x))


def test_expert_choice_marks_what_was_taken_where_probabilities_round_to_1():
    even = dict(capacity_factor=1.0, eval_capacity_factor=1.0)
    router = make_router(ModelConfig(n_embd=2, n_experts=2, top_k=1, router='expert_choice', **even))
    with torch.no_grad():
        router.score.weight.copy_(30 * torch.eye(2))
    r = router(torch.tensor([[1.0, 0.0], [1.0, 0.05]]))  # both are sure of expert 0, which takes one
    assert r.probs[1, 0] == 1 and r.expert_ids.tolist() == [[0, 1], [1, 0]]
    assert r.assigned.tolist() == [[True, False]] * 2


def test_the_option_names_the_router():
    kinds = dict(softmax=TopKRouter, sigmoid=TopKRouter, expert_choice=ExpertChoiceRouter, hash=HashRouter)
    for name, kind in kinds.items():
        assert type(make_router(replace(BASE, router=name, vocab_size=9))) is kind


def test_a_bias_moves_the_choice_and_not_the_gate():
    cfg = replace(BASE, balance='bias', router='sigmoid')
    router = filled(make_router(cfg))
    x = torch.randn(40, 16)
    router.bias += torch.tensor([9.0, 0, 0, 0, 0, 0])
    r = router(x)
    assert (r.expert_ids[:, 0] == 0).all()
    torch.testing.assert_close(r.gates[:, 0], router.score(x).sigmoid()[:, 0])


def test_update_bias_by_hand():
    bias = torch.tensor([0.5, 0.0, 0.0])
    update_bias(bias, torch.tensor([9.0, 6.0, 3.0]), 0.01)
    torch.testing.assert_close(bias, torch.tensor([0.49, 0.0, 0.01]))


def test_sequence_balance_is_the_mean_over_rows():
    torch.manual_seed(0)
    router = filled(make_router(BASE))
    r = router(torch.randn(3 * 8, 16))
    rows = [balance_loss(Routing(*(t[i * 8 : i * 8 + 8] for t in r[:4]))) for i in range(3)]
    torch.testing.assert_close(sequence_balance_loss(r, 3), sum(rows) / 3)
    torch.testing.assert_close(sequence_balance_loss(r, 1), balance_loss(r))


def test_shared_experts_read_every_token():
    layer = filled(MoE(replace(BASE, n_shared_experts=2))).eval()
    x = torch.randn(1, 9, 16)
    routed = module.run_experts(layer.experts, x[0], layer.router(x[0]))
    torch.testing.assert_close(layer(x)[0][0], routed + layer.shared(x[0]))
    assert layer.shared.c_fc.weight.shape == (2 * 24, 16)


# ---- who changes whom

QUEUES = {
    'dropless': {},
    'queue per micro-batch': dict(capacity_over='micro_batch'),
    'queue per sequence': dict(capacity_over='sequence'),
    'per sequence, by token': dict(capacity_over='sequence', priority='token'),
    'per micro-batch, by gate': dict(priority='gate'),
}


def probe(layer: MoE, x: torch.Tensor, ids: torch.Tensor) -> tuple[int, int]:
    """(earlier positions of the row, positions of other rows) whose output changes when the last token of row
    0 does.
    """

    def run(x, ids):
        torch.manual_seed(0)
        return layer(x, ids)[0]

    with torch.no_grad():
        before = run(x, ids)
        other, new_ids = x.clone(), ids.clone()
        other[0, -1], new_ids[0, -1] = (
            torch.randn(x.size(-1), generator=torch.Generator().manual_seed(9)),
            49 - ids[0, -1],
        )
        changed = (run(other, new_ids) - before).abs().amax(-1) > 1e-6  # (B, T)
    return changed[0, :-1].sum().item(), changed[1:].sum().item()


def probes(cfg: ModelConfig, training: bool, tries: int = 12) -> tuple[int, int]:
    "Positions changed in all of some tries."
    layer, total = filled(MoE(cfg)).train(training), [0, 0]
    for i in range(tries):
        torch.manual_seed(i)
        x, ids = torch.randn(4, 16, 16) + torch.randn(16), torch.randint(50, (4, 16))
        for place, n in enumerate(probe(layer, x, ids)):
            total[place] += n
    return tuple(total)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('queue', QUEUES)
@pytest.mark.parametrize('router', ['softmax', 'sigmoid', 'hash', 'expert choice'])
def test_who_changes_whom(router, queue, training):
    factor = (
        {} if queue == 'dropless' else dict(capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1)
    )
    if router == 'expert choice' and queue not in ('dropless', 'queue per micro-batch'):
        pytest.skip('experts that choose fill no queue in order')
    cfg = replace(ROUTERS[router], **factor, **QUEUES[queue])
    earlier, others = probes(cfg, training)
    print(f'{router:14s} {queue:26s} {"training" if training else "evaluation":10s} {earlier:4d} {others:4d}')
    if router == 'expert choice':
        assert earlier and others
    elif queue == 'dropless':
        assert (earlier, others) == (0, 0)
    elif queue == 'queue per sequence':
        assert earlier and not others
    elif queue == 'per sequence, by token':
        assert (earlier, others) == (0, 0)
    else:
        assert others and (earlier or router == 'hash')  # all gates of a hash are equal: no one is pushed


def test_a_queue_by_gate_drops_the_smallest_gates():
    cfg = replace(BASE, top_k=1, n_experts=2, capacity_factor=0.5, min_capacity=1, priority='gate')
    layer = filled(MoE(cfg)).train()
    _, r = layer(torch.randn(1, 40, 16))
    for e in range(2):
        gates, kept = r.gates[:, 0][r.expert_ids[:, 0] == e], r.kept[:, 0][r.expert_ids[:, 0] == e]
        if not kept.all():
            assert gates[kept].min() >= gates[~kept].max()
    assert not r.kept.all()


# ---- what is logged, and what is refused


def test_health_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    r = Routing(
        logits,
        logits.softmax(-1),
        torch.tensor([[0], [0]]),
        torch.ones(2, 1),
        kept=torch.tensor([[True], [False]]),
    )
    h = health(step_stats(Losses(*torch.zeros(4)), (r,)), 2)
    p = logits[0].softmax(-1)
    assert (h.max_load, h.min_load, h.dead, h.drop_rate) == ([3.0], [0.0], [2], [0.5])
    assert h.margin == pytest.approx([(p[0] - p[1]).item()])
    assert h.entropy == pytest.approx([-(p * p.log()).sum().item()])
    assert h.logit_rms == pytest.approx([(5 / 3) ** 0.5])


REFUSED = {
    'expert choice without capacity': (
        dict(router='expert_choice'),
        'capacity_factor and eval_capacity_factor must be set',
    ),
    'one renormalized gate': (
        dict(top_k=1, norm_topk_prob=True),
        'norm_topk_prob must be False when top_k=1',
    ),
    'one renormalized sigmoid': (
        dict(top_k=1, norm_topk_prob=True, router='sigmoid'),
        'norm_topk_prob must be False when top_k=1',
    ),
    'balance of a hash': (
        dict(router='hash', balance='bias'),
        'balance must be none or switch with router=hash, got bias',
    ),
    "the original's balance of sigmoids": (
        dict(router='sigmoid', balance='nano_moe'),
        'with router=sigmoid, got nano_moe',
    ),
    'priority without a queue': (
        dict(priority='gate'),
        'priority must be choice where no capacity limits the experts',
    ),
    'queues per sequence without a queue': (
        dict(capacity_over='sequence'),
        'capacity_over must be micro_batch where',
    ),
    'chosen hash': (
        dict(router='hash', norm_topk_prob=True),
        'norm_topk_prob must be False with router=hash',
    ),
    'joint statistics that nothing reads': (
        dict(balance='nano_moe', balance_over='global'),
        'balance_over must be micro_batch with',
    ),
    'jittered hash': (dict(router='hash', jitter=0.1), 'jitter must be 0 with router=hash'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_combinations_that_cannot_be_trained_are_refused(case):
    options, sentence = REFUSED[case]
    cfg = replace(BASE, **options)
    check(cfg)  # it can be built
    with pytest.raises(BadInput) as e:
        check(cfg, TrainConfig())
    assert sentence in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(n_kv_head=5), 'n_head must be a multiple of n_kv_head=5, got 4'),
        (dict(jitter=1.0), 'jitter must be'),
        (dict(n_shared_experts=-1), 'n_shared_experts must be at least 0'),
        (dict(bias_rate=-1.0), 'bias_rate must be'),
        (
            dict(n_shared_experts=2, n_experts=1),
            'n_experts must be at least 2 with n_shared_experts=2, got 1',
        ),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(options, sentence):
    with pytest.raises(BadInput, match=sentence):
        check(ModelConfig(**options))


# ---- blocks with other parts

SMALL = ModelConfig(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32, n_experts=4, moe_every=1)
BLOCKS = {
    'rmsnorm': dict(norm='rmsnorm'),
    'qk_norm': dict(qk_norm=True),
    'two key heads': dict(n_kv_head=2),
    'one key head': dict(n_kv_head=1),
    'swiglu': dict(activation='swiglu'),
    'hash': dict(router='hash'),
    'shared': dict(n_shared_experts=1),
    'sigmoid, bias': dict(router='sigmoid', balance='bias'),
    'all at once': dict(
        norm='rmsnorm',
        qk_norm=True,
        n_kv_head=2,
        activation='swiglu',
        positions='rotary',
        n_shared_experts=1,
        router='sigmoid',
        balance_over='sequence',
        norm_topk_prob=True,
    ),
}


@pytest.mark.parametrize('case', BLOCKS)
def test_a_model_of_these_parts_is_causal_learns_and_counts_its_flops(case):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from nanomoe.attention import KVCache

    cfg = replace(SMALL, **BLOCKS[case])
    torch.manual_seed(0)
    model, idx = GPT(cfg), torch.randint(50, (2, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).losses.total.backward()
    if cfg.n_kv_head in (None, cfg.n_head):
        assert counter.get_total_flops() == flops_per_token(cfg) * idx.numel()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    whole, later = model(idx).logits, idx.clone()
    later[:, 10:] = 7
    torch.testing.assert_close(model(later).logits[:, :10], whole[:, :10])
    cache = [KVCache(16) for _ in model.h]
    steps = [model(idx[:, i : i + 1], cache=cache).logits for i in range(16)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_grouped_queries_are_repeated_keys():
    "With each key head copied to the query heads it serves, ordinary attention gives the same."
    from nanomoe.attention import CausalSelfAttention

    few, many = (CausalSelfAttention(replace(SMALL, n_kv_head=n)) for n in (2, 4))
    with torch.no_grad():
        q, k, v = few.c_attn.weight.split([32, 16, 16])
        copied = [w.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1) for w in (k, v)]
        many.c_attn.weight.copy_(torch.cat([q, *copied]))
        many.c_proj.load_state_dict(few.c_proj.state_dict())
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(few(x), many(x))


def test_norms_by_hand():
    from nanomoe.attention import CausalSelfAttention
    from nanomoe.model import make_norm

    x = torch.randn(5, 32) * 3 + 1
    norm = make_norm(replace(SMALL, norm='rmsnorm'))
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    attention, seen = CausalSelfAttention(replace(SMALL, qk_norm=True)), []
    attention.attend = lambda q, k, v, cache: seen.extend([q, k]) or v
    attention(torch.randn(2, 9, 32))
    for t in seen:
        torch.testing.assert_close(t.norm(dim=-1), torch.full((2, 4, 9), 8**0.5), atol=1e-2, rtol=1e-3)


def test_queues_that_cannot_be_full_are_no_queues():
    """With room for every token the layer takes the way without queues: the same output, gradients and
    choices, none dropped.
    """
    cfg = ModelConfig(
        n_embd=16, n_experts=4, top_k=2, capacity_factor=2.0, eval_capacity_factor=2.0, min_capacity=1
    )
    torch.manual_seed(0)
    layer, x = filled(MoE(cfg)), torch.randn(2, 6, 16)
    roomy, tight = (MoE(replace(cfg, capacity_factor=factor)) for factor in (2.0, 1.5))
    for other in (roomy, tight):
        other.load_state_dict(layer.state_dict())
    free = MoE(replace(cfg, capacity_factor=None))
    free.load_state_dict(layer.state_dict())
    (y, r), (wanted, s) = roomy(x), free(x)
    assert torch.equal(y, wanted) and r.kept is None and s.kept is None
    assert torch.equal(r.expert_ids, s.expert_ids) and tight(x)[1].kept is not None


def test_a_layer_on_its_own_is_drawn_as_a_model_is():
    cfg = ModelConfig(n_layer=8, n_embd=64, n_experts=4, n_shared_experts=1)
    layer = MoE(cfg)
    for p in layer.parameters():
        torch.nn.init.constant_(p, float('nan'))
    initialize(layer, cfg)
    for w in (layer.router.score.weight, layer.experts.c_fc, layer.shared.c_fc.weight):
        assert abs(w.std() / 0.02 - 1) < 0.1
    for w in (layer.experts.c_proj, layer.shared.c_proj.weight):
        assert abs(w.std() / (0.02 / 4) - 1) < 0.1  # √(2·8) = 4


@pytest.mark.parametrize(
    'change', [dict(), dict(balance_over='sequence'), dict(norm_topk_prob=True), dict(router='sigmoid')]
)
def test_padding_counts_in_no_loss(change):
    """What stands after the last target changes neither value nor gradient, and the losses are those of the
    rows without it.
    """
    cfg = ModelConfig(
        block_size=8,
        vocab_size=11,
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_experts=4,
        moe_every=1,
        aux_loss_weight=0.1,
        **change,
    )
    torch.manual_seed(0)
    model = GPT(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, y = torch.randint(11, (2, 4, 8))
    y[:, 5:] = -1

    def losses_and_gradients(x, y):
        model.zero_grad()
        losses = model(x, y, keep_logits=False).losses
        losses.total.backward()
        return [*losses, *(p.grad for p in model.parameters())]

    padded, other = x.clone(), x.clone()
    other[:, 5:] = torch.randint(11, (4, 3))
    torch.testing.assert_close(losses_and_gradients(padded, y), losses_and_gradients(other, y))
    cut = [t.contiguous() for t in (x[:, :5], y[:, :5])]
    whole, short = losses_and_gradients(padded, y), losses_and_gradients(*cut)
    torch.testing.assert_close(whole, short, rtol=1e-4, atol=1e-5)
    y[3] = -1  # a row of padding alone has no say either
    torch.testing.assert_close(
        losses_and_gradients(x, y), losses_and_gradients(x[:3], y[:3]), rtol=1e-4, atol=1e-5
    )
    empty = model(x, torch.full_like(y, -1)).losses
    assert empty.total == 0 and empty.balance_loss == 0


# ---- group-limited routing


@pytest.mark.parametrize('n_groups, top_groups, top_k', [(8, 4, 8), (4, 1, 3), (2, 2, 4), (16, 5, 5)])
def test_group_limited_routing_is_that_of_deepseek_v3(n_groups, top_groups, top_k):
    "Experts and gates equal those of the router in transformers, with a bias too."
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    torch.manual_seed(0)
    cfg = ModelConfig(
        n_embd=24,
        n_head=1,
        n_experts=32,
        top_k=top_k,
        router='sigmoid',
        norm_topk_prob=True,
        balance='bias',
        n_groups=n_groups,
        top_groups=top_groups,
    )
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=24,
            n_routed_experts=32,
            num_local_experts=32,
            num_experts_per_tok=top_k,
            n_group=n_groups,
            topk_group=top_groups,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        )
    )
    ours = TopKRouter(cfg)
    with torch.no_grad():
        theirs.weight.copy_(ours.score.weight.normal_())
        theirs.e_score_correction_bias.copy_(ours.bias.uniform_(-0.3, 0.3))
    x = torch.randn(500, 24)
    r = ours(x)
    _, gates, ids = theirs(x)
    order, same = ids.argsort(-1), r.expert_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), r.expert_ids.gather(1, same))
    torch.testing.assert_close(gates.gather(1, order), r.gates.gather(1, same))
    assert (r.expert_ids // (32 // n_groups)).sort(-1).values.diff(dim=-1).ne(0).sum(-1).max() < top_groups


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(n_groups=3, top_groups=1), 'n_experts must be a multiple of n_groups=3, got 8'),
        (dict(n_groups=4, top_groups=5), 'top_groups must be between 1 and n_groups=4, got 5'),
        (
            dict(n_groups=4, top_groups=1, top_k=3),
            'top_k must be at most the 2 experts of top_groups=1 groups, got 3',
        ),
        (dict(n_groups=0), 'n_groups must be at least 1, got 0'),
        (dict(n_groups=2, top_groups=1, router='hash'), 'top_groups must be None with router=hash, got 1'),
    ],
)
def test_groups_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(BadInput) as e:
        check(ModelConfig(**options), TrainConfig())
    assert sentence in str(e.value)
