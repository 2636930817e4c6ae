"""Top-k routing: the k largest logits and a softmax over those alone."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 31))


@triton.jit
def top_k_softmax(logits, N: tl.constexpr, TOP_K: tl.constexpr):
    """Indices int32 and weights float32, largest first, the lower index first on ties, in a power of two of places.

    logits: float32 [COPIES, next power of two of N], the same in all copies; the first N count. With a copy for each
    warp, all of them choose, and no step waits for another warp. Indices are below N whatever the logits hold; places
    from TOP_K on have weight 0.
    """
    chosen, keys = top_k_rows(logits, N, TOP_K)
    # Both at once, as warps exchange them.
    chosen, keys = tl.reduce((chosen, keys), 0, _larger_of_each)
    return chosen, _softmax_of_keys(keys, TOP_K)


@triton.jit
def _larger_of_each(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def top_k_softmax_rows(logits, N: tl.constexpr, TOP_K: tl.constexpr):
    """The same of each row of logits, float32 [ROWS, N or more]: both [ROWS, power of two of places]."""
    chosen, keys = top_k_rows(logits, N, TOP_K)
    return chosen, _softmax_of_keys(keys, TOP_K)


@triton.jit
def top_k_rows(logits, N: tl.constexpr, TOP_K: tl.constexpr):
    """(indices, logits in the order of _in_order) of each row's TOP_K largest, int32 [ROWS, power of two of places]."""
    ROWS: tl.constexpr = logits.shape[0]
    BLOCK_N: tl.constexpr = logits.shape[1]
    BLOCK_TOP_K: tl.constexpr = triton.next_power_of_2(TOP_K)
    index = tl.arange(0, BLOCK_N)[None, :]
    keys = _in_order(logits + 0.0)  # -0.0 ties with 0.0
    keys = tl.where(index < N, tl.maximum(keys, LOWEST + 1), LOWEST)
    place = tl.arange(0, BLOCK_TOP_K)[None, :]
    chosen = tl.zeros([ROWS, BLOCK_TOP_K], tl.int32)
    values = tl.full([ROWS, BLOCK_TOP_K], LOWEST, tl.int32)
    for i in tl.static_range(TOP_K):
        top = tl.max(keys, axis=1)[:, None]
        at = tl.min(tl.where(keys == top, index, BLOCK_N), axis=1)[:, None]
        chosen = tl.where(place == i, at, chosen)
        values = tl.where(place == i, top, values)
        keys = tl.where(index == at, LOWEST, keys)
    return chosen, values


@triton.jit
def _softmax_of_keys(keys, TOP_K: tl.constexpr):
    """Along the last dimension of logits as top_k_rows gives them, whose places from TOP_K on do not count."""
    AXIS: tl.constexpr = len(keys.shape) - 1
    place = tl.arange(0, keys.shape[AXIS])
    if AXIS == 1:
        place = place[None, :]
    values = tl.where(
        place < TOP_K, _in_order(keys.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True), float("-inf")
    )
    p = tl.exp(values - tl.max(values, axis=AXIS, keep_dims=True))
    return p / tl.sum(p, axis=AXIS, keep_dims=True)


@triton.jit
def _in_order(x):
    """The bits of float32 as integers in the order of the floats; it is its own inverse."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
