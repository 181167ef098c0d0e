# %% exercise-mfu: 2 FLOPs per weight, the forward pass only
mfu = 2 * 37e9 * 14.8e12 / (2.788e6 * 3600) / PEAK['H100']


# %% exercise-mfu: all weights instead of the active ones
mfu = 6 * 671e9 * 14.8e12 / (2.788e6 * 3600) / PEAK['H100']


# %% exercise-memory: only the fixed memory of the weights
def most_experts(cfg, limit):
    E = 2
    while sum(state_bytes(replace(cfg, n_experts=E + 1)).values()) <= limit:
        E += 1
    return E


# %% exercise-memory: one less than fits
def most_experts(cfg, limit):
    E = 2
    while sum(step_bytes(replace(cfg, n_experts=E + 2), 12, True).values()) <= limit:
        E += 1
    return E


# %% exercise-budget: tokens, not steps
def steps_for(cfg, budget):
    return int(budget / flops_per_token(cfg))


# %% exercise-budget: 6 FLOPs per weight, the embedding counted twice and attention left out
def steps_for(cfg, budget):
    return int(budget / (6 * n_params(GPT(cfg))[0] * 32 * cfg.block_size) / 2)
