# %% exercise-nats: in bits
effect = math.log2(0.40 / 0.10)
# %% exercise-nats: the difference of the probabilities
effect = 0.40 - 0.10


# %% exercise-decisive: the place among the chosen in place of the expert's number
def decisive(frame):
    _, layer, k = min(
        (p, layer, k) for layer, without in enumerate(frame['without']) for k, p in enumerate(without)
    )
    return layer, k


# %% exercise-decisive: the last layer that has experts
def decisive(frame):
    without = frame['without'][-1]
    return len(frame['without']) - 1, frame['experts'][-1][without.index(min(without))]


# %% exercise-swap: at every position
@torch.no_grad()
def with_other(model, ids, block, position, expert):
    def swap(router, inputs, routing):
        chosen = routing.expert_ids.clone()
        chosen[:, 0] = expert
        return routing._replace(expert_ids=chosen)

    with hooked(model.h[block].mlp.router, swap):
        x, _ = model.hidden(ids[None, : position + 1])
    return (model.wte.weight @ x[0, position]).softmax(-1)[ids[position + 1]].item()


# %% exercise-swap: the second choice, not the first
@torch.no_grad()
def with_other(model, ids, block, position, expert):
    def swap(router, inputs, routing):
        chosen = routing.expert_ids.clone()
        chosen[position, 1] = expert
        return routing._replace(expert_ids=chosen)

    with hooked(model.h[block].mlp.router, swap):
        x, _ = model.hidden(ids[None, : position + 1])
    return (model.wte.weight @ x[0, position]).softmax(-1)[ids[position + 1]].item()
