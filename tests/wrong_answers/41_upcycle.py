# %% exercise-even: the random routers stay
def even_start(model):
    for name, p in model.named_parameters():
        if name.endswith(('experts.c_proj', 'experts.proj_bias')):
            p *= model.cfg.n_experts / model.cfg.top_k
    return model


# %% exercise-even: scales by E, right for K = 1 only
def even_start(model):
    for name, p in model.named_parameters():
        if 'router' in name:
            p.zero_()
        if name.endswith(('experts.c_proj', 'experts.proj_bias')):
            p *= model.cfg.n_experts
    return model


# %% exercise-redraw: the same columns for every expert
def redraw(w, share):
    w = w.clone()
    columns = torch.randperm(w.size(2))[: round(share * w.size(2))]
    w[:, :, columns] = 0.02 * torch.randn(w.size(0), w.size(1), len(columns))
    return w


# %% exercise-redraw: changes the given matrices
def redraw(w, share):
    for one in w:
        columns = torch.randperm(one.size(1))[: round(share * one.size(1))]
        one[:, columns] = 0.02 * torch.randn(one.size(0), len(columns))
    return w
