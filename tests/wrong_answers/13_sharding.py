# %% exercise-fits: forgets the activations
gpus = 2


# %% exercise-fits: one size too many
gpus = 8


# %% exercise-clip: each process by its own norm
def clip(parts, limit):
    norms = [sum(g.square().sum() for g in own).sqrt() for own in parts]
    return [[g * min(1.0, limit / norm) for g in own] for own, norm in zip(parts, norms)]


# %% exercise-clip: adds norms in place of squares
def clip(parts, limit):
    norm = sum(g.norm() for own in parts for g in own)
    return [[g * min(1.0, limit / norm) for g in own] for own in parts]


# %% exercise-moments: every optimizer holds everything
def train_stage_1(steps):
    weights = [w.clone().requires_grad_() for w in full]
    optimizer = adam(weights)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(weights, slice(0, 8)).backward()
        optimizer.step()
    return [w.detach() for w in weights]


# %% exercise-moments: each process takes the gradient of its own half of the batch
def train_stage_1(steps):
    weights = [w.clone().requires_grad_() for w in full]
    parts = [[w.detach().chunk(2)[p].clone() for w in weights] for p in range(2)]
    optimizers = [adam(own) for own in parts]
    for _ in range(steps):
        for p in range(2):
            gradients = torch.autograd.grad(loss_of(weights, slice(4 * p, 4 * p + 4)), weights)
            for i, own in enumerate(parts[p]):
                own.grad = gradients[i].chunk(2)[p]
            optimizers[p].step()
        weights = [torch.cat([parts[0][i], parts[1][i]]).requires_grad_() for i in range(2)]
    return [w.detach() for w in weights]
