# %% exercise-length: splits the tokens by the lengths of the arrows
share = 10 / 11
# %% exercise-length: gives everything to the longer arrow
share = 1.0


# %% exercise-cosine: scales the rows but not the tokens
def cosine_logits(x, weight, temperature):
    return x @ F.normalize(weight, dim=-1).T / temperature


# %% exercise-cosine: multiplies by the temperature
def cosine_logits(x, weight, temperature):
    return F.normalize(x, dim=-1) @ F.normalize(weight, dim=-1).T * temperature


# %% exercise-gate: the probability itself, which is below 1
def gate_of_one(probs, expert_ids):
    return probs.gather(1, expert_ids)


# %% exercise-gate: p / p, whose gradients cancel
def gate_of_one(probs, expert_ids):
    p = probs.gather(1, expert_ids)
    return p / p


# %% exercise-gate: ones that do not depend on the probabilities
def gate_of_one(probs, expert_ids):
    return torch.ones(len(probs), 1)
