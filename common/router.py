"""Top-k routing: the k largest logits and a softmax over those alone."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 31))


@triton.jit
def top_k_softmax(logits, N: tl.constexpr, TOP_K: tl.constexpr):
    """Return indices int32 and weights float32 by rank, [power of two]: largest first, the lower index first on ties.

    logits: float32 [COPIES, next power of two of N], the same in all copies, of which the first N count. With a copy
    for each warp, all warps choose, and no step waits for another warp. Indices are below N whatever the logits are;
    ranks from TOP_K on have weight 0.
    """
    chosen, keys = top_k_rows(logits, N, TOP_K)
    # Reduced together, as warps exchange them.
    chosen, keys = tl.reduce((chosen, keys), 0, _larger_of_each)
    return chosen, _softmax_of_keys(keys, TOP_K)


@triton.jit
def _larger_of_each(a, b, c, d):
    """Combine two (index, key) pairs of tl.reduce."""
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def top_k_softmax_rows(logits, N: tl.constexpr, TOP_K: tl.constexpr):
    """Return top_k_softmax's indices and weights of each row of logits, float32 [ROWS, N or more]: [ROWS, ranks]."""
    chosen, keys = top_k_rows(logits, N, TOP_K)
    return chosen, _softmax_of_keys(keys, TOP_K)


@triton.jit
def top_k_rows(logits, N: tl.constexpr, TOP_K: tl.constexpr):
    """Return (indices, _ordered_bits of the logits) of each row's TOP_K largest, int32 [ROWS, ranks]."""
    ROWS: tl.constexpr = logits.shape[0]
    BLOCK_N: tl.constexpr = logits.shape[1]
    BLOCK_TOP_K: tl.constexpr = triton.next_power_of_2(TOP_K)
    index = tl.arange(0, BLOCK_N)[None, :]
    keys = _ordered_bits(logits + 0.0)  # -0.0 ties with 0.0
    keys = tl.where(index < N, tl.maximum(keys, LOWEST + 1), LOWEST)
    rank = tl.arange(0, BLOCK_TOP_K)[None, :]
    chosen = tl.zeros([ROWS, BLOCK_TOP_K], tl.int32)
    chosen_keys = tl.full([ROWS, BLOCK_TOP_K], LOWEST, tl.int32)
    for i in tl.static_range(TOP_K):
        top_key = tl.max(keys, axis=1)[:, None]
        top_index = tl.min(tl.where(keys == top_key, index, BLOCK_N), axis=1)[:, None]
        chosen = tl.where(rank == i, top_index, chosen)
        chosen_keys = tl.where(rank == i, top_key, chosen_keys)
        keys = tl.where(index == top_index, LOWEST, keys)
    return chosen, chosen_keys


@triton.jit
def _softmax_of_keys(keys, TOP_K: tl.constexpr):
    """Return the softmax along the last dimension of keys that top_k_rows returned; ranks from TOP_K on get 0."""
    AXIS: tl.constexpr = len(keys.shape) - 1
    rank = tl.arange(0, keys.shape[AXIS])
    if AXIS == 1:
        rank = rank[None, :]
    values = tl.where(
        rank < TOP_K, _ordered_bits(keys.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True), float("-inf")
    )
    p = tl.exp(values - tl.max(values, axis=AXIS, keep_dims=True))
    return p / tl.sum(p, axis=AXIS, keep_dims=True)


@triton.jit
def _ordered_bits(x):
    """Return the bits of float32 as integers in the order of the floats; the function is its own inverse."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
