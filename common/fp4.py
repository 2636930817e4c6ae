"""E2M1, the 4-bit elements of MXFP4 (OCP Microscaling Formats v1.0)."""

import triton
import triton.language as tl

# A nibble's three magnitude bits at bits 22..24 of a float32 are its value times 2^-126, subnormals included.
# Activations are multiplied by half of the missing 2^126, so that no product is subnormal, and sums by the other half.
HALF_BIAS = tl.constexpr(2.0**63)


@triton.jit
def e2m1_words_to_float32(words):
    """Return the eight E2M1 elements of each int32 times 2^-126, as a tuple of float32, lowest bits first."""
    return (
        e2m1_to_float32(words),
        e2m1_to_float32(words >> 4),
        e2m1_to_float32(words >> 8),
        e2m1_to_float32(words >> 12),
        e2m1_to_float32(words >> 16),
        e2m1_to_float32(words >> 20),
        e2m1_to_float32(words >> 24),
        e2m1_to_float32(words >> 28),
    )


@triton.jit
def e2m1_to_float32(nibble):
    """Return the E2M1 element in the low four bits of each int32 times 2^-126, as float32; higher bits are ignored."""
    return (((nibble & 8) << 28) | ((nibble & 7) << 22)).to(tl.float32, bitcast=True)
