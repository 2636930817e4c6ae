"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), split so that a GEMV can apply it while it reads its input."""

import triton
import triton.language as tl


@triton.jit
def rms_rstd(x_ptr, SIZE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of float32 x [SIZE], as a float32 scalar. BLOCK: a power of two, at least SIZE."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < SIZE, other=0.0)
    return 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / SIZE + EPS)


@triton.jit
def load_normed(x_ptr, weight_ptr, rstd, offsets, mask):
    """x * rstd * weight at `offsets`, float32, zeros where masked."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    return x * rstd * tl.load(weight_ptr + offsets, mask=mask, other=0.0)
