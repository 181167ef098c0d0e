"""GPU correctness tests; run on the CPU and, if available, on CUDA.

Results are compared with references that use neither the layer's sort nor its kernels, in float64 on the CPU.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

# cuBLAS reads it once, before the first product on CUDA
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint as recompute

from nanomoe import checkpoint, experts, train
from nanomoe.losses import Losses
from nanomoe.metrics import step_stats
from nanomoe.optim import lr_at, make_optimizer, newton_schulz
from nanomoe.attention import FixedKVCache, KVCache
from nanomoe.capacity import expert_capacity
from nanomoe.config import ModelConfig, TrainConfig
from nanomoe.presets import PRESETS
from nanomoe.data import prepare
from nanomoe.dataset import TokenDataset, all_sequences, training_batch
from nanomoe.experts import MoE
from nanomoe.losses import balance_loss
from nanomoe.model import GPT, chunked_cross_entropy
from nanomoe.parallel import Feed, DistContext
from nanomoe.router import Routing
from nanomoe.sample import generate

DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value
BASE = ModelConfig(n_embd=16, n_head=1, n_experts=6, top_k=2, expert_width=24, vocab_size=50)
QUEUES = replace(BASE, capacity_factor=0.8, min_capacity=1)
WAYS = {  # name -> (configuration, tokens in each of two rows)
    'dropless': (BASE, 24),
    'gates over the chosen': (replace(BASE, norm_topk_prob=True), 24),
    'biases': (replace(BASE, bias=True), 24),
    'swiglu with biases': (replace(BASE, activation='swiglu', bias=True), 24),
    'odd widths': (replace(BASE, n_embd=10, expert_width=7), 13),
    'fine-grained': (replace(BASE, n_experts=64, top_k=8, expert_width=4), 30),
    'one token a row': (BASE, 1),
    'all experts': (replace(BASE, top_k=6), 9),
    'shared expert': (replace(BASE, n_shared_experts=1), 24),
    'sigmoid with biased choice': (replace(BASE, router='sigmoid', norm_topk_prob=True, balance='bias'), 24),
    'hash': (replace(BASE, router='hash'), 24),
    'expert choice': (
        replace(BASE, router='expert_choice', capacity_factor=0.7, eval_capacity_factor=0.7),
        24,
    ),
    'queue by choice': (QUEUES, 24),
    'queue by token, a row each': (replace(QUEUES, priority='token', capacity_over='sequence'), 24),
    'queue by gate, with biases': (replace(QUEUES, priority='gate', bias=True), 24),
    'two experts get all': (BASE, 24),
    'recomputed': (BASE, 24),
}
ALSO_COMPILED = [
    'dropless',
    'swiglu with biases',
    'odd widths',
    'expert choice',
    'queue by choice',
    'two experts get all',
]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)  # 'cuda' without an index, as users write it


@pytest.fixture(scope='module')
def numbers(tmp_path_factory) -> Path:
    "A small prepared text."
    folder = tmp_path_factory.mktemp('data') / 'numbers'
    prepare('numbers', folder, tokenizer='bytes')
    return folder


@contextmanager
def without_waits(device: torch.device):
    "Raise on any host-device synchronization; on a CPU, by fake tensors."
    if device.type == 'cpu':
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
        return
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def made(way: str, device: torch.device) -> tuple[MoE, torch.Tensor, torch.Tensor]:
    """A layer with weights of N(0, 0.3²), tokens (2, T, C) and their ids.

    Freed memory is filled with NaN to expose uninitialized reads.
    """
    cfg, T = WAYS[way]
    torch.manual_seed(0)
    layer = MoE(cfg)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if cfg.balance == 'bias':
        layer.router.bias.normal_(std=0.3)
    x, ids = torch.randn(2, T, cfg.n_embd), torch.randint(50, (2, T))
    if way == 'two experts get all':
        with torch.no_grad():
            layer.router.score.weight[2:] = -layer.router.score.weight[:1].sign() * 9
        x = layer.router.score.weight[:1].detach().sign() * x.abs()
    junk = [torch.full((2**16,), math.nan, device=device) for _ in range(40)]
    del junk[:]
    return layer.to(device).train(), x.to(device), ids.to(device)


def expert_of(w: dict, e: int, x: torch.Tensor, activation: str, prefix: str = 'experts.') -> torch.Tensor:
    "Output (C,) of expert e for a row x (C,)."
    hidden = x @ w[prefix + 'c_fc'][e] + (w[prefix + 'fc_bias'][e, 0] if prefix + 'fc_bias' in w else 0)
    if activation == 'swiglu':
        hidden = F.silu(hidden[: len(hidden) // 2]) * hidden[len(hidden) // 2 :]
    else:
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return hidden @ w[prefix + 'c_proj'][e] + (
        w[prefix + 'proj_bias'][e, 0] if prefix + 'proj_bias' in w else 0
    )


def kept_of(cfg: ModelConfig, r: Routing, T: int) -> torch.Tensor:
    "Mask (N, K) of assignments within capacity, in priority order."
    N, K = r.expert_ids.shape
    shared = T if cfg.capacity_over == 'sequence' else N
    capacity = expert_capacity(shared, cfg.n_experts, K, cfg.capacity_factor, cfg.min_capacity)
    first = {
        'choice': lambda n, k: (k, n),
        'token': lambda n, k: (n, k),
        'gate': lambda n, k: (-r.gates[n, k].item(), n, k),
    }
    seen, kept = {}, torch.zeros(N, K, dtype=torch.bool)
    for n, k in sorted(((n, k) for n in range(N) for k in range(K)), key=lambda c: first[cfg.priority](*c)):
        queue = r.expert_ids[n, k].item(), n // shared
        kept[n, k] = seen.get(queue, 0) < capacity
        seen[queue] = seen.get(queue, 0) + 1
    return kept


def by_loop(layer: MoE, x: torch.Tensor, r: Routing, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of x and every parameter, token by token in float64, for the experts that `r`
    names.
    """
    cfg, w = layer.cfg, {n: p.detach().double().cpu().requires_grad_() for n, p in layer.named_parameters()}
    r, x = (
        Routing(*(t if t is None else t.detach().cpu() for t in r)),
        x.detach().double().cpu().requires_grad_(),
    )
    rows = x.flatten(0, 1)
    N, K = r.expert_ids.shape
    if cfg.router == 'hash':
        gates = torch.full((N, K), 1 / K, dtype=torch.float64)
    else:
        logits = rows @ w['router.score.weight'].T
        scores = logits.sigmoid() if cfg.router == 'sigmoid' else logits.softmax(-1)
        best = scores if cfg.balance != 'bias' else scores + layer.router.bias.cpu()
        if cfg.router != 'expert_choice':
            assert torch.equal(best.topk(K).indices.sort(-1).values, r.expert_ids.sort(-1).values)
        gates = scores.gather(-1, r.expert_ids)
        if cfg.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
    if cfg.router == 'expert_choice':
        S = max(int(cfg.capacity_factor * cfg.top_k * N / cfg.n_experts), 1)
        taken = {(n, e) for e in range(cfg.n_experts) for n in scores[:, e].topk(S).indices.tolist()}
        kept = torch.tensor([[(n, e) in taken for e in ids] for n, ids in enumerate(r.expert_ids.tolist())])
    else:
        kept = kept_of(cfg, r, x.size(1)) if cfg.capacity_factor else torch.ones(N, K, dtype=torch.bool)
    assert r.kept is None or torch.equal(kept, r.kept)
    zero = rows[0] * 0
    y = torch.stack(
        [
            sum(
                (
                    gates[n, k] * expert_of(w, r.expert_ids[n, k], rows[n], cfg.activation)
                    for k in range(K)
                    if kept[n, k]
                ),
                zero,
            )
            for n in range(N)
        ]
    )
    if layer.shared:
        y = y + F.gelu(rows @ w['shared.c_fc.weight'].T) @ w['shared.c_proj.weight'].T
    y = y.view(x.shape)
    y.backward(grad.double().cpu())
    return [y, x.grad, *(p.grad for p in w.values())]


