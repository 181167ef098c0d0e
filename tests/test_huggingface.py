"""A dense model against Hugging Face's own GPT-2, built small with random weights."""
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanomoe.config import BadInput, ModelConfig
from nanomoe.pretrained import from_gpt2, initial_weights


@pytest.fixture(scope='module')
def theirs():
    torch.manual_seed(0)
    cfg = GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4,
                     attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    model = GPT2LMHeadModel(cfg)
    # biases and norms too: a forgotten one must show
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    return model


CFG = ModelConfig(block_size=32, vocab_size=97, n_layer=3, n_head=4, n_embd=48, bias=True,
                  activation='gelu_tanh')


def test_logits_loss_and_gradients(theirs):
    ours = from_gpt2(theirs.state_dict(), CFG)
    x = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(1))
    want = theirs(x, labels=x)
    got = ours(x[:, :-1], x[:, 1:])
    torch.testing.assert_close(got.logits, want.logits[:, :-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.losses.ce, want.loss, atol=1e-5, rtol=1e-5)
    want.loss.backward()
    got.losses.total.backward()
    torch.testing.assert_close(ours.wte.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.h[1].mlp.c_fc.weight.grad,
                               theirs.transformer.h[1].mlp.c_fc.weight.grad.T, atol=1e-5, rtol=1e-4)


def test_exact_gelu_is_not_gpt2s(theirs):
    x = torch.arange(32)[None]
    ours = from_gpt2(theirs.state_dict(), ModelConfig(**{**CFG.__dict__, 'activation': 'gelu'}))
    assert (ours(x).logits - theirs(x).logits).abs().max() > 1e-4


def test_a_saved_folder_is_read_by_name(theirs, tmp_path, monkeypatch):
    from nanomoe import pretrained
    folder = tmp_path/'gpt2'
    theirs.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, 'gpt2_config', lambda name: CFG)
    ours = initial_weights('gpt2', CFG)
    torch.testing.assert_close(ours(torch.arange(32)[None]).logits, theirs(torch.arange(32)[None]).logits,
                               atol=1e-5, rtol=1e-4)
    shorter = initial_weights('gpt2', ModelConfig(**{**CFG.__dict__, 'block_size': 16}))
    torch.testing.assert_close(shorter(torch.arange(16)[None]).logits, theirs(torch.arange(16)[None]).logits,
                               atol=1e-5, rtol=1e-4)


def test_weights_that_do_not_fit_are_named(theirs):
    weights = dict(theirs.state_dict())
    with pytest.raises(BadInput, match='h.3'):
        from_gpt2(weights, ModelConfig(**{**CFG.__dict__, 'n_layer': 4}))
    with pytest.raises(BadInput, match='must have shape'):
        from_gpt2(weights, ModelConfig(**{**CFG.__dict__, 'vocab_size': 98}))
