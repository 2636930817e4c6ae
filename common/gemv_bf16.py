"""Rows of a bfloat16 matrix times a float32 vector, accumulated in float32."""

import triton
import triton.language as tl

from common.rmsnorm import load_normed


@triton.jit
def gemv_bf16(
    w_ptr, x_ptr, row0, n_rows, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, norm_ptr=None, rstd=None
):
    """Rows row0 .. row0 + BLOCK_M of W @ x, float32 [BLOCK_M]; rows from n_rows on give 0.

    w_ptr bfloat16 [n_rows, K]; x_ptr float32 [K]; with norm_ptr (float32 [K]) x is x * rstd * norm first.
    """
    rows = row0 + tl.arange(0, BLOCK_M)
    w_ptr += tl.cast(row0, tl.int64) * K
    local = tl.arange(0, BLOCK_M)[:, None] * K
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + local + k[None, :], mask=(rows < n_rows)[:, None] & (k < K)[None, :], other=0.0)
        if norm_ptr is None:
            x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        else:
            x = load_normed(x_ptr, norm_ptr, rstd, k, k < K)
        acc += w.to(tl.float32) * x[None, :]
    return tl.sum(acc, axis=1)
