# %% exercise-interval: all ratios, not the middle half
def middle_half(times, base):
    ratios = np.divide(times, base)
    return ratios.min(), ratios.max()


# %% exercise-interval: every pass divided by the median of the other case
def middle_half(times, base):
    return np.quantile(np.divide(times, np.median(base)), [0.25, 0.75])


# %% exercise-ridge: only the rows count, not C and F
n_tokens = h100.ridge * 64 / 8

# %% exercise-ridge: the rows of one expert
n_tokens = 1 / (1 / h100.ridge - 1 / 2048 - 1 / 1024)
