"""Experts' matrices in rows, as published, for products with many vectors: see common/gemm_fp4.py."""

import triton
import triton.language as tl

from common.gemm_fp4 import PromptLayout, as_half, for_words, join8
from common.quant import GROUP


@triton.constexpr_function
def vector_stride(k: int) -> int:
    """Return the elements from one vector to the next."""
    return k


@triton.constexpr_function
def matrix_words(rows: int, k: int) -> int:
    """Return the int32 of a matrix's elements."""
    return rows * k // 8


@triton.constexpr_function
def matrix_scales(rows: int, k: int, warps: int) -> int:
    """Return the bytes of a matrix's scales."""
    return rows * k // GROUP.value


@triton.jit
def column_of(k):
    """Return the column of a vector's element k, which is k."""
    return k


@triton.jit
def in_columns(x, i0):
    """Return elements i0 .. of vectors, x [N, M], unchanged, and their columns [M]."""
    return x, i0 + tl.arange(0, x.shape[1])


@triton.jit
def in_rows(acc):
    """Return a result [M, N], whose rows are in order already."""
    return acc


@triton.jit
def load(matrix, m0, k0, MATRIX: tl.constexpr, TILE: tl.constexpr, PACKED_WARPS: tl.constexpr):
    """Return (int32 words [TILE.m, TILE.k / 8], scales int32 [TILE.m, TILE.k / 32]), zeros beyond k."""
    K: tl.constexpr = MATRIX.k
    row = tl.minimum(m0 + tl.arange(0, TILE.m), MATRIX.rows - 1)[:, None]
    word = k0 // 8 + tl.arange(0, TILE.k // 8)[None, :]
    group = k0 // GROUP + tl.arange(0, TILE.k // GROUP)[None, :]
    words = tl.load(matrix.ptr + row * (K // 8) + word, mask=word < K // 8, other=0)
    scales = tl.load(matrix.scales_ptr + row * (K // GROUP) + group, mask=group < K // GROUP, other=0)
    return words, scales.to(tl.int32)


@triton.jit
def decode(words, scales, NUM_WARPS: tl.constexpr):
    """Return float16 [M, 8 W] of int32 words [M, W] and half_scales [M, W / 4]."""
    scale = as_half(for_words(scales))
    e = ()
    for i in tl.static_range(8):
        nibble = words >> (4 * i)
        e = e + (as_half(((nibble & 8) << 12) | ((nibble & 7) << 9)) * scale,)
    return tl.reshape(join8(e), (words.shape[0], 8 * words.shape[1]))


ROWS = PromptLayout(vector_stride, matrix_words, matrix_scales, column_of, in_columns, in_rows, load, decode)
