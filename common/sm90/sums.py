"""Rows' sums over the warps of a program, through shared memory behind the ring.

Triton's own reductions exchange between warps with two or three barriers each and, as layouts differ, several times for
one sum; here each warp leaves its part, and after one barrier whoever needs a row adds its parts up.
"""

import triton
import triton.language as tl

from common.sm90 import ptx
from common.sm90.tiles import PAIRS


@triton.constexpr_function
def sum_words(tuning) -> int:
    """float32 that a program needs for the tiles whose sums it exchanges together."""
    dense, experts = tuning.dense, tuning.experts
    rows = dense.step_tiles * max(dense.qkv_rows, dense.o_rows, dense.head_rows)
    return max(rows * dense.threads_per_row // 32, experts.step_tiles * 2 * PAIRS.value * tuning.num_warps)


@triton.jit
def leave_dense(sums, number, acc, TILES: tl.constexpr):
    """Leave the rows of tile number 0 .. TILES - 1, as gemv.multiply_rows has them in acc [PART, COPIES, THREADS]."""
    PART: tl.constexpr = acc.shape[0]
    COPIES: tl.constexpr = acc.shape[1]
    WARPS: tl.constexpr = acc.shape[2] // 32
    ROWS: tl.constexpr = PART * COPIES
    parts = tl.sum(tl.reshape(acc, (PART, COPIES, WARPS, 32)), axis=3, keep_dims=True)
    row = tl.arange(0, PART)[:, None, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None]
    # By all lanes of a warp: in this shape Triton has the sums, in a smaller one it would exchange them first.
    lane = tl.arange(0, 32)[None, None, None, :]
    at = sums + 4 * ((warp * TILES + number) * ROWS + row + 0 * lane)
    ptx.store_float(at, parts + tl.zeros([PART, COPIES, WARPS, 32], tl.float32))


@triton.jit
def collect_dense(sums, N: tl.constexpr, WARPS: tl.constexpr):
    """The rows of a batch, float32 [N]; WARPS shared each of them."""
    tl.debug_barrier()
    at = sums + 4 * tl.arange(0, N)
    y = ptx.load_float(at)
    for warp in tl.static_range(1, WARPS):
        y += ptx.load_float(at + 4 * N * warp)
    return y


@triton.jit
def leave_tile(sums, number, even, odd, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Leave the rows of tile number 0 .. TILES - 1, as tile_product.multiply_tile has them."""
    even = tl.sum(tl.reshape(even, (WARPS, PAIRS, 4)), axis=2)
    odd = tl.sum(tl.reshape(odd, (WARPS, PAIRS, 4)), axis=2)
    N: tl.constexpr = TILES * PAIRS
    warp, pair = tl.arange(0, WARPS)[:, None], tl.arange(0, PAIRS)[None, :]
    at = sums + 4 * (warp * 2 * N + number * PAIRS + pair)
    ptx.store_float(at, even)
    ptx.store_float(at + 4 * N, odd)


@triton.jit
def collect_tiles(sums, TILES: tl.constexpr, WARPS: tl.constexpr):
    """(even, odd) rows of a batch, float32 [8 TILES] each: 0, 2, ... 14 of the first tile, of the next one, ..."""
    tl.debug_barrier()
    N: tl.constexpr = TILES * PAIRS
    at = sums + 4 * tl.arange(0, N)
    even, odd = ptx.load_float(at), ptx.load_float(at + 4 * N)
    for warp in tl.static_range(1, WARPS):
        even += ptx.load_float(at + 4 * N * 2 * warp)
        odd += ptx.load_float(at + 4 * N * (2 * warp + 1))
    return even, odd