CASES = [(way, dtype, False) for way in WAYS for dtype in BOUND]
CASES += [(way, torch.bfloat16, True) for way in ALSO_COMPILED]


@pytest.mark.parametrize('way, dtype, compiled', CASES, ids=lambda v: str(v).removeprefix('torch.'))
def test_every_way_of_routing_is_a_loop_over_tokens(device, way, dtype, compiled):
    layer, x, ids = made(way, device)
    x.requires_grad_()
    run = lambda x: layer(x, ids)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend='inductor' if device.type == 'cuda' else 'aot_eager')
    if way == 'recomputed':
        run = lambda x: recompute(lambda x: layer(x, ids), x, use_reentrant=False)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, r = run(x)
    assert y.dtype == dtype
    if way == 'two experts get all':
        assert r.expert_ids.unique().tolist() == [0, 1]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    y.backward(grad.to(dtype))
    got = [y, x.grad, *(p.grad for p in layer.parameters())]
    for name, a, b in zip(
        ['y', 'x', *dict(layer.named_parameters())], got, by_loop(layer, x, r, grad), strict=True
    ):
        if b is None:
            b = torch.zeros_like(a, dtype=torch.float64, device='cpu') if a is not None else None
        if b is None:
            continue
        a = torch.zeros_like(b) if a is None else a.detach().double().cpu()
        worst = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-3)
        assert worst <= BOUND[dtype], f'{name}: off by {worst:.1e} of its largest value'


