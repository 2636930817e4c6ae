"""common.gemv_bf16 against products in float64. NaN stands in all memory that must not be read."""

import pytest
import torch
import triton
import triton.language as tl

from common.build import Matrix
from common.gemv_bf16 import gemv_bf16, load_bf16_rows, load_split_vector
from common.rmsnorm import multiply_blocks
from common.sm90.gemv import load_thread_vector, multiply_rows
from common.sm90.ring import (
    DESCRIPTION_BYTES,
    TilePieces,
    behind_stages,
    describe_tile,
    fill_stage,
    open_ring,
    wait_for_stage,
)

SHAPES = [(1, 2), (5, 38), (8, 32), (13, 130), (7, 2880)]
BLOCKS = [(1, 32), (4, 16), (8, 128), (16, 4096), (2, 2)]


@triton.jit
def gemv_kernel(
    out_ptr,
    w_ptr,
    x_ptr,
    norm_ptr,
    first_row,
    end_row,
    rstd,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    tile = tl.program_id(0)
    x = load_split_vector(x_ptr, K, BLOCK_K)
    if NORM:
        x = multiply_blocks(x, load_split_vector(norm_ptr, K, BLOCK_K))
    weights = load_bf16_rows(w_ptr, first_row + tile * BLOCK_M, end_row, K, BLOCK_M, BLOCK_K)
    tl.store(out_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), gemv_bf16(weights, x) * rstd)


