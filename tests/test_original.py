"""The preset `nano_moe`'s code path against numbers the original made (tests/fixtures; random weights)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomoe.config import ModelConfig, TrainConfig
from nanomoe.presets import PRESETS
from nanomoe.model import GPT, n_params
from nanomoe.pretrained import from_nanomoe, nanomoe_config
from nanomoe.optim import make_optimizer

FIXTURES = sorted((Path(__file__).parent / 'fixtures').glob('*.npz'))
TOLERANCE = 1e-5


class Original:
    "One fixture: the original's weights, batch and numbers, and the model we make of them."

    def __init__(self, path: Path):
        self.numbers = {name: value for name, value in np.load(path, allow_pickle=False).items()}
        self.config = json.loads(str(self.numbers['config']))
        self.x, self.y = self['idx'], self['targets']

    def __getitem__(self, name):
        return torch.from_numpy(np.asarray(self.numbers[name]))

    def model(self) -> GPT:
        weights = {name[2:]: self[name] for name in self.numbers if name.startswith('w/')}
        return from_nanomoe(weights, self.config)

    def gradients(self) -> dict[str, torch.Tensor]:
        ours = lambda name: (
            name.removeprefix('g/transformer.').removeprefix('g/').replace('router.w_g', 'router.score')
        )
        return {ours(name): self[name] for name in self.numbers if name.startswith('g/')}


@pytest.fixture(params=FIXTURES, ids=lambda p: p.stem)
def original(request):
    return Original(request.param)


def worst(a, b) -> float:
    return (torch.as_tensor(a).detach().double() - torch.as_tensor(b).double()).abs().max().item()


@pytest.mark.parametrize('keep_logits', [True, False])
def test_training_forward_and_every_gradient(original, keep_logits):
    model = original.model().train()
    out = model(original.x, original.y, keep_logits=keep_logits)
    out.losses.total.backward()
    found = dict(model.named_parameters())
    differences = {
        'total': worst(out.losses.total, original['train/loss']),
        'ce': worst(out.losses.ce, original['train/ce']),
        'balance': worst(out.losses.balance_loss, original['train/aux'].mean()),
        'z': worst(out.losses.z_loss, original['train/z'].mean()),
        'gradients': max(worst(found[name].grad, grad) for name, grad in original.gradients().items()),
    }
    if keep_logits:
        differences['logits'] = worst(out.logits, original['train/logits'])
    print({name: f'{d:.1e}' for name, d in differences.items()})
    assert original.gradients().keys() == found.keys()
    assert max(differences.values()) < TOLERANCE


def test_used_capacity(original):
    out = original.model().train()(original.x, original.y)
    used = [r.expert_ids[r.kept].bincount(minlength=r.probs.size(1)) for r in out.routings]
    assert torch.equal(torch.stack(used).long(), original['train/used_capacity'])


def test_evaluation_forward(original):
    out = original.model().eval()(original.x, original.y)
    assert worst(out.logits, original['eval/logits']) < TOLERANCE
    assert worst(out.losses.ce, original['eval/ce']) < TOLERANCE
    assert worst(out.losses.total, original['eval/loss']) < TOLERANCE


def test_ten_optimizer_steps(original):
    model = original.model().train()
    run = TrainConfig(learning_rate=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    optimizer = make_optimizer(model, run)
    losses = []
    for _ in range(10):
        loss = model(original.x, original.y, keep_logits=False).losses.total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    print(f'steps: {worst(losses, original["steps/loss"]):.1e}')
    assert worst(losses, original['steps/loss']) < TOLERANCE


def test_preset_is_the_published_run():
    cfg, _ = PRESETS['nano_moe']
    published = dict(
        block_size=1024,
        vocab_size=50304,
        n_layer=6,
        n_head=6,
        n_embd=384,
        dropout=0.0,
        bias=False,
        n_exp=8,
        top_k=2,
        use_aux_loss=True,
        aux_loss_weight=0.01,
        use_router_z_loss=True,
        router_z_loss_weight=0.001,
        use_noisy_top_k=False,
        train_capacity=1.25,
        eval_capacity=2.0,
        min_capacity=4,
        stride=2,
        use_switch_tfm_init=True,
        switch_tfm_init_scale=1.0,
        router_use_full_prec=True,
    )
    assert cfg == nanomoe_config(published)
    with torch.device('meta'):
        assert n_params(GPT(cfg)) == (55_113_600, 33_879_936)
        assert n_params(GPT(PRESETS['nano_moe_dense'][0])) == (30_331_776, 30_331_776)


def test_a_model_without_its_weights_differs(original):
    "The comparison can fail: one row of one expert nudged by a thousandth shows."
    model = original.model().train()
    with torch.no_grad():
        model.h[0].mlp.experts.c_fc[0, 0] += 1e-3
    assert worst(model(original.x, original.y).logits, original['train/logits']) > TOLERANCE


def test_renormalized_single_choice_builds_but_has_no_gradient():
    cfg = ModelConfig(
        block_size=8,
        vocab_size=16,
        n_layer=1,
        n_head=1,
        n_embd=8,
        n_experts=4,
        top_k=1,
        norm_topk_prob=True,
        router_z_loss_weight=0.0,
        balance='nano_moe',
    )
    model = GPT(cfg)
    model(torch.arange(8)[None], torch.arange(8)[None]).losses.total.backward()
    assert model.h[0].mlp.router.score.weight.grad.abs().max() == 0
