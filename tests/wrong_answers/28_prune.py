# ruff: noqa: F811, F821

# %% exercise-reap: the least frequent one is taken for the least important in both
removed = (2, 2)

# %% exercise-reap: the largest instead of the smallest
removed = (0, 2)


# %% exercise-merge: the mean gate, although tokens with large differences weigh more
def smallest_error(g, a, b):
    return ((g - g.mean()).square() * (a - b).square().sum(1)).mean()


# %% exercise-merge: equal shares for both experts
def smallest_error(g, a, b):
    return ((g - 0.5).square() * (a - b).square().sum(1)).mean()


# %% exercise-heal: trains every weight
def rerouted(small):
    clone = copy.deepcopy(small).train()
    optimizer = torch.optim.AdamW(clone.parameters(), lr=3e-3, weight_decay=0.0)
    for x, y in BATCHES:
        optimizer.zero_grad()
        clone(x, y).losses.ce.backward()
        optimizer.step()
    return clone.eval()


# %% exercise-heal: computes gradients, takes no step
def rerouted(small):
    clone = copy.deepcopy(small).train()
    for x, y in BATCHES:
        clone(x, y).losses.ce.backward()
    return clone.eval()
