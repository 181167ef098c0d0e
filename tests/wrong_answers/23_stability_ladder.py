# %% exercise-zero: the logits themselves at 0
x = 0.0


# %% exercise-zero: the right size with the wrong sign
x = math.log(8)


# %% exercise-threshold: compares with the mean before, not with the lowest
def rises_at(ce):
    for i in range(1, len(ce)):
        if not ce[i] <= ce[i - 1] + 0.3:
            return 10 * (i + 1)
    return math.inf


# %% exercise-threshold: takes a NaN for a loss that has not risen
def rises_at(ce):
    lowest = math.inf
    for i, value in enumerate(ce):
        if value > lowest + 0.3:
            return 10 * (i + 1)
        lowest = min(lowest, value)
    return math.inf


# %% exercise-protect: the routers
def protected(name):
    return '.router.' in name


# %% exercise-protect: the embedding
def protected(name):
    return name == 'wte.weight'


# %% exercise-protect: the experts, most of the weights
def protected(name):
    return '.experts.' in name
