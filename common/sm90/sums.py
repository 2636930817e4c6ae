"""Sum rows over the warps of a program, through shared memory behind the ring.

Triton's own reductions exchange between warps with two or three barriers each and, as layouts differ, several times for
one sum; here each warp stores its partial sum of a row, and after one barrier the threads that need the row add them.
"""

import triton
import triton.language as tl

from common.sm90 import ptx
from common.sm90.tiles import PAIRS


@triton.constexpr_function
def sum_words(tuning) -> int:
    """Return the float32 that a program needs for the tiles whose sums it exchanges together."""
    dense, experts = tuning.dense, tuning.experts
    rows = dense.step_tiles * max(dense.qkv_rows, dense.o_rows, dense.head_rows)
    return max(rows * dense.threads_per_row // 32, experts.step_tiles * 2 * PAIRS.value * tuning.num_warps)


@triton.jit
def leave_dense(sums, tile, acc, TILES: tl.constexpr):
    """Store each warp's partial sums of a tile 0 .. TILES - 1 of a step, given multiply_rows' [N, COPIES, THREADS]."""
    N: tl.constexpr = acc.shape[0]
    COPIES: tl.constexpr = acc.shape[1]
    WARPS: tl.constexpr = acc.shape[2] // 32
    ROWS: tl.constexpr = N * COPIES
    partial = tl.sum(tl.reshape(acc, (N, COPIES, WARPS, 32)), axis=3, keep_dims=True)
    row = tl.arange(0, N)[:, None, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None]
    # Stored by all lanes of a warp: Triton has the sums in this shape, and would exchange them for a smaller one.
    lane = tl.arange(0, 32)[None, None, None, :]
    address = sums + 4 * ((warp * TILES + tile) * ROWS + row + 0 * lane)
    ptx.store_float(address, partial + tl.zeros([N, COPIES, WARPS, 32], tl.float32))


@triton.jit
def collect_dense(sums, N: tl.constexpr, WARPS: tl.constexpr):
    """Return the rows of a step's tiles, float32 [N]; WARPS warps shared each row."""
    tl.debug_barrier()
    address = sums + 4 * tl.arange(0, N)
    y = ptx.load_float(address)
    for warp in tl.static_range(1, WARPS):
        y += ptx.load_float(address + 4 * N * warp)
    return y


@triton.jit
def leave_tile(sums, tile, even, odd, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Store each warp's partial sums of a tile 0 .. TILES - 1 of a step, given those of multiply_tile."""
    even = tl.sum(tl.reshape(even, (WARPS, PAIRS, 4)), axis=2)
    odd = tl.sum(tl.reshape(odd, (WARPS, PAIRS, 4)), axis=2)
    N: tl.constexpr = TILES * PAIRS
    warp, pair = tl.arange(0, WARPS)[:, None], tl.arange(0, PAIRS)[None, :]
    address = sums + 4 * (warp * 2 * N + tile * PAIRS + pair)
    ptx.store_float(address, even)
    ptx.store_float(address + 4 * N, odd)


@triton.jit
def collect_tiles(sums, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Return (even, odd) rows of a step, float32 [8 TILES] each: 0, 2, ... 14 of its first tile, of the next, ..."""
    tl.debug_barrier()
    N: tl.constexpr = TILES * PAIRS
    address = sums + 4 * tl.arange(0, N)
    even, odd = ptx.load_float(address), ptx.load_float(address + 4 * N)
    for warp in tl.static_range(1, WARPS):
        even += ptx.load_float(address + 4 * N * 2 * warp)
        odd += ptx.load_float(address + 4 * N * (2 * warp + 1))
    return even, odd
