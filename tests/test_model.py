"Edges of the model: what it cannot be, tokens without a target, half precision."

from dataclasses import replace

import pytest
import torch

from nanomoe.config import ModelConfig
from nanomoe.model import GPT, chunked_cross_entropy, token_losses

SMALL = ModelConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8, n_experts=4, moe_every=1)


def test_a_model_that_cannot_be_built_or_run_is_reported():
    with pytest.raises(ValueError, match='^n_embd must be a multiple of n_head=3, got 8$'):
        GPT(replace(SMALL, n_head=3))
    with pytest.raises(ValueError, match='^vocab_size must be set'):
        GPT(replace(SMALL, vocab_size=None))
    with pytest.raises(ValueError, match='^at most block_size=16 positions fit, got 17$'):
        GPT(SMALL)(torch.zeros(1, 17).long())


def test_tokens_without_a_target_have_no_loss():
    torch.manual_seed(0)
    x, weight = torch.randn(37, 16), torch.randn(50, 16)
    y = torch.where(torch.arange(37) % 5 == 0, -1, torch.arange(37))
    each = token_losses(x, weight, y, chunk=8)
    assert each.shape == (37,) and (each[::5] == 0).all()
    torch.testing.assert_close(each.sum() / (y >= 0).sum(), chunked_cross_entropy(x, weight, y))
    assert chunked_cross_entropy(x, weight, torch.full_like(y, -1)) == 0  # no target at all: 0, not 0/0


def test_chunked_cross_entropy_in_float16():
    "1/4096 of a gradient must not vanish."
    torch.manual_seed(0)
    x, weight, y = torch.randn(4096, 16), torch.randn(50, 16), torch.randint(50, (4096,))

    def grads_in(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        # times the scale that GradScaler begins with
        return torch.autograd.grad(2**16 * chunked_cross_entropy(*leaves, y), leaves)

    for half, full in zip(grads_in(torch.float16), grads_in(torch.float32)):
        assert (half - full).norm() < 2e-3 * full.norm()
