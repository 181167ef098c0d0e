# %% exercise-bits: as if the expert determined the domain
bits = 2.0
# %% exercise-bits: a fair coin, although numbers are one domain of four
bits = 1.0


# %% exercise-context: the token id alone
def route(tokens):
    return tokens


# %% exercise-context: looks at the next token
def route(tokens):
    return (np.roll(tokens, -1, 1) - tokens) % 4


# %% exercise-hide: only the router of layer 0
def hide_context(model):
    def embedding_only(router, inputs):
        x, ids = inputs
        return torch.nn.functional.layer_norm(model.wte(ids).reshape(x.shape), x.shape[-1:]), ids

    model.h[0].mlp.router.register_forward_pre_hook(embedding_only)
    return model


# %% exercise-hide: the router sees nothing at all
def hide_context(model):
    for block in model.h:
        block.mlp.router.register_forward_pre_hook(
            lambda router, inputs: (torch.zeros_like(inputs[0]), inputs[1])
        )
    return model
