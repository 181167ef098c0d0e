"""A dense model against Hugging Face's own GPT-2, built small with random weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanomoe.config import BadInput, ModelConfig
from nanomoe.experts import MoE
from nanomoe.huggingface import from_gpt2
from nanomoe.pretrained import initial_weights


@pytest.fixture(scope='module')
def theirs():
    torch.manual_seed(0)
    cfg = GPT2Config(
        vocab_size=97,
        n_positions=32,
        n_embd=48,
        n_layer=3,
        n_head=4,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    )
    model = GPT2LMHeadModel(cfg)
    # biases and norms too: a forgotten one must show
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


CFG = ModelConfig(
    block_size=32,
    vocab_size=97,
    n_layer=3,
    n_head=4,
    n_embd=48,
    n_experts=1,
    bias=True,
    activation='gelu_tanh',
)


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
    torch.testing.assert_close(
        ours.h[1].mlp.c_fc.weight.grad, theirs.transformer.h[1].mlp.c_fc.weight.grad.T, atol=1e-5, rtol=1e-4
    )


def test_exact_gelu_is_not_gpt2s(theirs):
    x = torch.arange(32)[None]
    ours = from_gpt2(theirs.state_dict(), ModelConfig(**{**CFG.__dict__, 'activation': 'gelu'}))
    assert (ours(x).logits - theirs(x).logits).abs().max() > 1e-4


def test_a_saved_folder_is_read_by_name(theirs, tmp_path, monkeypatch):
    from nanomoe import huggingface

    folder = tmp_path / 'gpt2'
    theirs.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface, 'gpt2_config', lambda name: CFG)
    ours = initial_weights('gpt2', CFG)
    torch.testing.assert_close(
        ours(torch.arange(32)[None]).logits, theirs(torch.arange(32)[None]).logits, atol=1e-5, rtol=1e-4
    )
    shorter = initial_weights('gpt2', ModelConfig(**{**CFG.__dict__, 'block_size': 16}))
    torch.testing.assert_close(
        shorter(torch.arange(16)[None]).logits, theirs(torch.arange(16)[None]).logits, atol=1e-5, rtol=1e-4
    )


def test_weights_that_do_not_fit_are_named(theirs):
    weights = dict(theirs.state_dict())
    with pytest.raises(BadInput, match='h.3'):
        from_gpt2(weights, ModelConfig(**{**CFG.__dict__, 'n_layer': 4}))
    with pytest.raises(BadInput, match='must have shape'):
        from_gpt2(weights, ModelConfig(**{**CFG.__dict__, 'vocab_size': 98}))


# ---- sparse blocks with copied weights: same experts, same gates, same output and gradients


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    cfg = MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(cfg), dict(norm_topk_prob=True)


def olmoe(normalized: bool):
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    cfg = OlmoeConfig(
        hidden_size=32, intermediate_size=24, num_experts=6, num_experts_per_tok=2, norm_topk_prob=normalized
    )
    return OlmoeSparseMoeBlock(cfg), dict(norm_topk_prob=normalized)


def qwen3(normalized: bool):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    cfg = Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=normalized,
    )
    return Qwen3MoeSparseMoeBlock(cfg), dict(norm_topk_prob=normalized)


def deepseek(normalized: bool):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    cfg = DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_local_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=normalized,
    )
    return DeepseekV3MoE(cfg), dict(
        router='sigmoid', balance='bias', n_shared_experts=2, norm_topk_prob=normalized
    )


BLOCKS = {
    'Mixtral': mixtral,
    'OLMoE': lambda: olmoe(False),
    'OLMoE, normalized': lambda: olmoe(True),
    'Qwen3-MoE': lambda: qwen3(True),
    'Qwen3-MoE, not normalized': lambda: qwen3(False),
    'DeepSeek-V3': lambda: deepseek(True),
    'DeepSeek-V3, not normalized': lambda: deepseek(False),
}


def ours_like(block, options: dict) -> MoE:
    "Our layer with a block's weights; theirs are stored (E, out, in)."
    layer = MoE(
        ModelConfig(
            n_embd=32, n_head=1, n_experts=6, top_k=2, expert_width=24, activation='swiglu', **options
        )
    )
    with torch.no_grad():
        layer.router.score.weight.copy_(block.gate.weight)
        layer.experts.c_fc.copy_(block.experts.gate_up_proj.mT)
        layer.experts.c_proj.copy_(block.experts.down_proj.mT)
        if layer.shared:
            shared = block.shared_experts
            layer.shared.c_fc.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
            layer.shared.c_proj.weight.copy_(shared.down_proj.weight)
            layer.router.bias.copy_(block.gate.e_score_correction_bias)
    return layer


@pytest.mark.parametrize('name', BLOCKS)
def test_sparse_block(name):
    torch.manual_seed(0)
    block, options = BLOCKS[name]()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if 'DeepSeek' in name:
        torch.nn.init.normal_(block.gate.e_score_correction_bias, std=0.3)
    layer, x = ours_like(block, options), torch.randn(3, 17, 32)
    leaves, up = [x.clone().requires_grad_() for _ in range(2)], torch.randn(3, 17, 32)
    _, gates, ids = block.gate(x.flatten(0, 1))
    want, (got, r) = block(leaves[0]), layer(leaves[1])
    order, theirs = r.expert_ids.argsort(-1), ids.argsort(-1)  # DeepSeek's come unsorted
    assert torch.equal(r.expert_ids.gather(1, order), ids.gather(1, theirs))
    want.backward(up)
    got.backward(up)
    pairs = {
        'gates': (r.gates.gather(1, order), gates.gather(1, theirs)),
        'output': (got, want),
        'gradient': (leaves[1].grad, leaves[0].grad),
        'router': (layer.router.score.weight.grad, block.gate.weight.grad),
        'experts': (layer.experts.c_fc.grad, block.experts.gate_up_proj.grad.mT),
    }
    print(f'{name:28s}', '  '.join(f'{part} {(a - b).abs().max():.1e}' for part, (a, b) in pairs.items()))
    for part, (a, b) in pairs.items():
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m: f'{part}: {m}')


def test_gates_of_another_kind_are_not_theirs():
    block, _ = mixtral()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 17, 32)
    assert (ours_like(block, dict(norm_topk_prob=False))(x)[0] - block(x)).abs().max() > 1e-3


def test_the_benchmarks_modern_model_is_a_mixtral_in_size():
    from nanomoe.bench import Bench, make_model

    b = Bench(preset='tiny', device='cpu')
    ours, theirs = (
        sum(p.numel() for p in make_model(name, b)[0].parameters()) for name in ('modern', 'Mixtral eager')
    )
    assert ours == theirs


@pytest.mark.parametrize(
    'name', ['dense', 'moe', 'modern', 'modern dense', 'Mixtral eager', 'Mixtral grouped_mm']
)
def test_every_case_of_the_benchmarks_step_trains(name, monkeypatch):
    from nanomoe import bench

    kept, make = [], bench.make_model
    monkeypatch.setattr(bench, 'make_model', lambda *a: kept.append(make(*a)) or kept[-1])
    step = bench.make_step(name, bench.Bench(preset='tiny', device='cpu'))
    before = [p.clone() for p in kept[0][0].parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, kept[0][0].parameters()) if b.dim() >= 2)
