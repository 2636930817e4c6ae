"""Correct the arithmetic of Triton's interpreter, so that it computes the same numbers as compiled kernels."""

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from interpreter import formats

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle

_stock_convert_float = interpreter._convert_float
_stock_binary_op = Builder.binary_op
_stock_unary_op = Builder.unary_op
_stock_cast = Builder.cast_impl
_stock_dot = Builder.create_dot

_DECODE = {"bf16": formats.bf16_to_float32, "fp8e4nv": formats.E4M3.decode, "fp8e5": formats.E5M2.decode}
_ENCODE = {"bf16": formats.float32_to_bf16, "fp8e4nv": formats.E4M3.encode, "fp8e5": formats.E5M2.encode}
_NUMPY_FLOATS = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}
_NEAREST = (None, ir.ROUNDING_MODE.RTNE)


def decode(data, dtype):
    """Return the numbers in interpreter data of a scalar dtype: float32 for bf16 and fp8, else `data` itself."""
    decoder = _DECODE.get(dtype.name)
    return decoder(data) if decoder else data


def encode(values, dtype):
    """Return float numbers as interpreter data of a float dtype, rounded once to nearest even."""
    encoder = _ENCODE.get(dtype.name)
    if encoder is None:
        return values.astype(_NUMPY_FLOATS[dtype.name])
    if values.dtype == np.float64:
        values = formats.float64_to_odd_float32(values)
    return encoder(values.astype(np.float32, copy=False))


def _convert_float(data, source, target, rounding):
    # Stock: float32 -> bf16 and fp8 truncate or round wrongly, and do not saturate.
    is_known = all(dtype.name in _DECODE or dtype.name in _NUMPY_FLOATS for dtype in (source, target))
    if not is_known or rounding not in _NEAREST:
        return _stock_convert_float(data, source, target, rounding)
    if source == tl.float64 and target == tl.float16:
        return data.astype(np.float16)
    return encode(decode(data, source), target)


def _cast(self, source, target_type):
    # Stock: bf16 <-> float32 truncates; bf16 <-> integer, float16 and float64 work on the bit pattern.
    from_type, to_type = source.dtype.scalar, target_type.scalar
    if from_type.name not in _DECODE and to_type.name not in _ENCODE:
        return Handle(source.data.astype(interpreter._get_np_dtype(to_type)), to_type)
    values = decode(source.data, from_type)
    if not to_type.is_floating():
        return Handle(values.astype(interpreter._get_np_dtype(to_type)), to_type)
    if not from_type.is_floating():
        # Through float64, which holds every integer up to 2^53: one rounding, not two.
        values = values.astype(np.float64)
    return Handle(encode(values, to_type), to_type)


def _binary(self, lhs, rhs, op):
    # Stock: arithmetic, comparisons, min and max of bf16 work on bit patterns; comparisons keep the operands' dtype.
    dtype = lhs.dtype.scalar
    if dtype.name in _DECODE:
        values = op(decode(lhs.data, dtype), decode(rhs.data, rhs.dtype.scalar))
        return Handle(values, tl.int1) if values.dtype == bool else Handle(encode(values, dtype), dtype)
    result = _stock_binary_op(self, lhs, rhs, op)
    if result.data.dtype == bool:
        result.dtype = tl.int1
    return result


def _unary(self, arg, op):
    # Stock: works on the bit patterns of bf16.
    dtype = arg.dtype.scalar
    if dtype.name not in _DECODE:
        return _stock_unary_op(self, arg, op)
    return Handle(encode(op(decode(arg.data, dtype)), dtype), dtype)


def _ashr(self, lhs, rhs):
    # Stock 3.6: converts its operands in place to signed, and returns signed data with an unsigned dtype.
    signed = [interpreter._get_signed_np_dtype(h.data.dtype) for h in (lhs, rhs)]
    shifted = np.right_shift(lhs.data.astype(signed[0]), rhs.data.astype(signed[1]))
    return Handle(shifted.astype(lhs.data.dtype), lhs.dtype.scalar)