@pytest.mark.parametrize('way', WAYS)
def test_a_layer_never_waits_for_the_device(device, way):
    "Forward, backward and statistics of a layer in bfloat16, where the experts' products are one kernel."
    layer, x, ids = made(way, device)
    if device.type == 'cuda' and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip('torch loops over experts here')
    with without_waits(device):
        if device.type == 'cpu':
            x = torch.randn(x.shape)
        with torch.autocast(device.type, torch.bfloat16):
            y, r = layer(x, ids)
        y.sum().backward()
        step_stats(Losses(*x.new_zeros(4)), (r,))


def test_a_wait_is_noticed(device):
    with pytest.raises(Exception), without_waits(device):
        (torch.ones(3, device=device) + 1).sum().item()


def small(preset: str, **changes) -> ModelConfig:
    "A tiny version of the preset."
    cfg = PRESETS[preset][0]
    experts = dict(n_kv_head=1, n_experts=8, top_k=2, expert_width=24) if preset == 'modern' else {}
    return replace(
        cfg, **dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257) | experts | changes
    )


@pytest.mark.parametrize('preset', ['nano_moe', 'modern', 'gpt2'])
def test_no_tensor_is_made_on_another_device(preset, monkeypatch):
    "With fake tensors on `meta`, a tensor from elsewhere raises, as on a GPU."
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *args: False)
    with torch.device('meta'):
        model = GPT(
            small(
                preset, bias=preset == 'gpt2', n_experts=8, balance='bias' if preset == 'gpt2' else 'switch'
            )
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device='meta'))
            for name, t in module._buffers.items():
                if t is not None:
                    module._buffers[name] = torch.empty(t.shape, device='meta')
        x = torch.zeros(2, 32, dtype=torch.long, device='meta')
        out = model(x, x, keep_logits=False)
        out.losses.total.backward()
        assert step_stats(out.losses, out.routings).pack().is_meta and all(
            p.grad.is_meta for p in model.parameters()
        )
        make_optimizer(model, TrainConfig(optimizer='muon')).step()
        model.eval()
        with torch.no_grad():
            for cache in (KVCache, lambda size: FixedKVCache(size, x.device)):
                caches = [cache(32) for _ in model.h]
                for piece in (x[:, :5], x[:, 5:6]):
                    assert model.hidden(piece, caches)[0].is_meta


