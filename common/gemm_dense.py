"""Rows of a dense matrix times many vectors: bfloat16 products, accumulated in float32.

The matrix is bfloat16 or E4M3 (format: see gemv_dense.py), which bfloat16 holds exactly; the vectors are pairs of
bfloat16 terms (common/operands.py), so that little of float32's precision is lost.
"""

import triton
import triton.language as tl

from common.gemv_dense import scale_stride
from common.quant import GROUP, e8m0_to_float32


@triton.jit
def gemm_dense(matrix, x, row0, column0, n_columns, MATRIX: tl.constexpr, TILE: tl.constexpr):
    """Return rows row0 .. of W times columns column0 .. of x^T, float32 [TILE.m, TILE.n].

    `matrix` is W's Operand, given as int32, x a Bf16Pair of vectors [n_columns, k], TILE a host.tuning.Tile. Rows and
    columns beyond the last repeat the last.
    """
    K: tl.constexpr = MATRIX.k
    BLOCK_M: tl.constexpr = TILE.m
    BLOCK_N: tl.constexpr = TILE.n
    row = tl.minimum(row0 + tl.arange(0, BLOCK_M), MATRIX.rows - 1)
    column = tl.minimum(column0 + tl.arange(0, BLOCK_N), n_columns - 1)
    element = tl.bfloat16 if MATRIX.format == "bf16" else tl.float8e4nv
    w_ptr = matrix.ptr.to(tl.pointer_type(element)) + row.to(tl.int64)[:, None] * K
    column = column.to(tl.int64)[:, None] * K
    high_ptr, low_ptr = x.high_ptr + column, x.low_ptr + column
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, TILE.k, num_stages=TILE.stages):
        k = k0 + tl.arange(0, TILE.k)[None, :]
        if K % TILE.k == 0:
            w, high, low = tl.load(w_ptr + k), tl.load(high_ptr + k), tl.load(low_ptr + k)
        else:
            w = tl.load(w_ptr + k, mask=k < K, other=0.0)
            high = tl.load(high_ptr + k, mask=k < K, other=0.0)
            low = tl.load(low_ptr + k, mask=k < K, other=0.0)
        w = w.to(tl.bfloat16)
        if MATRIX.format == "fp8-32":
            w = _scale_groups(w, matrix.scales_ptr, row, k0, K)
        acc = tl.dot(w, tl.trans(high), acc)
        acc = tl.dot(w, tl.trans(low), acc)
    if MATRIX.format == "fp8-row":
        acc *= tl.load(matrix.scales_ptr + row)[:, None]
    return acc


@triton.jit
def _scale_groups(w, scales_ptr, row, k0, K: tl.constexpr):
    """Return E4M3 elements as bfloat16 [M, BLOCK_K] times their groups' scales, exact unless it leaves the range."""
    BLOCK_M: tl.constexpr = w.shape[0]
    BLOCK_K: tl.constexpr = w.shape[1]
    STRIDE: tl.constexpr = scale_stride(K, "fp8-32")
    group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
    scales = tl.load(scales_ptr + row.to(tl.int64)[:, None] * STRIDE + group, mask=group < K // GROUP, other=0)
    groups = tl.reshape(w.to(tl.float32), (BLOCK_M, BLOCK_K // GROUP, GROUP))
    return tl.reshape(groups * e8m0_to_float32(scales)[:, :, None], (BLOCK_M, BLOCK_K)).to(tl.bfloat16)
