"""Running argmax over tiles of logits; the lowest index wins a tie, and a logit that is not finite wins over all."""

import triton
import triton.language as tl

NOT_FINITE = tl.constexpr(-2)  # the index of a logit that is not finite


@triton.jit
def keep_larger(best, best_index, value, index):
    """Update a running (max, index) lane by lane; indices must come in ascending order."""
    larger = value > best
    return tl.where(larger, value, best), tl.where(larger, index, best_index)


@triton.jit
def reduce_argmax(value, index):
    """The largest of value [N] and the lowest index that holds it, as scalars."""
    top = tl.max(value, axis=0)
    return top, tl.min(tl.where(value == top, index, 0x7FFFFFFF), axis=0)


@triton.jit
def keep_finite(doubt, value):
    """Update what a lane knows of its values: zero while all are finite, else NaN."""
    return doubt + value * 0.0


@triton.jit
def expose_doubt(best, best_index, doubt):
    """What reduce_argmax finds first, as infinity at NOT_FINITE, where a lane's values were not all finite."""
    finite = doubt == 0.0
    return tl.where(finite, best, float("inf")), tl.where(finite, best_index, NOT_FINITE)
