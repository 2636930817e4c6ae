"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) of a vector held as a tuple of blocks, see Dense.load_vector.

The norm is a number times x * weight. A GEMV takes x * weight times that number's power of two, which is exact, and its
product is multiplied by the remaining factor: see normed_blocks.
"""

import triton
import triton.language as tl


@triton.jit
def rms_rstd(x, SIZE: tl.constexpr, EPS: tl.constexpr):
    """Return 1 / sqrt(mean(x^2) + eps), a float32 scalar, of a vector of SIZE elements that is 0 beyond SIZE.

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
    """Return max |x| of a vector's blocks."""
    largest = tl.abs(x[0])
    for i in tl.static_range(1, len(x)):
        largest = tl.maximum(largest, tl.abs(x[i]))
    return tl.max(largest, axis=0)


@triton.jit
def add_blocks(a, b):
    """Return a + b, block by block."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks = blocks + (a[i] + b[i],)
    return blocks


@triton.jit
def scale_blocks(x, factor):
    """Return x * factor, block by block; factor is a number."""
    blocks = ()
    for i in tl.static_range(len(x)):
        blocks = blocks + (x[i] * factor,)
    return blocks


@triton.jit
def multiply_blocks(a, b):
    """Return a * b, block by block."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks = blocks + (a[i] * b[i],)
    return blocks


@triton.jit
def normed_blocks(x, weight, rstd, PRESCALE: tl.constexpr = 1.0):
    """Return (blocks, factor) whose product is the RMSNorm x * rstd * weight; factor * PRESCALE is from 1 to 2.

    PRESCALE is a power of two. A matrix product with the blocks overflows no sooner than one with PRESCALE times the
    norm, however large x is; where x is so large that rstd is 0 they are zeros.
    """
    bits = rstd.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    factor = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return multiply_blocks(scale_blocks(x, power * PRESCALE), weight), factor * (1.0 / PRESCALE)
