# ruff: noqa: F811, F821

# %% exercise-predict: takes two of four experts for an even load
value = 1.0

# %% exercise-predict: uses f twice instead of P and f
value = 2.0

# %% exercise-predict: forgets the factor E
value = 0.4


# %% exercise-importance: counts assignments instead of adding gates
def importance_loss(r):
    counts = r.counts()
    return counts.var(correction=0) / counts.mean() ** 2


# %% exercise-importance: the variance of a sample, not of all experts
def importance_loss(r):
    table = torch.zeros(len(r.gates), r.probs.size(1)).scatter(1, r.expert_ids, r.gates)
    return table.sum(0).var() / table.sum(0).mean() ** 2


# %% exercise-revive: trains the experts but leaves the router as it is
def revive(layer):
    adam, g = torch.optim.Adam(layer.experts.parameters(), lr=0.01), torch.Generator().manual_seed(0)
    for _ in range(200):
        x, y = clusters(256, g)
        out, r = forward(layer, x)
        adam.zero_grad()
        ((out - y).square().mean() + 0.03 * balance_loss(r)).backward()
        adam.step()
    return layer


# %% exercise-revive: sends tokens to an expert that has learned nothing
def revive(layer):
    layer.router.score.weight.data[7] = layer.router.score.weight.data[1] + 0.05
    return layer


# %% exercise-revive: returns another layer, trained with balance from the start
def revive(layer):
    return balanced.layer
