"""Running argmax over tiles of logits: the lowest index wins a tie, and a logit that is not finite wins over all."""

import triton
import triton.language as tl

NOT_FINITE = tl.constexpr(-2)  # the index of a logit that is not finite


@triton.jit
def keep_larger(best, best_index, value, index):
    """Update a running (max, index) of each element; indices must come in ascending order."""
    is_larger = value > best
    return tl.where(is_larger, value, best), tl.where(is_larger, index, best_index)


@triton.jit
def reduce_argmax(value, index):
    """Return the largest of value [N] and the lowest index that has it, as scalars."""
    top = tl.max(value, axis=0)
    return top, tl.min(tl.where(value == top, index, 0x7FFFFFFF), axis=0)


@triton.jit
def keep_finite(doubt, value):
    """Update `doubt` of each element: zero while all its values are finite, else NaN."""
    return doubt + value * 0.0


@triton.jit
def expose_doubt(best, best_index, doubt):
    """Return (best, best_index), with infinity at NOT_FINITE where an element's values were not all finite."""
    is_finite = doubt == 0.0
    return tl.where(is_finite, best, float("inf")), tl.where(is_finite, best_index, NOT_FINITE)
