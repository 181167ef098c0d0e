# %% exercise-grow: doubles the whole model
growth = (55_110_000, 33_880_000)

# %% exercise-grow: takes half of the new expert weights for active
growth = (28_320_768, 14_160_384)

# %% exercise-grow: forgets the router
growth = (28_311_552, 0)


# %% exercise-size: too much is active, with the right total
def size():
    return ModelConfig(
        block_size=1024,
        vocab_size=16384,
        n_layer=8,
        n_head=8,
        n_embd=512,
        n_experts=20,
        top_k=6,
        moe_every=1,
        expert_width=512,
    )


# %% exercise-size: experts of the usual width, 4·C
def size():
    return ModelConfig(
        block_size=1024, vocab_size=16384, n_layer=8, n_head=8, n_embd=512, n_experts=20, top_k=3, moe_every=1
    )


# %% exercise-matched: every MLP K·F wide, also where the mixture has none
def matched(cfg):
    return replace(cfg, n_experts=1, mlp_width=cfg.top_k * cfg.d_expert)


# %% exercise-matched: only one expert's width
def matched(cfg):
    return replace(cfg, n_experts=1, mlp_width=cfg.d_expert)
