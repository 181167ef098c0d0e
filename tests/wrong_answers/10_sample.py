# %% exercise-experts: no two tokens share an expert
batch = 0.9 * 128 / 4


# %% exercise-experts: 10 % are read, not missed
batch = math.log(0.9) / math.log(1 - 4 / 128)


# %% exercise-experts: as if a token chose one expert
batch = math.log(0.1) / math.log(1 - 1 / 128)


# %% exercise-min-p: the threshold is p itself, not p times the largest probability
def min_p(probs, p):
    kept = probs * (probs >= p)
    return kept / kept.sum(-1, keepdim=True).clamp(min=1e-9)


# %% exercise-min-p: what is left is not divided by its sum
def min_p(probs, p):
    return probs * (probs >= p * probs.amax(-1, keepdim=True))


# %% exercise-stop: the targets still go on with a line break
def teach_to_stop(model, batches, line_break, end):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in batches:
        model(x, y).losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# %% exercise-stop: only the ends are trained on, so everything becomes an end
def teach_to_stop(model, batches, line_break, end):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in batches:
        model(x, torch.where(y == line_break, end, -1)).losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
