# ruff: noqa: F811, F821

# %% exercise-leak: removes white space at the ends only
def key(text):
    return text.lower().strip()


# %% exercise-leak: leaves capitals as they are
def key(text):
    return ' '.join(text.split())


# %% exercise-leak: the first characters, which many pages share
def key(text):
    return ' '.join(text.lower().split())[:4]
