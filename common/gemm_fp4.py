"""Rows of an MXFP4 matrix times many vectors, accumulated in float32.

`gemm_fp4` takes float16 vectors and decodes the matrix to float16: an element times 2^(its scale - BASE), with BASE the
largest scale of the matrix. That is exact for elements within 2^-22 of the largest possible one; smaller ones keep
their absolute precision. `gemm_fp4_fp8` takes MXFP8 vectors to scaled matrix cores.

How a machine keeps a matrix, and in which order its rows and columns come out of it, is for its PromptLayout to say:
rows as published (common/prompt_rows.py), or tiles of tensor core operands (common/sm90/prompt_tiles.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl

from common.quant import GROUP

NAN_SCALE = tl.constexpr(255)
HALF_NAN = tl.constexpr(0x7E00)
# Bits of a float16 that is 2^14 times a scale of BASE: a decoded element lacks 2^14.
TOP = tl.constexpr(29)


class PromptLayout(NamedTuple):
    """What a machine's experts' matrices are to a product with many vectors."""

    vector_stride: Callable  # (k) -> elements from one vector's to the next one's
    matrix_words: Callable  # (rows, k) -> int32 of a matrix's elements
    matrix_scales: Callable  # (rows, k, warps) -> items of a matrix's scales
    column_of: Callable  # (k) -> where a vector's element k stands
    in_columns: Callable  # (x [N, M], i0) -> elements i0 .. of vectors in an order of rising columns, those columns
    in_rows: Callable  # (acc [M, N]) -> a result in the order of the matrix's rows
    load: Callable  # (blocks_ptr, scales_ptr, m0, k0, ROWS, K, BLOCK_M, BLOCK_K, NUM_WARPS, PACKED_WARPS)
    decode: Callable  # (words, scales, NUM_WARPS), what `load` gave and half_scales of it -> float16 [BLOCK_M, BLOCK_K]


@triton.jit
def split_rows(acc, MACHINE: tl.constexpr):
    """(even rows, odd rows), [M / 2, N] each, of a result [M, N] that begins with an even row."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(MACHINE.prompts.in_rows(acc), (M // 2, 2, N)), (0, 2, 1)))


@triton.jit
def gemm_fp4(
    blocks_ptr,
    scales_ptr,
    base,
    x_ptr,
    m0,
    x_rows,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    PACKED_WARPS: tl.constexpr,
    MACHINE: tl.constexpr,
):
    """Places m0 .. m0 + TILE.m of W times vectors of x: a tuple of float32 [TILE.m, N] for x_rows, a tuple of [N].

    x_ptr float16 [.., vector_stride(K)], see column_of, zeros beyond K; m0 is a multiple of 16, base the matrix's
    largest scale, PACKED_WARPS those that packed tiles were made for; TILE.m is a multiple of 16 TILE.num_warps, TILE.k
    of 128. The result lacks a factor of 2^(base - 127). Places beyond the matrix hold something finite.
    """
    STRIDE: tl.constexpr = MACHINE.prompts.vector_stride(K)
    accs = _zeros(TILE.m, x_rows)
    for k0 in tl.range(0, STRIDE, TILE.k, num_stages=TILE.stages):
        words, scales = MACHINE.prompts.load(
            blocks_ptr, scales_ptr, m0, k0, ROWS, K, TILE.m, TILE.k, TILE.num_warps, PACKED_WARPS
        )
        w = MACHINE.prompts.decode(words, half_scales(scales, base), TILE.num_warps)
        sums = ()
        for i in tl.static_range(len(x_rows)):
            x = _load_vectors(x_ptr, x_rows[i], k0, STRIDE, TILE.k)
            sums = sums + (tl.dot(w, tl.trans(x), accs[i]),)
        accs = sums
    return accs


@triton.jit
def _zeros(M: tl.constexpr, x_rows):
    """A sum for each of the vectors."""
    sums = ()
    for i in tl.static_range(len(x_rows)):
        sums = sums + (tl.zeros([M, x_rows[i].shape[0]], tl.float32),)
    return sums


@triton.jit
def _load_vectors(x_ptr, row, k0, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Elements k0 .. k0 + BLOCK_K of rows of x: [N, BLOCK_K]."""
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    at = row[:, None] * STRIDE + k
    if STRIDE % BLOCK_K == 0:
        return tl.load(x_ptr + at)
    else:
        return tl.load(x_ptr + at, mask=k < STRIDE, other=0.0)


@triton.jit
def half_scales(scales, base):
    """The float16 2^(14 + scale - base), or zero or NaN, twice in an int32."""
    bits = tl.where(scales == NAN_SCALE, HALF_NAN, tl.maximum(scales - base + TOP, 0) << 10)
    return bits | bits << 16


@triton.jit
def for_words(scales):
    """[M, G] -> [M, 4 G]: each scale for the four words of its group."""
    M: tl.constexpr = scales.shape[0]
    G: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (M, G, 4)), (M, 4 * G))


@triton.jit
def as_half(bits):
    """The float16 in the lower half of each int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def join8(e):
    """Eight tensors side by side in three last dimensions of two."""
    a, b = tl.join(e[0], e[4]), tl.join(e[2], e[6])
    c, d = tl.join(e[1], e[5]), tl.join(e[3], e[7])
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def gemm_fp4_fp8(
    blocks_ptr,
    scales_ptr,
    x_ptr,
    x_scale_ptr,
    m0,
    x_rows,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Products as of gemm_fp4: a matrix in rows, x float8e4nv [.., K], x_scale_ptr uint8 [.., K / 32]; all factors."""
    row = tl.minimum(m0 + tl.arange(0, TILE.m), ROWS - 1)[:, None]
    bytes_ptr = blocks_ptr.to(tl.pointer_type(tl.uint8)) + row * (K // 2)
    scales_ptr += row * (K // GROUP)
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
            x = tl.load(x_ptr + x_rows[i][:, None] * K + k, mask=k < K, other=0.0)
            x_scale = tl.load(x_scale_ptr + x_rows[i][:, None] * (K // GROUP) + group, mask=inside, other=0)
            sums = sums + (tl.dot_scaled(w, w_scale, "e2m1", tl.trans(x), x_scale, "e4m3", accs[i]),)
        accs = sums
    return accs
