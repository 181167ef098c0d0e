# %% exercise-export: the square matrix is not transposed
def export(model):
    named = {}
    for name, t in model.state_dict().items():
        oblong = name.startswith('h.') and t.dim() == 2 and t.size(0) != t.size(1)
        named[f'transformer.{name}'] = t.T if oblong else t
    return named | {'lm_head.weight': model.wte.weight}


# %% exercise-export: transposes the embedding too
def export(model):
    named = {f'transformer.{name}': t.T if t.dim() == 2 else t for name, t in model.state_dict().items()}
    return named | {'lm_head.weight': model.wte.weight}


# %% exercise-export: forgets the tied head
def export(model):
    weights = model.state_dict().items()
    return {f'transformer.{n}': t.T if n.startswith('h.') and t.dim() == 2 else t for n, t in weights}


# %% exercise-rotary: nothing to do
def interleaved(w, H):
    return w


# %% exercise-rotary: pairs across the heads
def interleaved(w, H):
    return w.view(2, -1, w.size(1)).transpose(0, 1).reshape(w.shape)
