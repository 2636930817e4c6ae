"""E8M0 scales and MXFP8 activations (OCP Microscaling Formats v1.0)."""

import triton
import triton.language as tl

GROUP = tl.constexpr(32)  # elements that share a scale
E4M3_MAX = tl.constexpr(448.0)
E4M3_EMAX = tl.constexpr(8)  # exponent of E4M3's largest binade


@triton.jit
def e8m0_to_float32(e8m0):
    """Return 2^(e8m0 - 127) of an integer tensor 0 .. 255 as float32; 255 is NaN."""
    e8m0 = e8m0.to(tl.int32)
    bits = tl.where(e8m0 == 0, 1 << 22, e8m0 << 23)  # 2^-127 is a subnormal float32
    return tl.where(e8m0 == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_halves(a, b):
    """Return two float32 powers of two of like size whose product is that of two E8M0 scales; NaN if a scale is NaN.

    A number multiplied by one and then the other leaves float32 only if the result does.
    """
    total = a.to(tl.int32) + b.to(tl.int32)
    is_nan = (a.to(tl.int32) == 255) | (b.to(tl.int32) == 255)
    low = tl.where(is_nan, 255, total >> 1)
    return e8m0_to_float32(low), e8m0_to_float32(tl.where(is_nan, 255, total - (total >> 1)))


@triton.jit
def quantize_mxfp8(x):
    """Quantize float32 x [N, GROUP] row by row; return E4M3 elements [N, GROUP] and E8M0 scales uint8 [N]."""
    e8m0 = mxfp8_scale(tl.max(tl.abs(x), axis=1))
    return to_mxfp8(x, e8m0[:, None]), e8m0.to(tl.uint8)


@triton.jit
def mxfp8_scale(amax):
    """Return the E8M0 scale, int32, of elements with largest magnitude `amax`: 2^(floor(log2(amax)) - 8)."""
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 0xFF  # floor(log2(amax)) + 127
    return tl.maximum(exponent - E4M3_EMAX, 0)


@triton.jit
def to_mxfp8(x, e8m0):
    """Return float32 x / scale as E4M3; values beyond +-448 saturate, as the specification requires."""
    to_unit = ((254 - e8m0) << 23).to(tl.float32, bitcast=True)  # 2^(127 - e8m0)
    scaled = tl.clamp(x * to_unit, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(tl.float8e4nv)


@triton.jit
def dequantize_mxfp8(elements, e8m0):
    """Return float32 [N, GROUP] of the elements and scales that quantize_mxfp8 returns."""
    return elements.to(tl.float32) * e8m0_to_float32(e8m0)[:, None]


@triton.jit
def round_to_mxfp8(x):
    """Return float32 x rounded to MXFP8; x has any shape with whole groups in its last dimension."""
    groups = tl.reshape(x, (x.numel // GROUP, GROUP))
    elements, scale = quantize_mxfp8(groups)
    return tl.reshape(dequantize_mxfp8(elements, scale), x.shape)


@triton.jit
def load_mxfp8(x_ptr, scale_ptr, offsets, mask):
    """Load E4M3 x at `offsets` times its E8M0 scales at offsets // GROUP, as float32; zeros outside the mask."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return x * e8m0_to_float32(tl.load(scale_ptr + offsets // GROUP, mask=mask, other=0))
