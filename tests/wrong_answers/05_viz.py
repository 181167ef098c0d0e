# %% exercise-diagnose: looks only at the beginning of each run
verdicts = ['healthy', 'dead', 'restless', 'overloaded']

# %% exercise-diagnose: takes the widest band at any time for an overloaded expert
verdicts = ['overloaded', 'dead', 'healthy', 'restless']


# %% exercise-violation: the largest count, not divided by the mean
def max_violation(load):
    return load.max(-1).values - 1


# %% exercise-violation: divides by the mean of all layers
def max_violation(load):
    return load.max(-1).values / load.mean() - 1


# %% exercise-balanced: the counts have no gradient, so the loss trains nothing
def penalty(r):
    share = r.counts() / r.counts().sum()
    return 0.1 * 8 * (share * share).sum()


# %% exercise-balanced: the sign rewards an uneven load
def penalty(r):
    share = r.counts() / r.counts().sum()
    return -0.1 * 8 * (r.probs.mean(0) * share).sum()


# %% exercise-balanced: a weight of 20, which drowns the task
def penalty(r):
    share = r.counts() / r.counts().sum()
    return 20 * 8 * (r.probs.mean(0) * share).sum()