def _fma(self, x, y, z):
    # Stock 3.6: works on the bit patterns of bf16, and rounds float32 twice.
    dtype = z.dtype.scalar
    if dtype.name in _DECODE:
        operands = [decode(h.data, dtype).astype(np.float64) for h in (x, y, z)]
        return Handle(encode(operands[0] * operands[1] + operands[2], dtype), dtype)
    return Handle(formats.fused_multiply_add(x.data, y.data, z.data), dtype)


def _clamp(self, arg, low, high, propagate_nan):
    # Stock 3.6: keeps NaN whatever propagate_nan says; clips the bit patterns of bf16.
    if propagate_nan == ir.PROPAGATE_NAN.ALL:
        return _binary(self, _binary(self, arg, low, np.maximum), high, np.minimum)
    return _binary(self, _binary(self, arg, low, np.fmax), high, np.fmin)


def _get_bf16(self, value):
    # Stock 3.6: has no bf16 constants.
    return Handle(formats.float32_to_bf16(np.array([value], np.float32)), tl.bfloat16)


def _dot(self, a, b, accumulator, *precision):
    # Stock: multiplies the bit patterns of bf16, and is slow for float16, which misses BLAS.
    if not a.dtype.scalar.is_floating():
        return _stock_dot(self, a, b, accumulator, *precision)
    wide = np.float64 if accumulator.data.dtype == np.float64 else np.float32
    product = np.matmul(
        decode(a.data, a.dtype.scalar).astype(wide, copy=False), decode(b.data, b.dtype.scalar).astype(wide, copy=False)
    )
    dtype = accumulator.dtype.scalar
    total = product + decode(accumulator.data, dtype).astype(wide, copy=False)
    return Handle(encode(total, dtype), dtype)


def _scaled_operand(handle, element_format, scale, k_axis, pack_axis):
    """Return an operand's scaled values, float32 or, if a scale may take an element beyond float32, float64.

    Matrix cores scale the product, which stays in range.
    """
    if element_format == ir.ScaleDotElemTypeTY.E2M1:
        values = formats.unpack_e2m1(handle.data.view(np.uint8), handle.data.ndim + pack_axis)
    else:
        values = decode(handle.data, handle.dtype.scalar).astype(np.float32, copy=False)
    if scale is None:
        return values
    if scale.dtype.scalar.is_floating():
        factors = decode(scale.data, scale.dtype.scalar)
    else:
        codes = scale.data.view(np.uint8)
        factors = formats.E8M0_VALUES[codes]
        if codes.max() > 246:  # 448 * 2^(246 - 127) is a float32
            factors = factors.astype(np.float64)
    factors = np.repeat(factors, values.shape[k_axis] // factors.shape[-1], -1)
    return values * (factors if k_axis == -1 else np.swapaxes(factors, -1, -2))


def _dot_scaled(
    self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, fast_math, lhs_k_pack, rhs_k_pack, accumulator
):
    # Stock 3.6: is missing. Stock 3.9: decodes operands by wrong conversions.
    left = _scaled_operand(lhs, lhs_format, lhs_scale, -1, -1 if lhs_k_pack else -2)
    right = _scaled_operand(rhs, rhs_format, rhs_scale, -2, -2 if rhs_k_pack else -1)
    return Handle((np.matmul(left, right) + accumulator.data).astype(np.float32), tl.float32)


def _with_constexpr_formats(stock):
    def dot_scaled(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *rest):
        # Stock 3.6: reads `.value` of the formats, which are plain strings in the interpreter.
        return stock(self, lhs, lhs_scale, tl.constexpr(lhs_format), rhs, rhs_scale, tl.constexpr(rhs_format), *rest)

    return dot_scaled


def install():
    interpreter._convert_float = _convert_float
    Builder.cast_impl = _cast
    Builder.binary_op = _binary
    Builder.unary_op = _unary
    Builder.create_ashr = _ashr
    Builder.create_fma = _fma
    Builder.create_clampf = _clamp
    # Stock 3.6: the variants that should ignore NaN return it.
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    Builder.get_bf16 = _get_bf16
    Builder.create_dot = _dot
    Builder.create_dot_scaled = _dot_scaled
    if triton.__version__.startswith("3.6."):
        semantic = interpreter.TritonSemantic
        semantic.dot_scaled = _with_constexpr_formats(semantic.dot_scaled)
