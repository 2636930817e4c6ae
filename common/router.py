"""Top-k routing: the k largest logits and a softmax over those alone."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def top_k_softmax(logits, N: tl.constexpr, TOP_K: tl.constexpr):
    """Indices int32 and weights float32, largest first, the lower index first on ties, in a power of two of places.

    logits: float32 [a power of two], of which the first N count. Indices are below N whatever these hold; places from
    TOP_K on have weight 0.
    """
    BLOCK_N: tl.constexpr = triton.next_power_of_2(N)
    BLOCK_TOP_K: tl.constexpr = triton.next_power_of_2(TOP_K)
    index = tl.arange(0, BLOCK_N)
    logits += 0.0  # -0.0 ties with 0.0
    bits = logits.to(tl.int32, bitcast=True)
    ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of the floats
    # One reduction finds value and place: among equal values the lower index makes the larger key.
    keys = (ascending.to(tl.int64) << 32) | (BLOCK_N - 1 - index).to(tl.int64)
    keys = tl.where(index < N, keys, LOWEST)
    place = tl.arange(0, BLOCK_TOP_K)
    chosen = tl.zeros([BLOCK_TOP_K], tl.int32)
    values = tl.full([BLOCK_TOP_K], float("-inf"), tl.float32)
    for i in tl.static_range(TOP_K):
        top = tl.max(keys, axis=0)
        at = BLOCK_N - 1 - (top & (BLOCK_N - 1)).to(tl.int32)
        bits = (top >> 32).to(tl.int32)
        value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        chosen = tl.where(place == i, at, chosen)
        values = tl.where(place == i, value, values)
        keys = tl.where(index == at, LOWEST, keys)
    p = tl.exp(values - tl.max(values, axis=0))
    return chosen, p / tl.sum(p, axis=0)


@triton.jit
def pick(vector, i):
    """Element i of a vector held in registers."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == i, vector, 0), axis=0)
