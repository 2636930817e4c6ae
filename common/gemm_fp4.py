"""Rows of an MXFP4 matrix times many vectors, accumulated in float32.

`gemm_fp4` takes float16 vectors and decodes the matrix to float16: an element times 2^(its scale - base), with base the
largest scale of the matrix. That is exact for elements within 2^-22 of the largest possible one; smaller ones keep
their absolute precision. `gemm_fp4_fp8` multiplies MXFP8 vectors on scaled matrix cores.

A machine's PromptLayout says how a matrix lies in memory, and in which order its rows and columns come out of it: rows
as published (common/prompt_rows.py), or tiles of tensor core operands (common/sm90/prompt_tiles.py). In that order the
result's rows stand at `places`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.quant import GROUP

NAN_SCALE = tl.constexpr(255)
HALF_NAN = tl.constexpr(0x7E00)
# Exponent bits of the float16 2^14, for a scale equal to base: a decoded element lacks the 2^14.
BASE_EXPONENT = tl.constexpr(29)


class Fp4Matrix(NamedTuple):
    """Pointers to an MXFP4 matrix's elements and scales, and the largest of its scales."""

    ptr: Any
    scales_ptr: Any
    base: Any


class PromptLayout(NamedTuple):
    """How a machine's experts' matrices lie in memory, for products with many vectors."""

    vector_stride: Callable  # (k) -> elements from one vector to the next
    matrix_words: Callable  # (rows, k) -> int32 of a matrix's elements
    matrix_scales: Callable  # (rows, k, warps) -> items of a matrix's scales
    column_of: Callable  # (k) -> the column of a vector's element k
    in_columns: Callable  # (x [N, M], i0) -> elements i0 .. of vectors in an order of rising columns, those columns
    in_rows: Callable  # (acc [M, N]) -> a result in the order of the matrix's rows
    load: Callable  # (matrix, m0, k0, MATRIX, TILE, PACKED_WARPS) -> words, scales
    decode: Callable  # (words, half_scales of scales, NUM_WARPS) -> float16 [TILE.m, TILE.k] of what `load` returned


@triton.jit
def split_rows(acc, MACHINE: tl.constexpr):
    """Return (even rows, odd rows), [M / 2, N] each, of a result [M, N] that begins with an even row."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(MACHINE.prompts.in_rows(acc), (M // 2, 2, N)), (0, 2, 1)))


@triton.jit
def gemm_fp4(
    matrix,
    x_ptr,
    m0,
    x_rows,
    MATRIX: tl.constexpr,
    TILE: tl.constexpr,
    PACKED_WARPS: tl.constexpr,
    MACHINE: tl.constexpr,
):
    """Return places m0 .. m0 + TILE.m of W times vectors of x: for each tensor [N] of x_rows a float32 [TILE.m, N].

    `matrix` is W's Fp4Matrix; x_ptr float16 [.., vector_stride(k)], see column_of, zeros beyond k; PACKED_WARPS the
    warps that packed tiles were made for. m0 is a multiple of 16, TILE.m of 16 TILE.num_warps, TILE.k of 128. The
    result lacks a factor of 2^(base - 127). Places beyond the matrix hold finite numbers.
    """
    STRIDE: tl.constexpr = MACHINE.prompts.vector_stride(MATRIX.k)
    accs = _zeros(TILE.m, x_rows)
    for k0 in tl.range(0, STRIDE, TILE.k, num_stages=TILE.stages):
        words, scales = MACHINE.prompts.load(matrix, m0, k0, MATRIX, TILE, PACKED_WARPS)
        w = MACHINE.prompts.decode(words, half_scales(scales, matrix.base), TILE.num_warps)
        sums = ()
        for i in tl.static_range(len(x_rows)):
            x = _load_vectors(x_ptr, x_rows[i], k0, STRIDE, TILE.k)
            sums = sums + (tl.dot(w, tl.trans(x), accs[i]),)
        accs = sums
    return accs


@triton.jit
def _zeros(M: tl.constexpr, x_rows):
    """Return zeros [M, N] for each tensor of N vectors in x_rows."""
    sums = ()
    for i in tl.static_range(len(x_rows)):
        sums = sums + (tl.zeros([M, x_rows[i].shape[0]], tl.float32),)
    return sums


@triton.jit
def _load_vectors(x_ptr, row, k0, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return elements k0 .. k0 + BLOCK_K of rows of x, [N, BLOCK_K]."""
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    offset = row[:, None] * STRIDE + k
    if STRIDE % BLOCK_K == 0:
        return tl.load(x_ptr + offset)
    else:
        return tl.load(x_ptr + offset, mask=k < STRIDE, other=0.0)


@triton.jit
def half_scales(scales, base):
    """Return the float16 2^(14 + scale - base), or zero or NaN, twice in an int32."""
    bits = tl.where(scales == NAN_SCALE, HALF_NAN, tl.maximum(scales - base + BASE_EXPONENT, 0) << 10)
    return bits | bits << 16


@triton.jit
def for_words(scales):
    """Return each of the scales [M, G] for the four words of its group, [M, 4 G]."""
    M: tl.constexpr = scales.shape[0]
    G: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (M, G, 4)), (M, 4 * G))


@triton.jit
def as_half(bits):
    """Return the float16 in the lower half of each int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def join8(e):
    """Return eight tensors joined along three new last dimensions of two."""
    a, b = tl.join(e[0], e[4]), tl.join(e[2], e[6])
    c, d = tl.join(e[1], e[5]), tl.join(e[3], e[7])
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def gemm_fp4_fp8(matrix, x, m0, x_rows, MATRIX: tl.constexpr, TILE: tl.constexpr):
    """Return rows m0 .. m0 + TILE.m of W times vectors of x: for each tensor [N] of x_rows a float32 [TILE.m, N].

    `matrix` is W's Operand in rows, x that of MXFP8 vectors: float8e4nv [.., k] and uint8 [.., k / 32].
    """
    K: tl.constexpr = MATRIX.k
    row = tl.minimum(m0 + tl.arange(0, TILE.m), MATRIX.rows - 1)[:, None]
    bytes_ptr = matrix.ptr.to(tl.pointer_type(tl.uint8)) + row * (K // 2)
    scales_ptr = matrix.scales_ptr + row * (K // GROUP)
    accs = _zeros(TILE.m, x_rows)
    for k0 in tl.range(0, K, TILE.k, num_stages=TILE.stages):
        k = k0 + tl.arange(0, TILE.k)[None, :]
        byte = k0 // 2 + tl.arange(0, TILE.k // 2)[None, :]
        group = k0 // GROUP + tl.arange(0, TILE.k // GROUP)[None, :]
        inside = group < K // GROUP
        w = tl.load(bytes_ptr + byte, mask=byte < K // 2, other=0)
        w_scale = tl.load(scales_ptr + group, mask=inside, other=0)
        sums = ()
        for i in tl.static_range(len(x_rows)):
            elements = tl.load(x.ptr + x_rows[i][:, None] * K + k, mask=k < K, other=0.0)
            x_scale = tl.load(x.scales_ptr + x_rows[i][:, None] * (K // GROUP) + group, mask=inside, other=0)
            sums = sums + (tl.dot_scaled(w, w_scale, "e2m1", tl.trans(elements), x_scale, "e4m3", accs[i]),)
        accs = sums
    return accs