@pytest.mark.parametrize('preset', ['nano_moe', 'modern', 'gpt2'])
def test_a_model_is_the_same_on_every_device(device, preset):
    "Loss and every gradient against the CPU's, computed from full logits with torch's cross-entropy."
    torch.manual_seed(0)
    model = GPT(small(preset, bias=preset == 'gpt2'))
    x = torch.randint(257, (4, 32))
    y = x.roll(-1, 1)
    y[:, -1] = -1
    whole = model(x, y)
    whole.losses.total.backward()
    want = [whole.losses.ce.detach(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    model.to(device)
    out = model(x.to(device), y.to(device), keep_logits=False)
    out.losses.total.backward()
    for a, b in zip([out.losses.ce.detach(), *(p.grad for p in model.parameters())], want):
        assert (a.cpu() - b).abs().max() <= 1e-4 * max(b.abs().max().item(), 1e-3)
    with torch.autocast(device.type, torch.bfloat16):
        low = model(x.to(device), y.to(device), keep_logits=False)
    assert abs(low.losses.ce.item() - want[0].item()) < 0.03


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_loss_is_cross_entropy(device, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(70, 16), torch.randn(101, 16)
    y = torch.randint(-1, 101, (70,))
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    want = F.cross_entropy(leaves[0] @ leaves[1].T, y, ignore_index=-1)
    want.backward()
    here = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
    loss = chunked_cross_entropy(*here, y.to(device), chunk=32)
    loss.backward()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss.item() - want.item()) < bound * want.item()
    for a, b in zip(here, leaves):
        assert (a.grad.double().cpu() - b.grad).abs().max() < bound * b.grad.abs().max()


def settings(folder: Path, numbers: Path, device: torch.device, **changes) -> TrainConfig:
    usual = dict(
        dataset=str(numbers),
        max_iters=20,
        batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        min_lr=3e-4,
        warmup_iters=5,
        eval_interval=20,
        eval_iters=2,
        log_interval=1,
        checkpoint_interval=20,
        dtype='float32',
        compile=False,
        device=device.type,
    )
    return TrainConfig(out_dir=str(folder), **usual | changes)


def losses(cfg: ModelConfig, settings: TrainConfig) -> list[float]:
    "Loss and gradient norm of each step."
    return [x for r in train.train(cfg, settings) for x in (r.ce, r.grad_norm)]


def plain_losses(cfg: ModelConfig, s: TrainConfig) -> list[float]:
    "The same from a few lines on the CPU: AdamW of torch, no thread, no scaler, logits kept."
    data = TokenDataset(s.dataset, 'train')
    torch.manual_seed(s.seed)
    model = GPT(cfg)
    params = dict(model.named_parameters())
    decayed = {n for n, p in params.items() if p.dim() >= 2 and not n.endswith('bias')}
    optimizer = torch.optim.AdamW(
        [
            {'params': [params[n] for n in params if n in decayed], 'weight_decay': s.weight_decay},
            {'params': [params[n] for n in params if n not in decayed], 'weight_decay': 0.0},
        ],
        betas=(s.beta1, s.beta2),
    )
    found = []
    for step in range(s.max_iters):
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, s)
        numbers = range(step * s.gradient_accumulation_steps, (step + 1) * s.gradient_accumulation_steps)
        outs = [
            model(*training_batch(data, n * s.batch_size, s.batch_size, cfg.block_size, s.seed))
            for n in numbers
        ]
        total = torch.stack([out.losses.total for out in outs]).mean()
        if cfg.balance_over == 'global':  # of the union of the step's micro-batches
            for layer in zip(*(out.routings for out in outs)):
                union = Routing(*(torch.cat(part) for part in zip(*(r[:4] for r in layer))))
                apart = torch.stack([balance_loss(r) for r in layer]).mean()
                total = total + cfg.aux_loss_weight * (balance_loss(union) - apart)
        total.backward()
        found += [
            sum(out.losses.ce.item() for out in outs) / len(outs),
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip).item(),
        ]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize('preset', ['nano_moe', 'modern'])
def test_twenty_steps_are_those_of_a_plain_loop(device, preset, numbers, tmp_path):
    cfg, run = small(preset), settings(tmp_path, numbers, device)
    assert losses(cfg, run) == pytest.approx(plain_losses(cfg, run), rel=1e-4)


COMPILER = shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')


