# ruff: noqa: F811, F821
# %% exercise-steps: multiplies where it must divide
steps = 2000 * 1.05

# %% exercise-steps: by the step of matched dense
steps = 2000 / 1.27


# %% exercise-clock: the other way round
def break_even(dense_curve, mixture_final):
    return float(1000 / np.exp(np.interp(-mixture_final, -np.array(dense_curve), np.log(STEPS))))


# %% exercise-clock: interpolates in steps, not in their logarithm
def break_even(dense_curve, mixture_final):
    return float(np.interp(-mixture_final, -np.array(dense_curve), STEPS) / 1000)


# %% exercise-matched: matches the parameters
def matched(cfg):
    return replace(cfg, n_experts=1, n_shared_experts=0, mlp_width=cfg.n_experts * cfg.d_expert)


# %% exercise-matched: forgets the shared expert
def matched(cfg):
    return replace(cfg, n_experts=1, n_shared_experts=0, mlp_width=cfg.top_k * cfg.d_expert)
