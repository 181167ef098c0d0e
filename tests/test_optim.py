"""The optimizer's groups: which parameters a learning-rate multiplier moves."""

from dataclasses import replace

import pytest
import torch

from nanomoe.config import BadInput, ModelConfig, TrainConfig
from nanomoe.model import GPT
from nanomoe.optim import make_optimizer
from nanomoe.presets import PRESETS

MODEL, TRAIN = PRESETS['tiny']


def distances(**rates) -> dict[str, float]:
    "How far one step moves each kind of parameter, if all gradients are 1."
    torch.manual_seed(0)
    model = GPT(replace(MODEL, vocab_size=257))
    optimizer = make_optimizer(model, replace(TRAIN, device='cpu', weight_decay=0.0, **rates))
    start = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {
        g['kind']: (g['params'][0] - start[g['params'][0]]).abs().mean().item()
        for g in optimizer.param_groups
    }


@pytest.mark.parametrize(
    'option, kind',
    [('router_lr', 'router'), ('embed_lr', 'embedding'), ('expert_lr', 'expert'), (None, None)],
)
def test_a_multiplier_moves_its_own_kind_of_parameter(option, kind):
    usual, changed = distances(), distances(**{option: 2.0} if option else {})
    assert {k for k in usual if abs(changed[k] / usual[k] - 2) < 1e-3} == ({kind} if kind else set())


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_sizes_do_not_depend_on_the_width(optimizer):
    "A coordinate check from width 32 to 128 (lesson 27), and the same without scaling grows."

    def logits_after(width: int, base_width: int | None) -> float:
        cfg = ModelConfig(
            vocab_size=64,
            block_size=16,
            n_layer=2,
            n_head=width // 16,
            n_embd=width,
            n_experts=4,
            moe_every=1,
            expert_width=width,
            base_width=base_width,
        )
        torch.manual_seed(0)
        model = GPT(cfg)
        steps = make_optimizer(model, TrainConfig(optimizer=optimizer, learning_rate=0.01, weight_decay=0.0))
        ids = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            model(ids[:, :-1], ids[:, 1:]).losses.total.backward()
            steps.step()
            steps.zero_grad()
        return model(ids[:, :-1]).logits.detach().square().mean().sqrt().item()

    scaled, plain = (logits_after(128, base) / logits_after(32, base) for base in (32, None))
    assert 0.7 < scaled < 1.2 < 1.6 < plain


def test_decay_keeps_its_pace_where_rates_are_scaled():
    cfg = ModelConfig(
        vocab_size=64, n_layer=4, n_head=4, n_embd=64, n_experts=4, base_width=16, base_layers=2
    )
    for optimizer, matrix in (('adamw', 1 / 4), ('muon', 1 / 2)):
        steps = make_optimizer(GPT(cfg), TrainConfig(optimizer=optimizer, expert_lr=3.0, weight_decay=0.1))
        scales = {(g['kind'], round(g['lr_scale'], 6)) for g in steps.param_groups}
        assert {('expert', 3 * matrix), ('expert', 1.5 * matrix), ('matrix', matrix / 2)} <= scales
        for g in steps.param_groups:
            own = 3.0 if g['kind'] == 'expert' else 1.0
            assert g['kind'] == 'vector' or abs(g['weight_decay'] * g['lr_scale'] / own - 0.1) < 1e-9


def test_switch_init_is_not_scaled_twice():
    with pytest.raises(BadInput, match='init must be gpt2 with base_width=16, got switch'):
        GPT(ModelConfig(vocab_size=64, n_embd=64, n_head=4, base_width=16, init='switch'))
