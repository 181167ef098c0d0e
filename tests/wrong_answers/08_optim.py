# %% exercise-scale: AdamW's step taken for proportional to the gradient
factors = (1000, 1000, 1)
# %% exercise-scale: Muon's step taken for proportional to the gradient
factors = (1000, 1, 1000)


# %% exercise-parts: the fused matrix at once
def qkv_update(g):
    return newton_schulz(g)


# %% exercise-parts: every third row taken for a block
def qkv_update(g):
    return newton_schulz(g.view(-1, 3, g.size(-1)).transpose(0, 1)).transpose(0, 1).reshape_as(g)


# %% exercise-hold: starts to decay right after the warmup
def hold_then_decay(step, warmup, hold, total, peak):
    return peak * min(1, (step + 1) / (warmup + 1), (total - step) / (total - warmup))


# %% exercise-hold: drops to zero at once
def hold_then_decay(step, warmup, hold, total, peak):
    return peak * min(1, (step + 1) / (warmup + 1)) * (step <= hold)
