# ruff: noqa: F811, F821

# %% exercise-bits: nats, not bits
def bits_per_byte(loss, n_tokens, n_bytes):
    return loss * n_tokens / n_bytes


# %% exercise-bits: bits per token
def bits_per_byte(loss, n_tokens, n_bytes):
    return loss / math.log(2)


# %% exercise-bits: tokens and bytes are exchanged
def bits_per_byte(loss, n_tokens, n_bytes):
    return loss / math.log(2) * n_bytes / n_tokens
