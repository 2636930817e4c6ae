"""float32 operands of matrix products as what matrix cores multiply: pairs of bfloat16, or float16."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

BF16_MAX = tl.constexpr(3.3895313892515355e38)


class Bf16Pair(NamedTuple):
    """Pointers to the bfloat16 terms of float32 vectors, see bf16_pair."""

    high_ptr: Any
    low_ptr: Any


@triton.jit
def bf16_pair(x):
    """Return bfloat16 (high, low) whose sum is float32 x to 16 bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def store_bf16_pair(pair, offset, x, mask):
    """Store bf16_pair of x at an offset of a Bf16Pair, with bfloat16's largest number for an infinite high term."""
    high = tl.clamp(x, -BF16_MAX, BF16_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.bfloat16)
    tl.store(pair.high_ptr + offset, high, mask=mask)
    tl.store(pair.low_ptr + offset, (x - high.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit
def half_prescale(largest):
    """Return (prescale, undo): the power of two that brings `largest`, a magnitude, to 2^14 to 2^15; its inverse.

    Float16 holds what is below 2^16. Magnitudes below 2^-95 are brought no further up than those, so that both stay
    float32.
    """
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 32)
    prescale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return prescale, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_half(x):
    """Return float32 x as float16; what is too large saturates, NaN stays NaN."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
