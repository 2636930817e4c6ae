"""MXFP4: E2M1 elements, eight to an int32 word, lowest nibble first."""

import triton
import triton.language as tl

# A nibble's three magnitude bits, put at bits 22..24 of a float32, are its value times 2^-126, subnormals included.
# Half of the missing 2^126 is given to the activations, so that no product is subnormal, half to the sum.
HALF_BIAS = tl.constexpr(2.0**63)


@triton.jit
def e2m1_words_to_float32(words):
    """int32 [...] -> float32 [..., 8]: the eight elements of each word times 2^-126."""
    nibble = tl.expand_dims(words, -1) >> (4 * tl.arange(0, 8))
    return (((nibble & 8) << 28) | ((nibble & 7) << 22)).to(tl.float32, bitcast=True)
