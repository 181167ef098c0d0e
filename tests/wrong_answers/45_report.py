# %% exercise-alarm: looks at the whole log
def alarms(rows):
    load = np.sum([row['load'] for row in rows], 0)
    return np.flatnonzero(load_ratio(load).min(-1) < 0.1).tolist()


# %% exercise-alarm: one line with an unused expert is enough
def alarms(rows):
    low = [load_ratio(row['load']).min(-1) < 0.1 for row in rows[-10:]]
    return np.flatnonzero(np.any(low, 0)).tolist()


# %% exercise-floor: the value for uniform load
def by_load(ids, n_experts):
    return ids.shape[1] / n_experts


# %% exercise-floor: the chance that two assignments, not two tokens, share an expert
def by_load(ids, n_experts):
    n = np.bincount(ids.ravel(), minlength=n_experts)
    return (n * n).sum() / ids.size**2
