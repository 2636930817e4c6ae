"""float32 operands of matrix products on matrix cores that know no float32."""

import triton
import triton.language as tl

BF16_MAX = tl.constexpr(3.3895313892515355e38)


@triton.jit
def two_parts(x):
    """bfloat16 (high, low) whose sum is float32 x to 16 bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def store_two_parts(high_ptr, low_ptr, at, x, mask):
    """Store two_parts of x; what bfloat16 would round to infinity is its largest number and the rest."""
    high = tl.clamp(x, -BF16_MAX, BF16_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.bfloat16)
    tl.store(high_ptr + at, high, mask=mask)
    tl.store(low_ptr + at, (x - high.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit
def half_unit(largest):
    """(unit, scale): the power of two that brings `largest`, a magnitude, to 2^14 to 2^15 of float16; what undoes it.

    What is below 2^-95 is brought no further up, so that both stay float32.
    """
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 32)
    unit = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return unit, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_half(x):
    """float32 x as float16; what is too large saturates, NaN stays NaN."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
