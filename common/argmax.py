"""Running argmax over tiles of logits; the lowest index wins a tie."""

import triton
import triton.language as tl


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