@pytest.mark.skipif(not COMPILER, reason='torch.compile needs a C++ compiler')
@pytest.mark.parametrize('preset', ['nano_moe', 'modern'])
def test_a_compiled_run_is_the_eager_one(device, preset, numbers, tmp_path):
    """A graph for the model with losses, one for statistics, and one for `modern`, which counts ahead.

    No breaks, no recompilation.
    """
    torch._dynamo.reset()
    counters.clear()
    cfg, run = small(preset), settings(tmp_path / 'eager', numbers, device, max_iters=4)
    eager = losses(cfg, run)
    assert not counters['frames']
    compiled = losses(cfg, replace(run, out_dir=str(tmp_path / 'compiled'), compile=True))
    assert compiled == pytest.approx(eager, rel=1e-5)
    n = 2 + (cfg.balance_over == 'global')
    assert dict(counters['graph_break']) == {} and counters['frames'] == {'total': n, 'ok': n}
    assert counters['stats']['unique_graphs'] == n


TWO_PROCESSES = """
import gc, json, os, sys, torch
from torch._dynamo.utils import counters
from nanomoe.config import ModelConfig, TrainConfig
from nanomoe.model import GPT
from nanomoe.optim import make_optimizer
from nanomoe.parallel import process_group, no_sync, wrap_ddp

def gradients(cfg, world, x, y, compiled):
    "Of a step of three micro-batches, after one other step."
    torch.manual_seed(0)
    model = GPT(cfg).to(world.device)
    if compiled: model.compile()
    shared, optimizer = wrap_ddp(model, world), make_optimizer(model, TrainConfig(learning_rate=6e-4))
    for step in range(2):
        for i in range(3):
            with no_sync(shared, i == 2): shared(x[i], y[i], keep_logits=False).losses.total.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    del shared
    gc.collect()
    return grads

with process_group(sys.argv[1]) as world:
    cfg = ModelConfig(**json.loads(sys.argv[2]))
    torch.manual_seed(1 + world.rank)
    x, y = torch.randint(cfg.vocab_size, (2, 3, 2, cfg.block_size)).to(world.device)
    eager, compiled = gradients(cfg, world, x, y, False), gradients(cfg, world, x, y, True)
    worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(compiled, eager))
    with open(f'{sys.argv[3]}.{world.rank}', 'w') as f:
        total = sum(g.double().sum().item() for g in compiled)
        json.dump(dict(worst=worst, breaks=counters['graph_break'], sum=total), f)
"""


@pytest.mark.skipif(not COMPILER, reason='torch.compile needs a C++ compiler')
def test_a_compiled_step_of_two_processes_is_the_eager_one(device, tmp_path):
    """With the load summed over processes inside the graph, and more weights than DDP's first bucket holds,
    so that it is split.
    """
    if device.type == 'cuda' and torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    (tmp_path / 'program.py').write_text(TWO_PROCESSES)
    cfg = small('modern', n_embd=256, balance_over='global')
    assert 4 * sum(p.numel() for p in GPT(cfg).parameters()) > 2 * 2**20
    words = [tmp_path / 'program.py', device.type, json.dumps(asdict(cfg)), tmp_path / 'found']
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *words],
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[1])},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f'found.{rank}').read_text()) for rank in (0, 1))
    assert first['sum'] == second['sum'] and max(first['worst'], second['worst']) < 1e-4
    assert first['breaks'] == second['breaks'] == {}


@pytest.mark.parametrize('deterministic', [False, True], ids=['default', 'deterministic'])
def test_a_resumed_run_is_the_whole_one(device, deterministic, numbers, tmp_path):
    "Bit for bit: on a CPU always, on a GPU with deterministic algorithms; without them to rounding."
    cfg = small('nano_moe', dropout=0.1)
    run = settings(
        tmp_path / 'whole',
        numbers,
        device,
        max_iters=12,
        checkpoint_interval=6,
        eval_interval=12,
        keep_checkpoints=9,
        deterministic=deterministic,
    )
    list(train.train(cfg, run))
    shutil.copytree(
        tmp_path / 'whole',
        tmp_path / 'cut',
        ignore=shutil.ignore_patterns('step-00000012', 'log.jsonl', '.lock'),
    )
    (tmp_path / 'cut' / '.lock').touch()
    resumed = list(train.train(cfg, replace(run, out_dir=str(tmp_path / 'cut'))))
    assert resumed[-1].step == 12 and len(resumed) <= 7
    a, b = (checkpoint.load_latest(tmp_path / name).tensors for name in ('whole', 'cut'))
    exact = device.type == 'cpu' or deterministic
    for group in a:
        for name in a[group]:
            assert (
                torch.equal(a[group][name], b[group][name])
                if exact
                else torch.allclose(a[group][name], b[group][name], atol=1e-4)
            )


