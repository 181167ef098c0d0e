# %% exercise-pieces: takes half the width for half of everything
factors = (1, 1, 1)
# %% exercise-pieces: counts experts and forgets that they are narrower
factors = (2, 2, 2)


# %% exercise-backend: all experts count, by their probabilities
def my_backend(x, r, w_in, w_out):
    return torch.einsum('ne,enc->nc', r.probs, F.gelu(x @ w_in) @ w_out)


# %% exercise-backend: the chosen ones without their gates
def my_backend(x, r, w_in, w_out):
    table = torch.zeros_like(r.probs).scatter(1, r.expert_ids, 1.0)
    return torch.einsum('ne,enc->nc', table, F.gelu(x @ w_in) @ w_out)


# %% exercise-train: buys its loss with twice the FLOPs
def mixture():
    return MoE(ModelConfig(n_embd=16, n_experts=16, top_k=2, expert_width=64))


# %% exercise-train: too few experts for the clusters
def mixture():
    return MoE(ModelConfig(n_embd=16, n_experts=2, top_k=1, expert_width=64))


# %% exercise-train: gated experts as wide as the others, at 1.5 times the FLOPs
def mixture():
    return MoE(ModelConfig(n_embd=16, n_experts=32, top_k=1, expert_width=64, activation='swiglu'))
