"Changes that should touch one place, made here from outside: what they rely on stays as it is."

import json
from dataclasses import replace

import pytest
import torch

from nanomoe import checkpoint
from nanomoe.config import ModelConfig
from nanomoe.experts import MoE
from nanomoe.files import with_checksum
from nanomoe.losses import Losses, balance_loss
from nanomoe.metrics import health, step_stats
from nanomoe.presets import PRESETS
from nanomoe.router import TopKRouter
from nanomoe.train import train

# ---- a router with as many experts per token as it needs


class TopPRouter(TopKRouter):
    "The best experts until their probabilities sum to 0.6: K varies from token to token."

    def forward(self, x, ids=None):
        r = super().forward(x, ids)
        return r._replace(assigned=r.gates.cumsum(-1) - r.gates < 0.6)


def top_p_layer(**options) -> tuple[MoE, torch.Tensor]:
    cfg = ModelConfig(n_embd=16, n_head=1, n_experts=6, top_k=6, expert_width=24, min_capacity=1, **options)
    torch.manual_seed(0)
    layer = MoE(cfg)
    layer.router = TopPRouter(cfg)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer.double(), torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)


def by_loop(layer: MoE, x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    "Token by token: the experts until 0.6 is reached, those whose place was taken left out."
    w, rows = layer.experts, x.flatten(0, 1)
    probs = (rows @ layer.router.score.weight.T).softmax(-1)
    out = []
    for n, (row, p) in enumerate(zip(rows, probs)):
        total, y = 0.0, torch.zeros_like(row)
        for k, e in enumerate(p.argsort(descending=True).tolist()):
            if total >= 0.6:
                break
            total += p[e].item()
            if kept is None or kept[n, k]:
                y = y + p[e] * (torch.nn.functional.gelu(row @ w.c_fc[e]) @ w.c_proj[e])
        out.append(y)
    return torch.stack(out).view(x.shape)


def first_come(r, capacity: int) -> torch.Tensor:
    "Who is kept when each expert takes the first assignments that it is given, token by token."
    kept, taken = torch.zeros_like(r.assigned), [0] * 6
    for n, k in r.assigned.nonzero().tolist():
        e = r.expert_ids[n, k].item()
        kept[n, k] = taken[e] < capacity
        taken[e] += 1
    return kept


@pytest.mark.parametrize('factor', [None, 0.2], ids=['dropless', 'with a capacity'])
def test_a_router_with_a_varying_number_of_experts(factor):
    "Output, every gradient, load, drop rate and balance loss are right, though only the router is new."
    layer, x = top_p_layer(capacity_factor=factor, priority='token')
    y, r = layer(x)
    if factor:
        assert torch.equal(r.kept & r.assigned, first_come(r, 8))  # 0.2 even shares of 240
    wanted = by_loop(layer, x, r.kept)
    inputs = [x, *layer.parameters()]
    up = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, up, retain_graph=True), torch.autograd.grad(wanted, inputs, up)
    )
    per_token = r.assigned.sum(1)
    assert per_token.min() < per_token.max() < 6
    counts = torch.stack([(r.expert_ids[r.assigned] == e).sum() for e in range(6)])
    assert torch.equal(r.counts().long(), counts)
    dropped = 0 if factor is None else (r.assigned & ~r.kept).sum().item()
    h = health(step_stats(Losses(*torch.zeros(4)), (r,)), 40)
    assert (dropped > 0) == (factor is not None) and h.drop_rate[0] == pytest.approx(
        dropped / counts.sum().item()
    )
    share, mean = counts / counts.sum(), r.probs.mean(0)
    torch.testing.assert_close(balance_loss(r), 6 * (mean * share).sum())
    weight = layer.router.score.weight
    torch.testing.assert_close(
        torch.autograd.grad(balance_loss(r), weight, retain_graph=True),
        torch.autograd.grad(6 * (mean * share).sum(), weight),
    )


# ---- figures that an earlier or a later version does not have


@pytest.fixture
def tiny(tmp_path):
    model, run = PRESETS['tiny']
    run = replace(
        run, out_dir=str(tmp_path / 'run'), device='cpu', batch_size=2, gradient_accumulation_steps=1
    )
    return replace(model, n_embd=32, block_size=32), replace(
        run, max_iters=2, warmup_iters=0, eval_interval=2, eval_iters=1, log_interval=1, checkpoint_interval=2
    )


