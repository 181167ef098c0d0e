# %% exercise-evaluation: the mean of the two means
loss = (600 / 300 + 400 / 100) / 2


# %% exercise-evaluation: the sum of the two means
loss = 600 / 300 + 400 / 100


# %% exercise-global: its own counts in place of everyone's
def global_balance(r, counts):
    return len(counts) * (r.probs.mean(0) * r.counts() / r.counts().sum()).sum()


# %% exercise-global: calls the function that is to be written
def global_balance(r, counts):
    return balance_loss(r, counts=counts)


# %% exercise-global: the counts are divided by one process's assignments
def global_balance(r, counts):
    return len(counts) * (r.probs.mean(0) * counts / r.expert_ids.numel()).sum()


# %% exercise-local: gradients are averaged in each step, whatever `every` is
def train_apart(models, batches, every, lr):
    for x, y in batches:
        for model, a, b in zip(models, x.chunk(len(models)), y.chunk(len(models))):
            model.zero_grad()
            model(a, b).losses.ce.backward()
        with torch.no_grad():
            for copies in zip(*(m.parameters() for m in models)):
                mean = sum(p.grad for p in copies) / len(copies)
                for p in copies:
                    p -= lr * mean
    return models


# %% exercise-local: all models get the weights of the first one
def train_apart(models, batches, every, lr):
    for step, (x, y) in enumerate(batches, 1):
        for model, a, b in zip(models, x.chunk(len(models)), y.chunk(len(models))):
            model.zero_grad()
            model(a, b).losses.ce.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= lr * p.grad
        if step % every == 0:
            for model in models[1:]:
                model.load_state_dict(models[0].state_dict())
    return models
