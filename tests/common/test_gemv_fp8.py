"""common.gemv_fp8 against products in float64. NaN stands in all memory that must not be read.

Elements and activations that are small integers have exact sums in float32 in any order, so that each way to compute
them must give float64's result to the last bit.
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from common import build
from common.build import Operand
from common.cpu import CPU
from common.gemv_dense import row_scale_bytes
from common.gemv_fp8 import gemv_fp8, load_fp8_rows, load_whole_vector
from common.gfx950 import GFX950
from common.rmsnorm import multiply_blocks
from common.sm90 import SM_90
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

NAN, NAN_SCALE = 0x7F, 255
SHAPES = {"fp8-row": [(1, 4), (5, 36), (13, 132), (7, 2880)], "fp8-32": [(1, 32), (5, 96), (13, 160), (7, 2880)]}
BLOCKS = [(1, 32), (4, 64), (8, 128), (16, 4096)]
CASES = [(dense_format, *shape) for dense_format, shapes in SHAPES.items() for shape in shapes]
with_format = pytest.mark.parametrize("dense_format", SHAPES)
with_blocks = pytest.mark.parametrize("block_m, block_k", BLOCKS)


@triton.jit
def decode_kernel(out_ptr, words_ptr, N: tl.constexpr, MACHINE: tl.constexpr):
    """Write out [N, 4]."""
    i = tl.arange(0, N)
    values = MACHINE.dense.e4m3_to_float32(tl.load(words_ptr + i))
    for j in tl.static_range(4):
        tl.store(out_ptr + 4 * i + j, values[j])


@triton.jit
def vector_kernel(out_ptr, x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    blocks = load_whole_vector(x_ptr, K, BLOCK_K)
    for i in tl.static_range(len(blocks)):
        tl.store(out_ptr + i * BLOCK_K + tl.arange(0, BLOCK_K), blocks[i])


@triton.jit
def gemv_kernel(
    out_ptr,
    w_ptr,
    scales_ptr,
    x_ptr,
    norm_ptr,
    first_row,
    end_row,
    MATRIX: tl.constexpr,
    MACHINE: tl.constexpr,
):
    tile = tl.program_id(0)
    K: tl.constexpr = MATRIX.k
    BLOCK_M: tl.constexpr = MATRIX.tile_rows
    BLOCK_K: tl.constexpr = MATRIX.k_block
    FORMAT: tl.constexpr = MATRIX.format
    x = multiply_blocks(load_whole_vector(x_ptr, K, BLOCK_K), load_whole_vector(norm_ptr, K, BLOCK_K))
    row0 = first_row + tile * BLOCK_M
    weights = load_fp8_rows(Operand(w_ptr, scales_ptr), row0, end_row, MATRIX)
    tl.store(out_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), gemv_fp8(weights, x, FORMAT, MACHINE))


@triton.jit
def stage_kernel(
    out_ptr,
    w_ptr,
    scales_ptr,
    x_ptr,
    MATRIX: tl.constexpr,
    THREADS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Write out [tile_rows / COPIES, COPIES, THREADS]; each program copies its tile's rows into a stage."""
    K: tl.constexpr = MATRIX.k
    ROWS: tl.constexpr = MATRIX.tile_rows
    SCALES: tl.constexpr = row_scale_bytes(K, MATRIX.format)
    STAGE: tl.constexpr = (ROWS * (K + SCALES) + 127) // 128 * 128
    PAST: tl.constexpr = 16 * THREADS
    tile = tl.program_id(0)
    x = load_thread_vector(x_ptr, K, THREADS, COPIES, 16)
    ring = open_ring(1, STAGE, PAST + DESCRIPTION_BYTES)
    description = behind_stages(ring, 1, STAGE) + PAST
    at, scales = w_ptr.to(tl.int64) + tile * (ROWS * K), scales_ptr.to(tl.int64) + tile * (ROWS * SCALES)
    n_rows = MATRIX.rows - tile * ROWS
    rows = at * 0 + tl.minimum(n_rows, ROWS)
    describe_tile(description, TilePieces(at, rows * K, scales, rows * SCALES), tile >= 0)
    fill_stage(ring, 0, description, 1, STAGE)
    sums = multiply_rows(wait_for_stage(ring, 0, 1, STAGE), x, n_rows, MATRIX)
    row = tl.arange(0, ROWS // COPIES)[:, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None]
    tl.store(out_ptr + (tile * ROWS + row) * THREADS + tl.arange(0, THREADS)[None, None, :], sums)


class Matrix(NamedTuple):
    codes: torch.Tensor  # uint8 [rows, K]
    scales: torch.Tensor  # float32 [rows] or uint8 [rows, K / 32]

    def factors(self) -> torch.Tensor:
        """Return the scale of each element, float64."""
        if self.scales.dtype == torch.float32:
            return self.scales.double()[:, None].expand(self.codes.shape)
        return torch.exp2(self.scales.double() - 127).repeat_interleave(32, 1)

    def elements(self) -> torch.Tensor:
        return self.codes.view(torch.float8_e4m3fn).double()

    def values(self) -> torch.Tensor:
        return self.elements() * self.factors()

    def words(self, past: int) -> torch.Tensor:
        """Return the matrix as int32 words, followed by this many bytes of NaN."""
        return before(NAN, past, self.codes).view(torch.int32)

    def padded_scales(self, past: int) -> torch.Tensor:
        """Return scales as a kernel reads them, a row's groups padded to 16.

        NaN stands there and in the rows behind.
        """
        if self.scales.dtype == torch.float32:
            return before(torch.nan, past, self.scales)
        rows, groups = self.scales.shape
        padded = torch.full((rows + past, -(-groups // 16) * 16), NAN_SCALE, dtype=torch.uint8)
        padded[:rows, :groups] = self.scales
        return padded


def before(fill: float, count: int, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.flatten(), x.new_full((count,), fill)))


def codes_of(values: torch.Tensor) -> torch.Tensor:
    codes = values.to(torch.float8_e4m3fn)
    assert torch.equal(codes.float(), values.float())
    return codes.view(torch.uint8)


def small_integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def scales_for(rows: int, k: int, dense_format: str, low: int = -2, high: int = 3) -> torch.Tensor:
    """Make powers of two, each different from its neighbours."""
    groups = 1 if dense_format == "fp8-row" else k // 32
    exponents = torch.arange(rows * groups).view(rows, groups) * 3 % (high - low) + low
    return torch.exp2(exponents[:, 0].float()) if dense_format == "fp8-row" else (exponents + 127).to(torch.uint8)


def integer_matrix(rows: int, k: int, dense_format: str) -> Matrix:
    return Matrix(codes_of(small_integers(rows, k, seed=0)), scales_for(rows, k, dense_format))


def random_matrix(rows: int, k: int, dense_format: str) -> Matrix:
    """Make a matrix of arbitrary numbers; scales of rows are not powers of two."""
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 256, (rows, k), generator=generator).to(torch.uint8)
    codes[(codes & 0x7F) == NAN] = 1
    scales = scales_for(rows, k, dense_format, -5, 4)
    return Matrix(codes, scales * 1.37 if dense_format == "fp8-row" else scales)


def format_of(matrix: Matrix) -> str:
    return "fp8-row" if matrix.scales.dtype == torch.float32 else "fp8-32"


def gemv(matrix: Matrix, x, block_m, block_k, norm=None, first_row=0, end_row=None) -> torch.Tensor:
    """Multiply all tiles from first_row to end_row and one more; results from end_row on must be 0, and are cut off."""
    rows, k = matrix.codes.shape
    count = (rows if end_row is None else end_row) - first_row
    n_tiles = triton.cdiv(count, block_m) + 1
    out = torch.full((n_tiles * block_m,), torch.nan)
    gemv_kernel[(n_tiles,)](
        out,
        matrix.words((2 * block_m + 1) * k + block_k),
        matrix.padded_scales(2 * block_m + 1),
        before(torch.nan, block_k, x),
        before(torch.nan, block_k, torch.ones(k) if norm is None else norm),
        first_row,
        first_row + count,
        MATRIX=build.Matrix("", rows, k, format_of(matrix), block_m, block_k),
        MACHINE=CPU,
    )
    assert (out[count:] == 0).all()
    return out[:count]


@pytest.mark.parametrize("machine", [CPU, GFX950, SM_90], ids=lambda machine: machine.name)
def test_every_code_is_what_torch_makes_of_it(machine):
    """All 256 codes, NaN and -0 included, stand in each place of a word."""
    codes = (torch.arange(256)[:, None] + torch.tensor([0, 64, 128, 192])).flatten().to(torch.uint8)
    out = torch.zeros(1024)
    decode_kernel[(1,)](out, codes.view(torch.int32), N=256, MACHINE=machine)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().sum() == 8
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert torch.equal(out.signbit()[~out.isnan()], expected.signbit()[~out.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_k", [4, 16, 64])
@pytest.mark.parametrize("k", [1, 4, 31, 38, 130])
def test_a_vector_is_blocks_with_zeros_at_the_end(k, block_k, dtype):
    x = (torch.arange(k) + 1).to(dtype)
    n_blocks = triton.cdiv(k, block_k)
    out = torch.full((n_blocks * block_k,), torch.nan)
    vector_kernel[(1,)](out, before(torch.nan, block_k, x), K=k, BLOCK_K=block_k)
    padded = torch.zeros(n_blocks * block_k)
    padded[:k] = x
    assert torch.equal(out, padded)


@with_blocks
@pytest.mark.parametrize("dense_format, rows, k", CASES)
def test_products_of_integers_are_exact(rows, k, block_m, block_k, dense_format):
    matrix = integer_matrix(rows, k, dense_format)
    x, norm = small_integers(k, seed=1), small_integers(k, seed=2)
    assert torch.equal(gemv(matrix, x, block_m, block_k).double(), matrix.values() @ x.double())
    assert torch.equal(gemv(matrix, x, block_m, block_k, norm).double(), matrix.values() @ (x * norm).double())


@with_format
@pytest.mark.parametrize("first_row, end_row", [(0, 13), (3, 13), (12, 13), (0, 6), (4, 9), (5, 5)])
@with_blocks
def test_rows_outside_the_range_are_not_read(first_row, end_row, block_m, block_k, dense_format):
    matrix, x = integer_matrix(13, 160, dense_format), small_integers(160, seed=1)
    expected = (matrix.values() @ x.double())[first_row:end_row]
    matrix.codes[:first_row] = matrix.codes[end_row:] = NAN
    bad = torch.nan if dense_format == "fp8-row" else NAN_SCALE
    matrix.scales[:first_row] = matrix.scales[end_row:] = bad
    found = gemv(matrix, x, block_m, block_k, first_row=first_row, end_row=end_row)
    assert torch.equal(found.double(), expected)


# Every place in a word, both ends of words, groups and blocks, and the tail that a block of 64 masks.
POSITIONS = [*range(8), 15, 16, 31, 32, 33, 63, 64, 65, 95]


@with_format
@pytest.mark.parametrize("block_k", [64, 128])
def test_a_single_activation_picks_its_column(block_k, dense_format):
    matrix = random_matrix(3, 96, dense_format)
    for k in POSITIONS:
        x = torch.zeros(96)
        x[k] = -2.0
        expected = -2.0 * matrix.values()[:, k]  # of a float32 scale and four bits: exact before the last rounding
        assert torch.equal(gemv(matrix, x, 4, block_k), expected.float())


@with_format
@pytest.mark.parametrize("block_m, block_k", BLOCKS[1:])
def test_real_numbers(block_m, block_k, dense_format):
    rows, k = 7, 2880
    matrix = random_matrix(rows, k, dense_format)
    generator = torch.Generator().manual_seed(0)
    x, norm = torch.randn(k, generator=generator), torch.randn(k, generator=generator)
    effective = x.double() * norm.double()
    found = gemv(matrix, x, block_m, block_k, norm).double()
    # A word's four products are summed, then K / BLOCK_K words or groups, these in pairs; norm, product, scale round.
    roundings = 4 + triton.cdiv(k, block_k) + block_k.bit_length() + 3
    bound = roundings * 2.0**-24 * (matrix.values().abs() @ effective.abs())
    assert ((found - matrix.values() @ effective).abs() <= bound).all()


@with_format
def test_the_vector_is_not_rounded(dense_format):
    """The last bit of a float32 activation decides."""
    for position in (0, 1, 30):
        values, x = torch.zeros(1, 64), torch.zeros(64)
        values[0, [position, 63]] = 1.0
        x[[position, 63]] = torch.tensor([1 + 2.0**-23, -1.0])
        ones = torch.ones(1) if dense_format == "fp8-row" else torch.full((1, 2), 127, dtype=torch.uint8)
        assert gemv(Matrix(codes_of(values), ones), x, 1, 32).item() == 2.0**-23


@with_format
def test_nan_shows_in_its_row_alone(dense_format):
    """A NaN in an element or in a scale makes its row NaN."""
    matrix, x = integer_matrix(5, 96, dense_format), small_integers(96, seed=1)
    expected = (matrix.values() @ x.double()).float()
    matrix.codes[3, 70] = NAN
    matrix.scales[1] = torch.nan if dense_format == "fp8-row" else NAN_SCALE
    out = gemv(matrix, x, 4, 64)
    assert out[[1, 3]].isnan().all()
    assert torch.equal(out[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 240])
def test_scales_of_groups_are_exact_from_end_to_end(scale):
    """The smallest scale gives subnormal sums, which are exact too."""
    matrix = Matrix(codes_of(small_integers(3, 96, seed=0)), torch.full((3, 3), scale, dtype=torch.uint8))
    x = small_integers(96, seed=1)
    expected = matrix.values() @ x.double()
    assert torch.equal(gemv(matrix, x, 4, 64).double(), expected)


def gemv_in_stages(matrix: Matrix, x: torch.Tensor, rows: int, threads: int, copies: int) -> torch.Tensor:
    """Return each thread's part of each row, [rows, threads], without scales of rows.

    Rows beyond the last are NaN: nobody wrote to their stage.
    """
    n_rows, k = matrix.codes.shape
    n_tiles = triton.cdiv(n_rows, rows)
    out = torch.full((n_tiles * rows, threads), torch.nan)
    stage_kernel[(n_tiles,)](
        out,
        matrix.words(0),
        matrix.padded_scales(0),
        before(torch.nan, 16 * threads, x),
        MATRIX=build.Matrix("w", n_rows, k, format_of(matrix), rows, k_block=0),
        THREADS=threads,
        COPIES=copies,
    )
    assert out[n_rows:].isnan().any(1).all()
    return out[:n_rows]


STAGE_SIZES = {"fp8-row": [32, 80, 416, 1504, 2880], "fp8-32": [32, 416, 1504, 2880]}  # of whole runs or not
STAGE_CASES = [(dense_format, k) for dense_format, sizes in STAGE_SIZES.items() for k in sizes]
with_tiles = pytest.mark.parametrize("rows, copies", [(2, 1), (4, 2), (8, 4)])
with_threads = pytest.mark.parametrize("threads", [32, 64, 128])


def thread_values(matrix: Matrix) -> torch.Tensor:
    return matrix.elements() if format_of(matrix) == "fp8-row" else matrix.values()


@with_threads
@with_tiles
@pytest.mark.parametrize("dense_format, k", STAGE_CASES)
def test_each_thread_multiplies_its_sixteen_bytes_of_a_row(k, rows, copies, threads, dense_format):
    """A thread's part of a row comes exactly from its sixteen elements of each run. The last tile is short."""
    matrix, x = integer_matrix(2 * rows + 1, k, dense_format), small_integers(k, seed=1)
    products = torch.zeros(2 * rows + 1, triton.cdiv(k, 16 * threads) * 16 * threads, dtype=torch.float64)
    products[:, :k] = thread_values(matrix) * x
    expected = products.view(len(products), -1, threads, 16).sum((1, 3))
    assert torch.equal(gemv_in_stages(matrix, x, rows, threads, copies).double(), expected)


@with_threads
@pytest.mark.parametrize("dense_format, k", STAGE_CASES)
def test_rows_in_a_stage_agree_with_float64(k, threads, dense_format):
    """Rows hold real numbers; a row or a scale of NaN does not enter any other row."""
    matrix = random_matrix(7, k, dense_format)
    x = torch.randn(k, generator=torch.Generator().manual_seed(k))
    found = gemv_in_stages(matrix, x, 4, threads, 2).double().sum(1)
    values = thread_values(matrix)
    # A thread adds sixteen products of a run one after another, each rounded, and the runs.
    roundings = 17 + triton.cdiv(k, 16 * threads)
    bound = roundings * 2.0**-24 * (values.abs() @ x.double().abs())
    assert ((found - values @ x.double()).abs() <= bound).all()
    matrix.codes[3] = NAN
    if dense_format == "fp8-32":
        matrix.scales[5, -1] = NAN_SCALE
    found_others = gemv_in_stages(matrix, x, 4, threads, 2).double().sum(1)
    mine = torch.tensor([3, 5] if dense_format == "fp8-32" else [3])
    others = [row for row in range(7) if row not in mine]
    assert found_others[mine].isnan().all()
    assert torch.equal(found_others[others], found[others])