def test_a_run_without_a_field_of_the_log_is_resumed(tiny):
    """A checkpoint holds the newest record and the state of the spike detector by name.

    What is new has its default.
    """
    model, run = tiny
    list(train(model, run))
    path = checkpoint.steps(run.out_dir)[-1] / 'meta.json'
    meta = {key: value for key, value in json.loads(path.read_text()).items() if key != 'seal'}
    del meta['record']['bpb'], meta['record']['health'], meta['level']['spikes']
    meta['record']['of another version'] = 1
    path.write_text(json.dumps(with_checksum(meta)))
    records = list(train(model, replace(run, max_iters=4)))
    assert [r.step for r in records] == [3, 4] and records[-1].bpb and records[-1].health


def test_a_checkpoint_whose_record_has_no_names_is_refused(tiny):
    model, run = tiny
    list(train(model, run))
    path = checkpoint.steps(run.out_dir)[-1] / 'meta.json'
    meta = {key: value for key, value in json.loads(path.read_text()).items() if key != 'seal'}
    meta['record'] = [*meta['record'].values()]
    path.write_text(json.dumps(with_checksum(meta)))
    with pytest.raises(ValueError, match='an earlier version wrote it'):
        list(train(model, replace(run, max_iters=4)))


# ---- a learning rate of its own


def test_a_group_with_a_rate_of_its_own_is_trained_and_resumed(tiny):
    "Routers at rate 0 stay where they were drawn while all else learns, also after a resume."
    model, run = tiny
    start = None
    for until in (2, 4):
        list(train(model, replace(run, router_lr=0.0, weight_decay=0.0, max_iters=until)))
        weights = checkpoint.load_latest(run.out_dir).tensors['model']
        start = start or weights
        routers = [name for name in weights if '.router.' in name]
        assert routers and all(torch.equal(weights[name], start[name]) for name in routers)
    assert not torch.equal(weights['h.0.mlp.experts.c_fc'], start['h.0.mlp.experts.c_fc'])


# ---- another architecture of transformers


def test_an_architecture_of_ones_own_is_exported_and_loaded(tmp_path, monkeypatch):
    "One record more: a Llama whose attention and norms are ours, without the norms of queries and keys."
    from transformers import AutoModelForCausalLM

    from nanomoe import huggingface
    from nanomoe.config import TrainConfig, to_dict
    from nanomoe.huggingface import ARCHITECTURES, load_hf, qwen3_entries, qwen3_shape
    from nanomoe.model import GPT
    from nanomoe.pretrained import export_hf
    from nanomoe.tokenizer import make_tokenizer, save_tokenizer

    def without_qk_norm(config: dict) -> ModelConfig:
        return replace(qwen3_shape(config | {'model_type': 'qwen3'}), qk_norm=False)

    llama = ARCHITECTURES['qwen3']._replace(
        config='LlamaConfig',
        model='LlamaForCausalLM',
        meant=lambda cfg: cfg.n_experts == 1 and cfg.positions == 'rotary' and not cfg.qk_norm,
        fixed=dict(norm='rmsnorm', activation='swiglu', bias=False),
        entries=qwen3_entries,
        shape=without_qk_norm,
    )
    monkeypatch.setattr(huggingface, 'ARCHITECTURES', {'llama': llama} | ARCHITECTURES)
    cfg = ModelConfig(
        block_size=32,
        vocab_size=300,
        n_layer=2,
        n_head=2,
        n_embd=16,
        positions='rotary',
        norm='rmsnorm',
        activation='swiglu',
        n_experts=1,
        mlp_width=24,
    )
    torch.manual_seed(0)
    model = GPT(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    checkpoint.save(
        tmp_path / 'run', 1, {'model': model.state_dict()}, {'config': to_dict(cfg, TrainConfig())}
    )
    save_tokenizer(make_tokenizer('bytes', [], 0), tmp_path / 'run')
    assert export_hf(tmp_path / 'run', tmp_path / 'out') < 1e-4
    idx = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    assert type(theirs).__name__ == 'LlamaForCausalLM'
    torch.testing.assert_close(theirs(idx).logits, model(idx).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_hf(tmp_path / 'out').eval()(idx).logits, model(idx).logits)
