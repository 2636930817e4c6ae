"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) of a vector held as a tuple of blocks, see load_vector.

The norm is a number times x * weight, so a GEMV can take x * weight and be scaled by rms_rstd afterwards: no program
has to wait for the whole vector's sum before it multiplies.
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
def multiply_blocks(a, b):
    """a * b, block by block."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks = blocks + (a[i] * b[i],)
    return blocks
