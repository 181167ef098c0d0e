# ruff: noqa: F811, F821

# %% exercise-four-times: cuts off what is too much and gives it to nobody
def share_out(sizes, wanted, samples, most):
    return np.minimum(samples * wanted, most * sizes)


# %% exercise-four-times: hands the rest on once, so that the next domain exceeds its limit
def share_out(sizes, wanted, samples, most):
    read = samples * wanted
    over = read > most * sizes
    rest = samples - most * sizes[over].sum()
    return np.where(over, most * sizes, rest * wanted / wanted[~over].sum())
