# %% exercise-bytes: forgets that there are values besides keys
texts = 2**33 // (32 * 8 * 128 * 2 * 4096)

# %% exercise-bytes: counts the query heads
texts = 2**33 // (2 * 32 * 32 * 128 * 2 * 4096)


# %% exercise-window: one position too many
def window_attention(q, k, v, window):
    band = torch.ones(len(q), len(k), dtype=torch.bool).tril().triu(-window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band)


# %% exercise-window: a window in both directions
def window_attention(q, k, v, window):
    band = torch.ones(len(q), len(k), dtype=torch.bool).tril(window - 1).triu(1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band)


# %% exercise-window: zeros after the softmax instead of a mask before it
def window_attention(q, k, v, window):
    weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1)
    return weights.tril().triu(1 - window) @ v


# %% exercise-leak: a causal mask, without a leak
def leaky(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# %% exercise-leak: no mask at all
def leaky(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)
