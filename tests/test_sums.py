"""common.sums: rows' sums over the warps of a program, in the interpreter, against sums of whole numbers."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from common.sums import collect_dense, collect_fragments, leave_dense, leave_fragments, sum_words
from host.config import GPT_OSS_120B
from host.launch import SM_90, fit_ring


@triton.jit
def dense_kernel(
    out_ptr, acc_ptr, sums_ptr, n, BATCH: tl.constexpr, PART: tl.constexpr, COPIES: tl.constexpr, WARPS: tl.constexpr
):
    """out [programs, BATCH PART COPIES], of acc [programs, n, PART, COPIES, 32 WARPS]."""
    N: tl.constexpr = BATCH * PART * COPIES
    pid = tl.program_id(0)
    sums = (sums_ptr + pid * (N * WARPS)).to(tl.int64)
    part, copy = tl.arange(0, PART)[:, None, None], tl.arange(0, COPIES)[None, :, None]
    at = (part * COPIES + copy) * (32 * WARPS) + tl.arange(0, 32 * WARPS)[None, None, :]
    for i in range(n):
        acc = tl.load(acc_ptr + (pid * n + i) * (PART * COPIES * 32 * WARPS) + at)
        leave_dense(sums, i, acc, BATCH, "cpu")
    tl.store(out_ptr + pid * N + tl.arange(0, N), collect_dense(sums, N, WARPS, "cpu"))


@triton.jit
def fragments_kernel(out_ptr, even_ptr, odd_ptr, sums_ptr, n, BATCH: tl.constexpr, WARPS: tl.constexpr):
    """out [2, 8 BATCH], of even and odd [n, 32 WARPS]."""
    sums = sums_ptr.to(tl.int64)
    lane = tl.arange(0, 32 * WARPS)
    for i in range(n):
        even, odd = tl.load(even_ptr + i * (32 * WARPS) + lane), tl.load(odd_ptr + i * (32 * WARPS) + lane)
        leave_fragments(sums, i, even, odd, BATCH, WARPS, "cpu")
    even, odd = collect_fragments(sums, BATCH, WARPS, "cpu")
    row = tl.arange(0, 8 * BATCH)
    tl.store(out_ptr + row, even)
    tl.store(out_ptr + 8 * BATCH + row, odd)


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-99, 100, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("part, copies, warps", [(1, 1, 1), (2, 1, 2), (1, 2, 4), (4, 2, 1), (2, 4, 2)])
def test_rows_of_dense_tiles(part, copies, warps, n):
    """A tile's row p * copies + c is what all lanes have of it; each program has its own memory."""
    batch, programs = 4, 2
    acc = whole_numbers(programs, n, part, copies, 32 * warps)
    rows = part * copies
    out = torch.zeros(programs, batch * rows)
    sums = torch.full((programs, batch * rows * warps), torch.nan)
    dense_kernel[(programs,)](out, acc, sums, n, BATCH=batch, PART=part, COPIES=copies, WARPS=warps)
    expected = acc.sum(-1).reshape(programs, n * rows)
    assert torch.equal(out[:, : n * rows], expected)
    assert out[:, n * rows :].isnan().all()  # tiles that did not come


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_rows_of_experts_tiles(warps, n):
    """Rows 2 r and 2 r + 1 of a tile are what lanes 4 r .. 4 r + 3 of all warps have, whatever those are."""
    batch = 4
    even, odd = (whole_numbers(n, warps, 8, 4, seed=seed) for seed in (0, 1))
    expected = torch.stack([x.sum((1, 3)).flatten() for x in (even, odd)])
    even[n - 1, warps - 1, 5, 3], odd[0, 0, 0, 0] = torch.inf, torch.nan
    expected[0, 8 * (n - 1) + 5], expected[1, 0] = torch.inf, torch.nan
    out = torch.zeros(2, 8 * batch)
    sums = torch.full((2 * 8 * batch * warps,), torch.nan)
    fragments_kernel[(1,)](out, even, odd, sums, n, BATCH=batch, WARPS=warps)
    assert torch.equal(out[:, : 8 * n].nan_to_num(1e6, posinf=1e7), expected.nan_to_num(1e6, posinf=1e7))
    assert out[:, 8 * n :].isnan().all()


def test_words_of_a_batch():
    """16 tiles of 4 rows which 4 warps share, and 16 of 16 rows which 8 warps share."""
    tuning = fit_ring(SM_90, GPT_OSS_120B)
    assert sum_words(tuning) == max(16 * 4 * 4, 16 * 16 * 8)
    assert sum_words(dataclasses.replace(tuning, expert_batch=1)) == 16 * 4 * 4