def test_float16_is_scaled_and_an_overflow_is_skipped(device, numbers, tmp_path, monkeypatch):
    "Twenty steps near float32's; then gradients that are too large: no weight moves, the scale halves."
    # a CPU refuses it as too slow
    monkeypatch.setattr(train, 'find_dtype', lambda name, device: torch.float16)
    for optimizer in ('adamw', 'muon'):
        cfg, run = small('modern'), settings(tmp_path / optimizer, numbers, device, optimizer=optimizer)
        trainer = train.Trainer(cfg, run, DistContext(device=device))
        got = [trainer.train_step()[0][0].item() / 2 for _ in range(20)]
        if optimizer == 'adamw':
            assert got == pytest.approx(plain_losses(cfg, run)[::2], rel=2e-2)
        assert trainer.scaler.is_enabled() and trainer.skipped == 0 and got[-1] < got[0]
        scale, before = trainer.scaler.get_scale(), [p.detach().clone() for p in trainer.model.parameters()]
        for value in (math.inf, 1e30):  # the second: finite, but its norm is not
            hook = trainer.model.wte.weight.register_hook(lambda g: torch.full_like(g, value))
            trainer.train_step()
            hook.remove()
        assert trainer.skipped == 2 and all(map(torch.equal, before, trainer.model.parameters()))
        assert trainer.scaler.get_scale() == scale / 2
        trainer.train_step()
        assert trainer.skipped == 2 and not all(map(torch.equal, before, trainer.model.parameters()))


def test_an_update_waits_for_the_device_once(device, numbers, tmp_path, monkeypatch):
    "One device-to-host copy per step, for any number of micro-batches."
    if device.type == 'cuda' and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip('torch loops over experts here')
    cfg = small('nano_moe', balance='bias', norm_topk_prob=False)
    trainer = train.Trainer(
        cfg,
        settings(tmp_path, numbers, device, gradient_accumulation_steps=5, dtype='bfloat16'),
        DistContext(device=device),
    )
    trainer.train_step()
    copies, real = [], torch.Tensor.cpu

    def cpu(self):
        copies.append(self.shape)
        if device.type == 'cpu':
            return real(self)
        torch.cuda.set_sync_debug_mode('default')
        try:
            return real(self)
        finally:
            torch.cuda.set_sync_debug_mode('error')

    monkeypatch.setattr(torch.Tensor, 'cpu', cpu)

    def refuse(self, *args):
        raise AssertionError('unexpected host synchronization')

    if device.type == 'cuda':
        torch.cuda.set_sync_debug_mode('error')
    else:
        for name in ('item', '__bool__', '__int__', '__float__', 'numpy'):
            kind = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor,
                name,
                lambda self, *args, kind=kind: kind(self, *args) if copies else refuse(self),
            )
    try:
        trainer.train_step()
    finally:
        torch.cuda.is_available() and torch.cuda.set_sync_debug_mode('default')
    assert len(copies) == 1


def test_batches_arrive_as_they_are_read(device, numbers):
    "Every sample of a run, in order, out of order, and across many files."
    data = TokenDataset(numbers, 'train')

    def read(n):
        return training_batch(data, 3 * n, 3, 64, seed=5)

    want = [read(n) for n in range(12)]
    data.shards = [data.shards[0][a : a + 1000] for a in range(0, len(data), 1000)]
    data.starts = torch.tensor([0] + [len(s) for s in data.shards]).cumsum(0).numpy()
    feed = Feed(read, device, stride=2)
    for n in (0, 2, 4, 6, 1, 3, 11):
        for a, b in zip(feed[n], want[n], strict=True):
            assert a.device.type == device.type and torch.equal(a.cpu(), b)


