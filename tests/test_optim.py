"""The optimizer's groups: which parameters a learning-rate multiplier moves."""

from dataclasses import replace

import pytest
import torch

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
