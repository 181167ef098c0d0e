# ruff: noqa: F811, F821

# %% exercise-renumber: no expert keeps its number, so nothing agrees
share = 0.0

# %% exercise-renumber: counts the tokens with an expert in common
share = 2 / 4


# %% exercise-lesion: takes the gates of the banned ones away and leaves their place empty
def without_all(r, experts):
    banned = torch.isin(r.expert_ids, torch.tensor(experts))
    return r._replace(gates=r.gates.masked_fill(banned, 0))


# %% exercise-lesion: bans only the last one
def without_all(r, experts):
    for e in experts:
        routing = without(r, e)
    return routing


# %% exercise-heal: computes gradients, takes no step
def finetuned(banned):
    clone = copy.deepcopy(model).train()
    with rerouted(0, lambda r: r if banned is None else without(r, banned), clone):
        for x, y in BATCHES:
            clone(x, y).losses.ce.backward()
    return clone.eval()


# %% exercise-heal: trains with all experts
def finetuned(banned):
    clone = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(clone.parameters(), lr=3e-4)
    for x, y in BATCHES:
        optimizer.zero_grad()
        clone(x, y).losses.ce.backward()
        optimizer.step()
    return clone.eval()