def test_evaluation_is_the_same_on_every_device(device, numbers):
    torch.manual_seed(0)
    model, data = GPT(small('nano_moe')), TokenDataset(numbers, 'val')
    starts = all_sequences(data, 32)[:50]
    off = torch.autocast('cpu', enabled=False)
    with torch.no_grad():
        model.eval()
        nats = [
            F.cross_entropy(model(x[None])[0][0], y, reduction='sum').item()
            for x, y in (
                (torch.from_numpy(data.read(s, s + 32)), torch.from_numpy(data.read(s + 1, s + 33)))
                for s in starts.tolist()
            )
        ]
    found = train.evaluate(model.to(device), data, starts, 4, off, DistContext(device=device))
    assert found['val_tokens'] == 50 * 32
    assert train.evaluate(model, data, starts, 50, off, DistContext(device=device))[
        'val_ce'
    ] == pytest.approx(found['val_ce'], rel=1e-3)
    # queues of one row, as in `nats`
    alone = train.evaluate(model, data, starts, 1, off, DistContext(device=device))
    assert alone['val_ce'] == pytest.approx(sum(nats) / (50 * 32), rel=1e-5)


@pytest.mark.parametrize('preset', ['nano_moe', 'modern'])
def test_the_cache_writes_what_rereading_writes(device, preset):
    torch.manual_seed(0)
    model = GPT(small(preset, eval_capacity_factor=None)).to(device).eval()
    start = torch.randint(257, (3, 5), device=device)
    texts = [
        torch.stack([s.ids for s in generate(model, start, 20, temperature=0, use_cache=cached)])
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    with torch.no_grad():
        logits = model.cpu()(torch.cat([start.cpu(), texts[0].T.cpu()], 1)[:, :-1]).logits[:, 4:]
    chosen = logits.gather(-1, texts[0].T.cpu().unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 1e-4  # the CPU's best, but for ties


@pytest.mark.skipif(not COMPILER, reason='torch.compile needs a C++ compiler')
@pytest.mark.parametrize('preset', ['nano_moe', 'modern'])
def test_compiled_sampling_writes_the_same(device, preset):
    "One graph for every step of one token, without a break; past the block the window is read anew, eagerly."
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = GPT(small(preset, eval_capacity_factor=None)).to(device).eval()
    start = torch.randint(257, (2, 5), device=device)
    texts = [[*generate(model, start, 32, temperature=0, compile=compiled)] for compiled in (False, True)]
    for a, b in zip(*texts, strict=True):
        assert torch.equal(a.ids, b.ids)
        for r, s in zip(a.routings, b.routings, strict=True):
            assert torch.equal(r.expert_ids, s.expert_ids)
    assert dict(counters['graph_break']) == {} and counters['stats']['unique_graphs'] == 1


def test_orthogonalized_matrices_are(device):
    m = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0)).to(device)
    made = newton_schulz(m)
    assert made.dtype == m.dtype
    values = torch.linalg.svdvals(made.cpu())
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(m.cpu(), full_matrices=False)
    assert (
        (made.cpu() * (u @ v)).sum((1, 2)) / made.cpu().norm(dim=(1, 2)) / 24**0.5
    ).min() > 0.97  # the same directions


@pytest.mark.parametrize('rows', [3, 6, 40])
@pytest.mark.parametrize('widths', [(16, 24), (10, 7)])
def test_the_kernel_of_a_gpu_is_products_one_by_one(device, rows, widths):
    "Few rows, as in sampling, and many; widths that are no multiple of 8."
    torch.manual_seed(0)
    x, w = torch.randn(rows, widths[0], device=device), torch.randn(6, *widths, device=device)
    offsets = torch.tensor([1, 1, 2, 3, 3, rows], dtype=torch.int32, device=device)
    expert = [0, 2, 3] + [5] * (rows - 3)
    want = torch.stack([x[i] @ w[e] for i, e in enumerate(expert)])
    torch.testing.assert_close(experts.by_grouped_mm(x, w, offsets), want, rtol=1e-5, atol=1e-5)
    y = torch.randn(rows, widths[1], device=device)
    outer = torch.stack(
        [sum((torch.outer(x[i], y[i]) for i in range(rows) if expert[i] == e), w[0] * 0) for e in range(6)]
    )
    torch.testing.assert_close(experts.outer_by_grouped_mm(x, y, offsets), outer, rtol=1e-5, atol=1e-5)
