# %% exercise-first: in bits, not in nats
first_loss = math.log2(50257)
# %% exercise-first: taken from the lesson's vocabulary of 512
first_loss = math.log(512)


# %% exercise-padding: the mean of the means
def padded_gradient(model, batches):
    return gradient(model, batches)


# %% exercise-padding: weighted by targets, but not divided by their total
def padded_gradient(model, batches):
    model.zero_grad()
    for x, y in batches:
        (model(x, y).losses.ce * (y >= 0).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# %% exercise-diverging: the first suspect in general, but not here
cause = 'rate'
# %% exercise-diverging: a falling entropy is blamed on the router's start
cause = 'router'


# %% exercise-rate: a linear grid misses small rates
def find_rate(loss_at):
    return min((0.1, 0.2, 0.3, 0.4), key=loss_at)


# %% exercise-rate: the worst rate instead of the best
def find_rate(loss_at):
    return max((1e-3, 1e-2, 3e-2), key=loss_at)
