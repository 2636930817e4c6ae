"""Experts' matrices in rows, as published, for products with many vectors: see common/gemm_fp4.py."""

import triton
import triton.language as tl

from common.gemm_fp4 import PromptLayout, as_half, for_words, join8
from common.quant import GROUP


@triton.constexpr_function
def vector_stride(k: int) -> int:
    """Elements from one vector's to the next one's."""
    return k


@triton.constexpr_function
def matrix_words(rows: int, k: int) -> int:
    """int32 of a matrix's elements."""
    return rows * k // 8


@triton.constexpr_function
def matrix_scales(rows: int, k: int, warps: int) -> int:
    """Bytes of a matrix's scales."""
    return rows * k // GROUP.value


@triton.jit
def column_of(k):
    """Where a vector's element k stands: in its place."""
    return k


@triton.jit
def in_columns(x, i0):
    """(x, columns): elements i0 .. of vectors, x [N, M]."""
    return x, i0 + tl.arange(0, x.shape[1])


@triton.jit
def in_rows(acc):
    """A result [M, N], whose rows are in order."""
    return acc


@triton.jit
def load(
    blocks_ptr,
    scales_ptr,
    m0,
    k0,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PACKED_WARPS: tl.constexpr,
):
    """(int32 words [BLOCK_M, BLOCK_K / 8], scales int32 [BLOCK_M, BLOCK_K / 32]), zeros beyond K."""
    row = tl.minimum(m0 + tl.arange(0, BLOCK_M), ROWS - 1)[:, None]
    word = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
    words = tl.load(blocks_ptr + row * (K // 8) + word, mask=word < K // 8, other=0)
    scales = tl.load(scales_ptr + row * (K // GROUP) + group, mask=group < K // GROUP, other=0)
    return words, scales.to(tl.int32)


@triton.jit
def decode(words, scales, NUM_WARPS: tl.constexpr):
    """float16 [M, 8 W] of int32 words [M, W] and half_scales [M, W / 4]."""
    scale = as_half(for_words(scales))
    e = ()
    for i in tl.static_range(8):
        nibble = words >> (4 * i)
        e = e + (as_half(((nibble & 8) << 12) | ((nibble & 7) << 9)) * scale,)
    return tl.reshape(join8(e), (words.shape[0], 8 * words.shape[1]))


ROWS = PromptLayout(vector_stride, matrix_words, matrix_scales, column_of, in_columns, in_rows, load, decode)
