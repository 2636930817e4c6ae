"""Rows of a dense matrix times many vectors: bfloat16 products, accumulated in float32.

The matrix is bfloat16 or E4M3 (FORMAT: see gemv_dense.py), which bfloat16 holds exactly; the vectors are bfloat16 parts
(common/parts.py), so that little of float32's precision is lost.
"""

import triton
import triton.language as tl

from common.gemv_dense import scale_stride
from common.quant import GROUP, e8m0_to_float32


@triton.jit
def gemm_dense(
    w_ptr,
    scales_ptr,
    high_ptr,
    low_ptr,
    row0,
    column0,
    n_columns,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows row0 .. of W times columns column0 .. of x^T, float32 [BLOCK_M, BLOCK_N].

    w_ptr int32, a matrix [ROWS, K] in FORMAT; high_ptr, low_ptr bfloat16 [n_columns, K], the parts of x. Rows and
    columns beyond the last are repeated ones.
    """
    row = tl.minimum(row0 + tl.arange(0, BLOCK_M), ROWS - 1)
    column = tl.minimum(column0 + tl.arange(0, BLOCK_N), n_columns - 1)
    element = tl.bfloat16 if FORMAT == "bf16" else tl.float8e4nv
    w_ptr = w_ptr.to(tl.pointer_type(element)) + row.to(tl.int64)[:, None] * K
    column = column.to(tl.int64)[:, None] * K
    high_ptr, low_ptr = high_ptr + column, low_ptr + column
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        if K % BLOCK_K == 0:
            w, high, low = tl.load(w_ptr + k), tl.load(high_ptr + k), tl.load(low_ptr + k)
        else:
            w = tl.load(w_ptr + k, mask=k < K, other=0.0)
            high = tl.load(high_ptr + k, mask=k < K, other=0.0)
            low = tl.load(low_ptr + k, mask=k < K, other=0.0)
        w = w.to(tl.bfloat16)
        if FORMAT == "fp8-32":
            w = _scale_groups(w, scales_ptr, row, k0, K, BLOCK_M, BLOCK_K)
        acc = tl.dot(w, tl.trans(high), acc)
        acc = tl.dot(w, tl.trans(low), acc)
    if FORMAT == "fp8-row":
        acc *= tl.load(scales_ptr + row)[:, None]
    return acc


@triton.jit
def _scale_groups(w, scales_ptr, row, k0, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """E4M3 elements as bfloat16 [BLOCK_M, BLOCK_K] times their groups' scales, exact unless it leaves the range."""
    STRIDE: tl.constexpr = scale_stride(K, "fp8-32")
    group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
    scales = tl.load(scales_ptr + row.to(tl.int64)[:, None] * STRIDE + group, mask=group < K // GROUP, other=0)
    groups = tl.reshape(w.to(tl.float32), (BLOCK_M, BLOCK_K // GROUP, GROUP))
    return tl.reshape(groups * e8m0_to_float32(scales)[:, :, None], (BLOCK_M, BLOCK_K)).to(tl.bfloat16)
