"""Convert exactly between float32 and the narrow float formats that numpy lacks: bf16, fp8 e4m3/e5m2, e2m1, e8m0.

Encoded values are bit patterns (uint16 or uint8), as in Triton's interpreter. Rounding is to nearest even.
"""

import numpy as np

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E8M0_VALUES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32("nan")).astype(np.float32)


def bf16_to_float32(bits):
    """Return uint16 bf16 patterns as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values):
    """Return float32 values as uint16 bf16 patterns; overflow gives infinity, NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    encoded = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        encoded[nan] = ((bits[nan] >> 16) | 0x40).astype(np.uint16)
    return encoded


def float64_to_odd_float32(values):
    """Return float64 values as float32, rounded to odd, so that another rounding to a narrower format is correct."""
    nearest = values.astype(np.float32)
    inexact = nearest.astype(np.float64) != values
    truncated = nearest.view(np.uint32) - (np.abs(nearest) > np.abs(values))
    return (truncated.astype(np.uint32) | inexact).view(np.float32)


class Float8:
    """An fp8 format with a sign bit, `exponent_bits` and `mantissa_bits`.

    largest, nan and infinity are the codes of the largest finite value, of NaN and of infinity, if there is one.
    """

    def __init__(self, exponent_bits, mantissa_bits, largest, nan, infinity=None):
        self.mantissa_bits = mantissa_bits
        self.bias = (1 << (exponent_bits - 1)) - 1
        self.largest = largest
        self.nan = nan
        codes = np.arange(128)
        exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
        significand = np.where(exponent == 0, mantissa, mantissa + (1 << mantissa_bits))
        positive = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - self.bias - mantissa_bits)
        positive[codes > largest] = np.nan
        if infinity is not None:
            positive[infinity] = np.inf
        self.values = np.concatenate([positive, -positive]).astype(np.float32)

    def decode(self, codes):
        """Return uint8 codes as float32, exactly."""
        return self.values[codes]

    def encode(self, values):
        """Return float32 values as uint8 codes; magnitudes above the largest finite value, and infinity, saturate."""
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        magnitude = bits & 0x7FFFFFFF
        dropped = 23 - self.mantissa_bits
        normal = ((magnitude + ((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & 1)) >> dropped).astype(np.int64)
        normal -= (127 - self.bias) << self.mantissa_bits
        smallest_normal_bits = (128 - self.bias) << 23
        steps = np.minimum(magnitude, smallest_normal_bits).view(np.float32) * np.float32(
            2.0 ** (self.bias - 1 + self.mantissa_bits)
        )
        code = np.where(magnitude < smallest_normal_bits, np.rint(steps).astype(np.int64), normal)
        code = np.minimum(code, self.largest)
        code = np.where(magnitude > 0x7F800000, self.nan, code)
        return (code | (bits >> 31 << 7)).astype(np.uint8)


E4M3 = Float8(4, 3, largest=0x7E, nan=0x7F)
E5M2 = Float8(5, 2, largest=0x7B, nan=0x7F, infinity=0x7C)


_E2M1_PAIRS = np.stack([np.tile(E2M1_VALUES, 16), np.repeat(E2M1_VALUES, 16)], -1)


def unpack_e2m1(packed, axis):
    """Return the float32 values of uint8 with two E2M1 values each, the first in the low bits; `axis` doubles."""
    pairs = np.moveaxis(_E2M1_PAIRS.take(packed, 0), -1, axis + 1)
    shape = list(packed.shape)
    shape[axis] *= 2
    return pairs.reshape(shape)


def fused_multiply_add(x, y, z):
    """Return x * y + z, rounded once for float32 and float16 arrays and twice for float64."""
    narrow = z.dtype
    product = x.astype(np.float64) * y.astype(np.float64)
    addend = z.astype(np.float64)
    total = product + addend
    if narrow == np.float64:
        return total
    # The product is exact in float64. The error of the sum (Knuth's TwoSum) tells on which side of it the exact value
    # lies. Rounding the sum to odd makes the final rounding correct.
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = np.isfinite(error) & np.isfinite(total) & (error != 0)
    overshot = inexact & ((error < 0) != (total < 0))
    odd = (total.view(np.uint64) - overshot.astype(np.uint64)) | inexact.astype(np.uint64)
    return odd.view(np.float64).astype(narrow)
