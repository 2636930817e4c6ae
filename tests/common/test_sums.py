"""common.sm90.sums: rows' sums over the warps of a program, in the interpreter, against sums of whole numbers."""

import pytest
import torch
import triton
import triton.language as tl
from tunings import changed

from checkpoints.config import GPT_OSS_120B
from common.sm90.ring import BARRIER_BYTES, open_ring
from common.sm90.sums import collect_dense, collect_tiles, leave_dense, leave_tile, sum_words
from host.launch import SM_90, fit_ring


@triton.jit
def open_memory(WORDS: tl.constexpr):
    """Return the address of a program's new shared memory, WORDS float32."""
    return open_ring(0, 0, 4 * WORDS) + BARRIER_BYTES


@triton.jit
def dense_kernel(
    out_ptr, acc_ptr, n, TILES: tl.constexpr, PART: tl.constexpr, COPIES: tl.constexpr, WARPS: tl.constexpr
):
    """Write out [programs, TILES PART COPIES] from acc [programs, n, PART, COPIES, 32 WARPS]."""
    N: tl.constexpr = TILES * PART * COPIES
    program = tl.program_id(0)
    sums = open_memory(N * WARPS)
    part, copy = tl.arange(0, PART)[:, None, None], tl.arange(0, COPIES)[None, :, None]
    at = (part * COPIES + copy) * (32 * WARPS) + tl.arange(0, 32 * WARPS)[None, None, :]
    for i in range(n):
        acc = tl.load(acc_ptr + (program * n + i) * (PART * COPIES * 32 * WARPS) + at)
        leave_dense(sums, i, acc, TILES)
    tl.store(out_ptr + program * N + tl.arange(0, N), collect_dense(sums, N, WARPS))


@triton.jit
def tiles_kernel(out_ptr, even_ptr, odd_ptr, n, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Write out [2, 8 TILES] from even and odd [n, 32 WARPS]."""
    sums = open_memory(2 * 8 * TILES * WARPS)
    thread = tl.arange(0, 32 * WARPS)
    for i in range(n):
        even, odd = tl.load(even_ptr + i * (32 * WARPS) + thread), tl.load(odd_ptr + i * (32 * WARPS) + thread)
        leave_tile(sums, i, even, odd, TILES, WARPS)
    even, odd = collect_tiles(sums, TILES, WARPS)
    row = tl.arange(0, 8 * TILES)
    tl.store(out_ptr + row, even)
    tl.store(out_ptr + 8 * TILES + row, odd)


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-99, 100, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("part, copies, warps", [(1, 1, 1), (2, 1, 2), (1, 2, 4), (4, 2, 1), (2, 4, 2)])
def test_rows_of_dense_tiles_are_summed_over_threads(part, copies, warps, n):
    """A tile's row p * copies + c is the sum of all threads' parts; each program has its own memory."""
    tiles, programs = 4, 2
    acc = whole_numbers(programs, n, part, copies, 32 * warps)
    rows = part * copies
    out = torch.zeros(programs, tiles * rows)
    dense_kernel[(programs,)](out, acc, n, TILES=tiles, PART=part, COPIES=copies, WARPS=warps)
    expected = acc.sum(-1).reshape(programs, n * rows)
    assert torch.equal(out[:, : n * rows], expected)
    assert out[:, n * rows :].isnan().all()  # tiles that did not come


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_rows_of_experts_tiles_are_summed_over_warps(warps, n):
    """Rows 2 r and 2 r + 1 of a tile are the sums over threads 4 r .. 4 r + 3 of all warps, in any layout."""
    tiles = 4
    even, odd = (whole_numbers(n, warps, 8, 4, seed=seed) for seed in (0, 1))
    expected = torch.stack([x.sum((1, 3)).flatten() for x in (even, odd)])
    even[n - 1, warps - 1, 5, 3], odd[0, 0, 0, 0] = torch.inf, torch.nan
    expected[0, 8 * (n - 1) + 5], expected[1, 0] = torch.inf, torch.nan
    out = torch.zeros(2, 8 * tiles)
    tiles_kernel[(1,)](out, even, odd, n, TILES=tiles, WARPS=warps)
    assert torch.equal(out[:, : 8 * n].nan_to_num(1e6, posinf=1e7), expected.nan_to_num(1e6, posinf=1e7))
    assert out[:, 8 * n :].isnan().all()


def test_words_of_a_step_hold_all_sums():
    """A step has 16 tiles of 4 rows shared by 4 warps, and 16 of 16 rows shared by 8 warps."""
    tuning = fit_ring(SM_90, GPT_OSS_120B)
    assert sum_words(tuning) == max(16 * 4 * 4, 16 * 16 * 8)
    assert sum_words(changed(tuning, experts=dict(step_tiles=1))) == 16 * 4 * 4
