"""Rows of an MXFP4 matrix times a vector, accumulated in float32.

Blocks are int32 words [rows, K / 8], eight E2M1 elements each; scales are E8M0 bytes [rows, K / 32].
`gemv_fp4` takes float32 activations, `gemv_fp4_fp8` MXFP8 ones. The latter gives the same numbers two ways:
`tl.dot_scaled`, which gfx950 runs on its scaled matrix cores, or dequantized float32 products, which are exact too.
"""

import triton
import triton.language as tl

from common.fp4 import HALF_BIAS, e2m1_to_float32
from common.quant import GROUP, e8m0_to_float32, load_mxfp8

DOT_N = tl.constexpr(16)  # columns of the smallest scaled MFMA tile: the vector is the first, the rest are zeros


@triton.jit
def gemv_fp4(
    blocks_ptr,
    scales_ptr,
    x_ptr,
    row0,
    n_rows,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    x_scale_ptr=None,
    zero=0,
):
    """Rows row0 .. row0 + BLOCK_M of W @ x, float32 [BLOCK_M]; rows from n_rows on give 0.

    x_ptr float32 [K], or float8e4nv [K] with x_scale_ptr uint8 [K / 32]. Activations are meant to lie between 1e-19
    and 3e19 in magnitude: below they lose precision, beyond they overflow (see common/fp4.py). `zero`: see
    arch.opaque_zero.
    """
    rows = tl.arange(0, BLOCK_M)[:, None] + zero
    blocks_ptr += tl.cast(row0, tl.int64) * (K // 8)
    scales_ptr += tl.cast(row0, tl.int64) * (K // GROUP)
    acc = tl.zeros([BLOCK_M, BLOCK_K // GROUP], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        word = tl.arange(0, BLOCK_K // 8) + k0 // 8 + zero
        valid = word < K // 8
        mask = (row0 + rows < n_rows) & valid[None, :]
        words = tl.load(blocks_ptr + rows * (K // 8) + word[None, :], mask=mask, other=0)
        products = tl.zeros([BLOCK_M, BLOCK_K // 8], tl.float32)
        for i in tl.static_range(8):
            if x_scale_ptr is None:
                x = tl.load(x_ptr + word * 8 + i, mask=valid, other=0.0)
            else:
                x = load_mxfp8(x_ptr, x_scale_ptr, word * 8 + i, valid)
            products += e2m1_to_float32(words >> (4 * i)) * (x * HALF_BIAS)[None, :]
        group = tl.arange(0, BLOCK_K // GROUP) + k0 // GROUP + zero
        group_mask = (row0 + rows < n_rows) & (group < K // GROUP)[None, :]
        scales = tl.load(scales_ptr + rows * (K // GROUP) + group[None, :], mask=group_mask, other=0)
        sums = tl.sum(tl.reshape(products, (BLOCK_M, BLOCK_K // GROUP, GROUP // 8)), axis=2)
        acc += sums * HALF_BIAS * e8m0_to_float32(scales)
    return tl.sum(acc, axis=1)


@triton.jit
def gemv_fp4_fp8(
    blocks_ptr,
    scales_ptr,
    x_ptr,
    x_scale_ptr,
    row0,
    n_rows,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_SCALED: tl.constexpr,
    zero=0,
):
    """The same for x in MXFP8, on scaled matrix cores where DOT_SCALED says so."""
    if DOT_SCALED:
        acc = tl.zeros([BLOCK_M, DOT_N], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            acc = _dot_scaled(
                acc, blocks_ptr, scales_ptr, x_ptr, x_scale_ptr, row0, n_rows, k0, zero, K, BLOCK_M, BLOCK_K
            )
        return tl.sum(acc, axis=1)
    else:
        return gemv_fp4(blocks_ptr, scales_ptr, x_ptr, row0, n_rows, K, BLOCK_M, BLOCK_K, x_scale_ptr, zero)


@triton.jit
def _dot_scaled(
    acc,
    blocks_ptr,
    scales_ptr,
    x_ptr,
    x_scale_ptr,
    row0,
    n_rows,
    k0,
    zero,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_M, DOT_N] += W[:, k0 : k0 + BLOCK_K] @ x, whose vector stands in column 0."""
    local = tl.arange(0, BLOCK_M)[:, None] + zero
    rows = row0 + local < n_rows
    byte = (k0 // 2 + tl.arange(0, BLOCK_K // 2) + zero)[None, :]
    bytes_ptr = blocks_ptr.to(tl.pointer_type(tl.uint8)) + tl.cast(row0, tl.int64) * (K // 2)
    w = tl.load(bytes_ptr + local * (K // 2) + byte, mask=rows & (byte < K // 2), other=0)
    group = (tl.arange(0, BLOCK_K // GROUP) + k0 // GROUP + zero)[None, :]
    scale_ptr = scales_ptr + tl.cast(row0, tl.int64) * (K // GROUP)
    w_scale = tl.load(scale_ptr + local * (K // GROUP) + group, mask=rows & (group < K // GROUP), other=0)
    k = (k0 + tl.arange(0, BLOCK_K) + zero)[:, None]
    column = tl.arange(0, DOT_N)
    x = tl.load(x_ptr + k + column[None, :] * 0, mask=(k < K) & (column == 0)[None, :], other=0.0)
    x_scale = tl.load(
        x_scale_ptr + group + column[:, None] * 0, mask=(group < K // GROUP) & (column == 0)[:, None], other=0
    )
    return tl.dot_scaled(w, w_scale, "e2m1", x, x_scale, "e4m3", acc)
