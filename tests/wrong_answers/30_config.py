# ruff: noqa: F811, F821

# %% exercise-never-peaks: counts a run of as many steps as the warmup as one that reaches the peak
def never_peaks(t):
    return t.warmup_iters > t.max_iters


# %% exercise-never-peaks: compares with the decay in place of the run's length
def never_peaks(t):
    return t.warmup_iters >= (t.lr_decay_iters or t.max_iters)
