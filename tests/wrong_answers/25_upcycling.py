# %% exercise-gates: as if they were normalized
total = 1.0


# %% exercise-gates: one gate only
total = 1 / 8


# %% exercise-even: upside down
def break_even(second):
    bits = at('dense', second)
    step = np.interp(-bits, -np.array(curves['scratch']['val_bpb']), curves['scratch']['step'])
    return seconds['dense'] * step / second


# %% exercise-even: the ratio of the measured step times
def break_even(second):
    return seconds['slices'] / seconds['dense']


# %% exercise-copies: the experts keep their random weights
def to_copies(dense, cfg):
    model = GPT(cfg)
    model.load_state_dict(dense.state_dict(), strict=False)
    return model


# %% exercise-copies: every expert K times too strong
def to_copies(dense, cfg):
    model = GPT(cfg)
    model.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for old, new in zip(dense.h, model.h):
            new.mlp.experts.c_fc.copy_(old.mlp.c_fc.weight.T)
            new.mlp.experts.c_proj.copy_(cfg.top_k * old.mlp.c_proj.weight.T)
    return model
