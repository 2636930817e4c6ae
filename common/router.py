"""Top-k routing: the k largest logits and a softmax over those alone."""

import triton
import triton.language as tl


@triton.jit
def top_k_softmax(logits_ptr, N: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TOP_K: tl.constexpr):
    """Indices int32 and weights float32 [BLOCK_TOP_K], largest first, the lower index first on ties.

    logits_ptr float32 [N]. Indices are in range whatever the logits hold; places from TOP_K on have weight 0.
    """
    index = tl.arange(0, BLOCK_N)
    logits = tl.load(logits_ptr + index, mask=index < N, other=float("-inf"))
    place = tl.arange(0, BLOCK_TOP_K)
    chosen = tl.zeros([BLOCK_TOP_K], tl.int32)
    values = tl.full([BLOCK_TOP_K], float("-inf"), tl.float32)
    for i in tl.static_range(TOP_K):
        top = tl.max(logits, axis=0)
        at = tl.minimum(tl.min(tl.where(logits == top, index, N), axis=0), N - 1)
        chosen = tl.where(place == i, at, chosen)
        values = tl.where(place == i, top, values)
        logits = tl.where(index == at, float("-inf"), logits)
    p = tl.exp(values - tl.max(values, axis=0))
    return chosen, p / tl.sum(p, axis=0)


@triton.jit
def pick(vector, i):
    """Element i of a vector held in registers."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == i, vector, 0), axis=0)
