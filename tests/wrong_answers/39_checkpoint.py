# ruff: noqa: F811, F821

# %% exercise-interval: forgets that only half an interval is lost on average
def best_interval(c, M):
    return (c * M) ** 0.5


# %% exercise-interval: makes the time of all saves a fixed part
def best_interval(c, M):
    return c * M / 1000


# %% exercise-worst: before the old folder is deleted
worst = 'delete'

# %% exercise-worst: while the files are written
worst = 'write'
