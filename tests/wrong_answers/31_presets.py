# ruff: noqa: F811, F821

# %% exercise-budget: too few experts for the total
def design():
    shape = dict(block_size=256, vocab_size=4096, n_layer=4, n_embd=256)
    return ModelConfig(**shape, n_experts=8, moe_every=1, expert_width=512)


# %% exercise-budget: large enough, but each token uses too much of it
def design():
    shape = dict(block_size=256, vocab_size=4096, n_layer=4, n_embd=256)
    return ModelConfig(**shape, n_experts=32, top_k=16, moe_every=1, expert_width=512)


# %% exercise-finer: leaves K as it is, which halves the work
def finer(cfg):
    return replace(cfg, expert_width=cfg.d_expert // 2, n_experts=2 * cfg.n_experts)


# %% exercise-finer: more experts of the same width
def finer(cfg):
    return replace(cfg, n_experts=2 * cfg.n_experts, top_k=2 * cfg.top_k)
