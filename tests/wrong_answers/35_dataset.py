# ruff: noqa: F811, F821

# %% exercise-ranks: every process reads the same samples
def samples_of(step, rank, n_ranks, per_step):
    return np.arange(step * per_step, (step + 1) * per_step)


# %% exercise-ranks: more processes read more samples in a step
def samples_of(step, rank, n_ranks, per_step):
    return (step * n_ranks + rank) * per_step + np.arange(per_step)


# %% exercise-flips: adds the value of the bit in place of flipping it
def unnoticed(ids, vocab_size):
    return np.mean([(ids + (1 << bit)) < vocab_size for bit in range(16)])


# %% exercise-flips: counts the flips that are noticed
def unnoticed(ids, vocab_size):
    return np.mean([(ids ^ (1 << bit)) >= vocab_size for bit in range(16)])
