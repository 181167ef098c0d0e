# %% exercise-rate: as it was
rate = 0.008


# %% exercise-rate: Muon's rule
rate = 0.002


# %% exercise-muon: our version's rule
rule = 'divided by sqrt(r)'


# %% exercise-muon: AdamW's rule
rule = 'divided by r'


# %% exercise-culprit: experts would grow too
culprit = 'expert'


# %% exercise-culprit: logits would grow
culprit = 'final norm'
