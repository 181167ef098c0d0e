# ruff: noqa: F811, F821

# %% exercise-last-used: looks at the last row only
def last_used(rows):
    return rows[-1]['step'] * (np.array(rows[-1]['load']) > 0)


# %% exercise-last-used: keeps the first step in place of the last
def last_used(rows):
    with_load = [row for row in rows if 'load' in row]
    first = np.zeros(np.array(with_load[0]['load']).shape, int)
    for row in with_load[::-1]:
        first[np.array(row['load']) > 0] = row['step']
    return first
