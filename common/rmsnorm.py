"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) of a vector held as a tuple of blocks, see load_vector.

The norm is a number times x * weight. A GEMV takes x * weight times that number's power of two, which is exact, and is
scaled by the rest of it afterwards: see normed_blocks.
"""

import triton
import triton.language as tl


@triton.jit
def rms_rstd(x, SIZE: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a vector of SIZE elements, as a float32 scalar. What lies beyond SIZE must be 0.

    Blocks may have a first dimension of copies.
    """
    squares = x[0] * x[0]
    for i in tl.static_range(1, len(x)):
        squares += x[i] * x[i]
    total = tl.sum(squares, axis=len(squares.shape) - 1)
    if len(squares.shape) > 1:
        total = tl.max(total, axis=0)
    return 1.0 / tl.sqrt(total / SIZE + EPS)


@triton.jit
def largest_magnitude(x):
    """max |x| of a vector."""
    largest = tl.abs(x[0])
    for i in tl.static_range(1, len(x)):
        largest = tl.maximum(largest, tl.abs(x[i]))
    return tl.max(largest, axis=0)


@triton.jit
def add_blocks(a, b):
    """a + b, block by block."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks = blocks + (a[i] + b[i],)
    return blocks


@triton.jit
def scale_blocks(x, factor):
    """x * factor, a number, block by block."""
    blocks = ()
    for i in tl.static_range(len(x)):
        blocks = blocks + (x[i] * factor,)
    return blocks


@triton.jit
def multiply_blocks(a, b):
    """a * b, block by block."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks = blocks + (a[i] * b[i],)
    return blocks


@triton.jit
def normed_blocks(x, weight, rstd, UNIT: tl.constexpr = 1.0):
    """(blocks, factor), whose products are the RMSNorm x * rstd * weight; factor is from 1 to 2, but for UNIT.

    The blocks come times UNIT, a power of two. A product with them overflows no sooner than one with the norm, however
    large x is; and they are zeros where x is so large that rstd is 0.
    """
    bits = rstd.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    factor = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return multiply_blocks(scale_blocks(x, power * UNIT), weight), factor * (1.0 / UNIT)