@triton.jit
def vector_kernel(out_ptr, x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    blocks = load_split_vector(x_ptr, K, BLOCK_K)
    half = tl.arange(0, BLOCK_K // 2)
    for i in tl.static_range(len(blocks)):
        tl.store(out_ptr + i * (BLOCK_K // 2) + half, blocks[i])


@triton.jit
def rows_kernel(
    out_ptr, w_ptr, row0, end_row, STRIDE: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    blocks = load_bf16_rows(w_ptr, row0, end_row, K, BLOCK_M, BLOCK_K)
    at = tl.arange(0, BLOCK_M)[:, None] * STRIDE + tl.arange(0, BLOCK_K // 2)[None, :]
    for i in tl.static_range(len(blocks)):
        tl.store(out_ptr + i * (BLOCK_K // 2) + at, blocks[i])


def before_nan(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat((x.flatten(), x.new_full((count,), torch.nan)))


def words(w: torch.Tensor, block_m: int, block_k: int) -> torch.Tensor:
    """Return bfloat16 w as the int32 words that the kernels take, followed by more than a tile of NaN."""
    return before_nan(w, (block_m + 1) * w.shape[1] + block_k).view(torch.int32)


def gemv(w, x, block_m, block_k, norm=None, rstd=1.0, first_row=0, end_row=None) -> torch.Tensor:
    """Multiply all tiles from first_row to end_row and one more; results from end_row on must be 0, and are cut off."""
    rows, k = w.shape
    count = (rows if end_row is None else end_row) - first_row
    n_tiles = triton.cdiv(count, block_m) + 1
    out = torch.full((n_tiles * block_m,), torch.nan)
    gemv_kernel[(n_tiles,)](
        out,
        words(w, 2 * block_m, block_k),
        before_nan(x, block_k),
        before_nan(x if norm is None else norm, block_k),
        first_row,
        first_row + count,
        rstd,
        K=k,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        NORM=norm is not None,
    )
    assert (out[count:] == 0).all()
    return out[:count]


def small_integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_k", [2, 16, 64])
@pytest.mark.parametrize("k", [1, 2, 31, 38, 130])
def test_a_vector_is_blocks_of_even_and_of_odd_elements(k, block_k, dtype):
    x = (torch.arange(k) + 1).to(dtype)
    n_blocks = triton.cdiv(k, block_k)
    out = torch.full((n_blocks * block_k,), torch.nan)
    vector_kernel[(1,)](out, before_nan(x, block_k), K=k, BLOCK_K=block_k)
    padded = torch.zeros(n_blocks * block_k)
    padded[:k] = x
    expected = [padded[start + odd : start + block_k : 2] for start in range(0, len(padded), block_k) for odd in (0, 1)]
    assert torch.equal(out, torch.cat(expected))


@pytest.mark.parametrize("row0, end_row", [(0, 13), (3, 13), (3, 5), (12, 13), (13, 13), (20, 13)])
@pytest.mark.parametrize("block_m, block_k", BLOCKS)
def test_rows_are_the_words_of_the_matrix(row0, end_row, block_m, block_k):
    """Every bit of any value is kept, NaN, infinity and -0 included; masked reads give zeros."""
    rows, k = 13, 38
    w = torch.randint(-(2**15), 2**15, (rows, k), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    stride = triton.cdiv(k, block_k) * block_k // 2
    out = torch.full((block_m, stride), -1, dtype=torch.int32)
    rows_kernel[(1,)](
        out, words(w.view(torch.bfloat16), block_m + 20, block_k), row0, end_row, stride, k, block_m, block_k
    )
    expected = torch.zeros(block_m, stride, dtype=torch.int32)
    inside = w[row0:end_row][:block_m]
    expected[: len(inside), : k // 2] = inside.contiguous().view(torch.int32)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("block_m, block_k", BLOCKS)
@pytest.mark.parametrize("rows, k", SHAPES)
def test_products_of_integers_are_exact(rows, k, block_m, block_k):
    w, x, norm = (small_integers(*shape, seed=i) for i, shape in enumerate([(rows, k), (k,), (k,)]))
    assert torch.equal(gemv(w.bfloat16(), x, block_m, block_k), w @ x)
    assert torch.equal(gemv(w.bfloat16(), x, block_m, block_k, norm, rstd=0.25), w @ (x * norm) / 4)


@pytest.mark.parametrize("first_row", [1, 3, 12])
@pytest.mark.parametrize("block_m, block_k", BLOCKS)
def test_rows_from_the_middle_on(first_row, block_m, block_k):
    w, x = small_integers(13, 130, seed=0), small_integers(130, seed=1)
    assert torch.equal(gemv(w.bfloat16(), x, block_m, block_k, first_row=first_row), (w @ x)[first_row:])


@pytest.mark.parametrize("first_row, end_row", [(0, 13), (6, 13), (0, 6), (4, 9), (5, 5)])
def test_rows_outside_the_range_are_not_read(first_row, end_row):
    w, x = small_integers(13, 130, seed=0), small_integers(130, seed=1)
    expected = (w @ x)[first_row:end_row]
    w[:first_row] = w[end_row:] = torch.nan
    assert torch.equal(gemv(w.bfloat16(), x, 4, 32, first_row=first_row, end_row=end_row), expected)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("block_m, block_k", BLOCKS[:4])
def test_real_numbers(block_m, block_k, with_norm):
    rows, k, rstd = 7, 2880, 0.731
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, k, generator=generator).bfloat16()
    x = torch.randn(k, generator=generator)
    norm = torch.randn(k, generator=generator) if with_norm else None
    effective = x.double() * torch.tensor(rstd).double() * (norm.double() if with_norm else 1)
    actual = gemv(w, x, block_m, block_k, norm, rstd).double()
    # A thread sums K / BLOCK_K pairs one by one, the threads are summed in pairs; products and norm round thrice.
    roundings = triton.cdiv(k, block_k) + block_k.bit_length() + 3
    bound = roundings * 2.0**-24 * (w.double().abs() @ effective.abs())
    assert ((actual - w.double() @ effective).abs() <= bound).all()


@pytest.mark.parametrize("position", [0, 1, 30])
def test_the_vector_is_not_rounded(position):
    """The last bit of a float32 activation decides, at an even place and at an odd one."""
    w, x = torch.zeros(1, 64).bfloat16(), torch.zeros(64)
    w[0, [position, 63]] = 1.0
    x[[position, 63]] = torch.tensor([1 + 2.0**-23, -1.0])
    assert gemv(w, x, 1, 16).item() == 2.0**-23
    assert gemv(w, x, 1, 16, norm=torch.ones(64)).item() == 2.0**-23


def test_huge_and_nan_values_stay():
    w = torch.zeros(4, 40)
    w[0, 0], w[1, 39], w[2, 20], w[3, 21] = 2.0**100, 1.0, torch.nan, torch.nan
    x = torch.zeros(40)
    x[0], x[39] = 2.0**27, -3.0
    out = gemv(w.bfloat16(), x, 4, 16)
    assert out[:2].tolist() == [2.0**127, -3.0]
    assert out[2:].isnan().all()


@triton.jit
def thread_vector_kernel(out_ptr, x_ptr, K: tl.constexpr, THREADS: tl.constexpr, COPIES: tl.constexpr):
    """Write out [blocks, COPIES, THREADS]."""
    blocks = load_thread_vector(x_ptr, K, THREADS, COPIES)
    at = tl.arange(0, COPIES)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    for i in tl.static_range(len(blocks)):
        tl.store(out_ptr + i * (COPIES * THREADS) + at, blocks[i])


@triton.jit
def stage_kernel(out_ptr, w_ptr, x_ptr, MATRIX: tl.constexpr, THREADS: tl.constexpr, COPIES: tl.constexpr):
    """Write out [tile_rows / COPIES, COPIES, THREADS]; each program copies its tile into a stage."""
    ROWS: tl.constexpr = MATRIX.tile_rows
    TILE_BYTES: tl.constexpr = ROWS * MATRIX.k * 2
    STAGE: tl.constexpr = (TILE_BYTES + 127) // 128 * 128
    tile = tl.program_id(0)
    x = load_thread_vector(x_ptr, MATRIX.k, THREADS, COPIES)
    ring = open_ring(1, STAGE, 16 * THREADS + DESCRIPTION_BYTES)
    description = behind_stages(ring, 1, STAGE) + 16 * THREADS
    at = w_ptr.to(tl.int64) + tile * TILE_BYTES
    describe_tile(description, TilePieces(at, at * 0 + TILE_BYTES, at, at * 0), tile >= 0)
    fill_stage(ring, 0, description, 1, STAGE)
    sums = multiply_rows(wait_for_stage(ring, 0, 1, STAGE), x, ROWS, MATRIX)
    part = tl.arange(0, ROWS // COPIES)[:, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None]
    at = (tile * ROWS + part) * THREADS + tl.arange(0, THREADS)[None, None, :]
    tl.store(out_ptr + at, sums)


def gemv_in_stages(w: torch.Tensor, x: torch.Tensor, rows: int, threads: int, copies: int) -> torch.Tensor:
    """Return each thread's part of w's rows, [rows of w, threads].

    NaN stands behind each tile and behind the vector.
    """
    n_tiles, k = len(w) // rows, w.shape[1]
    out = torch.full((len(w), threads), torch.nan)
    matrix = Matrix("w", len(w), k, "bf16", rows, k_block=0)
    stage_kernel[(n_tiles,)](
        out, words(w, rows, 8 * threads), before_nan(x, 8 * threads), MATRIX=matrix, THREADS=threads, COPIES=copies
    )
    return out


STAGE_SIZES = [32, 80, 416, 1504, 2880]  # 16 bytes of a row at a time, so multiples of 8, of whole runs or not
with_tiles = pytest.mark.parametrize("rows, copies", [(2, 1), (2, 2), (4, 1), (4, 2)])
with_threads = pytest.mark.parametrize("threads", [32, 128])


@with_threads
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [*STAGE_SIZES, 31, 256, 257, 1500])
def test_a_thread_has_eight_elements_of_each_run(k, dtype, copies, threads):
    """Thread i has those from 8 i on, in all copies, and zeros beyond K, where nothing is read."""
    x = (torch.arange(k) % 251 + 1).to(dtype)
    n_runs = triton.cdiv(k, 8 * threads)
    out = torch.full((8 * n_runs, copies, threads), torch.nan)
    thread_vector_kernel[(1,)](out, before_nan(x, 8 * threads), K=k, THREADS=threads, COPIES=copies)
    expected = torch.zeros(n_runs * threads * 8)
    expected[:k] = x
    expected = expected.view(n_runs, threads, 8).transpose(1, 2).reshape(8 * n_runs, 1, threads)
    assert torch.equal(out, expected.expand(-1, copies, -1))


@with_threads
@with_tiles
@pytest.mark.parametrize("k", STAGE_SIZES)
def test_each_thread_multiplies_its_sixteen_bytes_of_a_row(k, rows, copies, threads):
    """Integers show exactly that a thread's part of a row comes from its eight elements of each run."""
    w, x = small_integers(3 * rows, k, seed=0), small_integers(k, seed=1)
    products = torch.zeros(len(w), triton.cdiv(k, 8 * threads) * 8 * threads)
    products[:, :k] = w * x
    expected = products.view(len(w), -1, threads, 8).sum((1, 3))
    assert torch.equal(gemv_in_stages(w.bfloat16(), x, rows, threads, copies), expected)


@with_threads
@with_tiles
@pytest.mark.parametrize("k", STAGE_SIZES)
def test_rows_in_a_stage_agree_with_float64(k, rows, copies, threads):
    """Real numbers agree with float64; other rows and the bytes behind the tile do not enter a row."""
    generator = torch.Generator().manual_seed(k)
    w = torch.randn(2 * rows, k, generator=generator).bfloat16()
    x = torch.randn(k, generator=generator)
    found = gemv_in_stages(w, x, rows, threads, copies).double().sum(1)
    expected = w.double() @ x.double()
    # A thread adds pairs one after another, four each run; a pair's products are rounded and summed.
    roundings = 4 * triton.cdiv(k, 8 * threads) + 2
    bound = roundings * 2.0**-24 * (w.double().abs() @ x.double().abs())
    assert ((found - expected).abs() <= bound).all()
    for row in (0, rows - 1):
        poisoned = w.clone()
        poisoned[row] = torch.nan
        found_others = gemv_in_stages(poisoned, x, rows, threads, copies).double().sum(1)
        others = torch.arange(len(w)) != row
        assert found_others[row].isnan()
        assert torch.equal(found_others[others], found[others])
