"""common.gemm_dense against products in float64. NaN stands in all memory that must not be read.

Where elements and vectors are small integers all sums are exact in float32 in any order, and must be float64's to the
last bit.
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from common import build
from common.build import Operand
from common.gemm_dense import gemm_dense
from common.gemv_dense import scale_stride
from common.operands import Bf16Pair, bf16_pair, half_prescale, to_half
from host.tuning import Tile

NAN, NAN_SCALE = 0x7F, 255
FORMATS = ["bf16", "fp8-row", "fp8-32"]
SHAPES = {
    "bf16": [(1, 2), (7, 38), (40, 130), (19, 2880)],
    "fp8-row": [(1, 4), (7, 36), (40, 132), (19, 2880)],
    "fp8-32": [(1, 32), (7, 96), (40, 160), (19, 2880)],
}
CASES = [(dense_format, *shape) for dense_format, shapes in SHAPES.items() for shape in shapes]
BLOCKS = [(16, 16, 32), (64, 16, 64), (32, 64, 256)]
with_format = pytest.mark.parametrize("dense_format", FORMATS)
with_blocks = pytest.mark.parametrize("block_m, block_n, block_k", BLOCKS)


@triton.jit
def gemm_kernel(
    out_ptr,
    w_ptr,
    scales_ptr,
    high_ptr,
    low_ptr,
    n_columns,
    MATRIX: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write out [tiles of rows * TILE.m, tiles of columns * TILE.n], one tile of each per program."""
    row0, column0 = tl.program_id(0) * TILE.m, tl.program_id(1) * TILE.n
    matrix, x = Operand(w_ptr, scales_ptr), Bf16Pair(high_ptr, low_ptr)
    acc = gemm_dense(matrix, x, row0, column0, n_columns, MATRIX, TILE)
    row, column = row0 + tl.arange(0, TILE.m)[:, None], column0 + tl.arange(0, TILE.n)[None, :]
    tl.store(out_ptr + row * (tl.num_programs(1) * TILE.n) + column, acc)


@triton.jit
def parts_kernel(high_ptr, low_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    high, low = bf16_pair(tl.load(x_ptr + i))
    tl.store(high_ptr + i, high)
    tl.store(low_ptr + i, low)


@triton.jit
def half_kernel(half_ptr, undo_ptr, x_ptr, N: tl.constexpr):
    """Convert one vector per program."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    prescale, undo = half_prescale(tl.max(tl.abs(x), axis=0))
    tl.store(half_ptr + i, to_half(x * prescale))
    tl.store(undo_ptr + tl.program_id(0), undo)


class Matrix(NamedTuple):
    elements: torch.Tensor  # bfloat16 or float8_e4m3fn [rows, K]
    scales: torch.Tensor  # float32 [rows], uint8 [rows, K / 32], or none

    def values(self) -> torch.Tensor:
        """Return the matrix's numbers, float64 [rows, K]."""
        if self.scales.dtype == torch.float32:
            return self.elements.double() * (self.scales.double()[:, None] if self.scales.numel() else 1.0)
        return self.elements.double() * torch.exp2(self.scales.double() - 127).repeat_interleave(32, 1)

    def words(self) -> torch.Tensor:
        """Return the matrix as int32 words, followed by NaN."""
        flat = self.elements.view(torch.uint8).flatten()
        return torch.cat((flat, flat.new_full((1 << 16,), 0x7F if self.elements.itemsize == 1 else 0xFF)))

    def padded_scales(self) -> torch.Tensor:
        """Return scales as a kernel reads them, groups of a row padded to 16; NaN stands there and behind."""
        if self.scales.dtype == torch.float32:
            return torch.cat((self.scales, torch.full((1 << 10,), torch.nan)))
        rows, groups = self.scales.shape
        padded = torch.full((rows + 64, scale_stride(32 * groups, "fp8-32")), NAN_SCALE, dtype=torch.uint8)
        padded[:rows, :groups] = self.scales
        return padded


def small_integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def element_type(dense_format: str) -> torch.dtype:
    return torch.bfloat16 if dense_format == "bf16" else torch.float8_e4m3fn


def scales_for(rows: int, k: int, dense_format: str, low: int = -2, high: int = 3) -> torch.Tensor:
    """Make powers of two, each different from its neighbours."""
    if dense_format == "bf16":
        return torch.zeros(0)
    groups = 1 if dense_format == "fp8-row" else k // 32
    exponents = torch.arange(rows * groups).view(rows, groups) * 3 % (high - low) + low
    return torch.exp2(exponents[:, 0].float()) if dense_format == "fp8-row" else (exponents + 127).to(torch.uint8)


def integer_matrix(rows: int, k: int, dense_format: str) -> Matrix:
    elements = small_integers(rows, k, seed=0).to(element_type(dense_format))
    return Matrix(elements, scales_for(rows, k, dense_format))


def random_matrix(rows: int, k: int, dense_format: str) -> Matrix:
    """Make a matrix of arbitrary numbers; scales of rows are not powers of two."""
    generator = torch.Generator().manual_seed(k)
    elements = (torch.randn(rows, k, generator=generator) * 20).to(element_type(dense_format))
    scales = scales_for(rows, k, dense_format, -5, 4)
    return Matrix(elements, scales * 1.37 if dense_format == "fp8-row" else scales)


def parts_of(x: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 [2, vectors, K]: the nearest value, and the nearest to the rest."""
    high = x.bfloat16()
    return torch.stack((high, (x - high.float()).bfloat16()))


def gemm(matrix: Matrix, x: torch.Tensor, dense_format: str, block_m: int, block_n: int, block_k: int) -> torch.Tensor:
    """Return float64 [rows, vectors]. Rows and columns beyond must repeat the last ones, and are cut off."""
    (rows, k), n = matrix.elements.shape, len(x)
    past = torch.full((3 * k + block_k,), torch.nan, dtype=torch.bfloat16)
    high, low = (torch.cat((part.flatten(), past)) for part in parts_of(x))
    tiles = triton.cdiv(rows, block_m), triton.cdiv(n, block_n)
    out = torch.full((tiles[0] * block_m, tiles[1] * block_n), torch.nan)
    gemm_kernel[tiles](
        out,
        matrix.words().view(torch.int32),
        matrix.padded_scales(),
        high,
        low,
        n,
        MATRIX=build.Matrix("", rows, k, dense_format, block_m, block_k),
        TILE=Tile(block_m, block_n, block_k, stages=1),
    )
    found = out[:rows, :n].double()
    repeated = out[torch.arange(len(out)).clamp(max=rows - 1)][:, torch.arange(out.shape[1]).clamp(max=n - 1)]
    assert torch.equal(out.nan_to_num(), repeated.nan_to_num())
    return found


@with_blocks
@pytest.mark.parametrize("n", [1, 5, 33])
@pytest.mark.parametrize("dense_format, rows, k", CASES)
def test_products_of_integers_are_exact(dense_format, rows, k, n, block_m, block_n, block_k):
    matrix, x = integer_matrix(rows, k, dense_format), small_integers(n, k, seed=1)
    found = gemm(matrix, x, dense_format, block_m, block_n, block_k)
    assert torch.equal(found, matrix.values() @ x.double().T)


# Every place in a word, both ends of words, groups and blocks, and the tail that a block of 64 masks.
POSITIONS = [*range(8), 15, 16, 31, 32, 33, 63, 64, 65, 95]


@with_format
@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_a_single_activation_picks_its_column(block_k, dense_format):
    """Each vector has one activation, in either part."""
    matrix = integer_matrix(20, 96, dense_format)
    x = torch.zeros(len(POSITIONS), 96)
    x[range(len(POSITIONS)), POSITIONS] = -(1 + 2.0**-12)
    expected = -(1 + 2.0**-12) * matrix.values()[:, POSITIONS]
    assert torch.equal(gemm(matrix, x, dense_format, 16, 16, block_k), expected)


@with_format
def test_both_parts_count(dense_format):
    """1 + 2^-14 is no bfloat16: cancelling one part leaves the other."""
    matrix = Matrix(torch.ones(1, 64).to(element_type(dense_format)), scales_for(1, 64, dense_format, 0, 1))
    x = torch.zeros(1, 64)
    x[0, [3, 50]] = torch.tensor([1 + 2.0**-14, -1.0])
    assert gemm(matrix, x, dense_format, 16, 16, 32).item() == 2.0**-14


@with_blocks
@with_format
def test_real_numbers_agree_with_float64(dense_format, block_m, block_n, block_k):
    """Two parts leave out at most 2^-17 of an element, see test_bf16_pair.

    The sums' own roundings come to less than another 2^-18 of the magnitudes, in any order.
    """
    matrix = random_matrix(19, 2880, dense_format)
    x = torch.randn(7, 2880, generator=torch.Generator().manual_seed(1))
    magnitudes = matrix.values().abs() @ x.double().abs().T
    error = (gemm(matrix, x, dense_format, block_m, block_n, block_k) - matrix.values() @ x.double().T).abs()
    assert (error <= (2.0**-17 + 2.0**-18) * magnitudes).all()
    # One part alone, 2^-8, would be far away, though errors of either sign cancel.
    one_part = (matrix.values() @ (x.bfloat16().double() - x.double()).T).abs()
    assert one_part.median() > 20 * error.max()


@with_format
def test_nan_shows_in_its_row_alone(dense_format):
    """A NaN in an element or in a scale makes its row NaN."""
    matrix, x = integer_matrix(20, 96, dense_format), small_integers(3, 96, seed=1)
    expected = matrix.values() @ x.double().T
    bad = [3]
    matrix.elements[3, 70] = torch.nan
    if dense_format != "bf16":
        bad.append(17)
        matrix.scales[17] = torch.nan if dense_format == "fp8-row" else NAN_SCALE
    found = gemm(matrix, x, dense_format, 16, 16, 64)
    others = [row for row in range(20) if row not in bad]
    assert found[bad].isnan().all()
    assert torch.equal(found[others], expected[others])


@with_format
def test_nan_shows_in_its_column_alone(dense_format):
    matrix, x = integer_matrix(20, 96, dense_format), small_integers(3, 96, seed=1)
    expected = matrix.values() @ x.double().T
    x[1, 33] = torch.nan
    found = gemm(matrix, x, dense_format, 16, 16, 64)
    assert found[:, 1].isnan().all()
    assert torch.equal(found[:, [0, 2]], expected[:, [0, 2]])


@pytest.mark.parametrize("scale", [0, 1, 60, 126, 127, 128, 200, 240])
def test_scales_of_groups_are_exact_from_end_to_end(scale):
    """bfloat16 has float32's exponents, so elements times scales are exact; the smallest are subnormal."""
    elements = small_integers(20, 96, seed=0).to(torch.float8_e4m3fn)
    matrix = Matrix(elements, torch.full((20, 3), scale, dtype=torch.uint8))
    x = small_integers(3, 96, seed=1)
    assert torch.equal(gemm(matrix, x, "fp8-32", 16, 16, 64), matrix.values() @ x.double().T)


@pytest.mark.parametrize("scale", [1e-30, 0.37, 1e20])
def test_scales_of_rows_multiply_the_sum(scale):
    """The scale is applied to the sum, which rounds once."""
    matrix = integer_matrix(20, 96, "fp8-row")._replace(scales=torch.arange(1, 21) * scale)
    x = small_integers(3, 96, seed=1)
    sums = (matrix.elements.double() @ x.double().T).float()
    assert torch.equal(gemm(matrix, x, "fp8-row", 16, 16, 64), (sums * matrix.scales[:, None]).double())


def test_every_e4m3_is_a_bfloat16():
    codes = torch.arange(256).to(torch.uint8)
    codes[(codes & 0x7F) == NAN] = 0
    matrix = Matrix(codes.view(torch.float8_e4m3fn).view(16, 16), torch.ones(16))
    found = gemm(matrix, torch.eye(16), "fp8-row", 16, 16, 32)
    assert torch.equal(found, matrix.elements.double())


def test_bf16_pair():
    """The parts are the nearest bfloat16 and the nearest to the rest, at any magnitude.

    Of x in 2^e to 2^(e + 1) the first leaves at most 2^(e - 8), and of that the second at most 2^(e - 17).
    """
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x *= torch.exp2(torch.arange(1024) % 200 - 100.0)
    x[:4] = torch.tensor([0.0, 1.0, -(1 + 2.0**-15), 3e38])
    high, low = torch.zeros(2, 1024, dtype=torch.bfloat16)
    parts_kernel[(1,)](high, low, x, N=1024)
    assert torch.equal(torch.stack((high, low)), parts_of(x))
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-17 * x.double().abs()).all()


def halves_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float16 [vectors, K] and their factors, float32 [vectors]."""
    half, undo = torch.zeros(x.shape, dtype=torch.float16), torch.zeros(len(x))
    half_kernel[(len(x),)](half, undo, x, N=x.shape[1])
    return half, undo


def test_vectors_as_float16_use_its_range():
    """The largest magnitude becomes 2^14 to 2^15, with all of float16's 11 bits, and small ones are not lost."""
    exponents = torch.arange(-95, 128, dtype=torch.float64)
    x = (torch.exp2(exponents)[:, None] * torch.tensor([1.0, -1.4142, 2.0**-20, 1 - 2.0**-12])).float()
    half, undo = halves_of(x)
    largest = half.abs().amax(1).double()
    assert (largest >= 2**14).all()
    assert (largest <= 2**15).all()
    error = (half.double() * undo.double()[:, None] - x.double()).abs()
    # Half a unit in the last of 11 bits, or half the least step of float16 beside a largest element of 2^14.
    assert (error <= torch.maximum(2.0**-11 * x.double().abs(), 2.0**-39 * torch.exp2(exponents)[:, None])).all()


def test_vectors_of_tiny_numbers_stay_finite():
    """Vectors hold zeros, subnormals, and numbers too small to be scaled up all the way."""
    x = torch.tensor([[0.0, -0.0], [1e-45, -1e-40], [2.0**-126, 2.0**-127], [2.0**-96, -(2.0**-100)]])
    half, undo = halves_of(x)
    assert undo.isfinite().all()
    assert (half.double() * undo.double()[:, None] - x.double()).abs().max() <= 2.0**-95 * 2.0**-24 * 2.0**-14


def test_nan_of_a_vector_stays():
    half, undo = halves_of(torch.tensor([[1.0, torch.nan], [2.0, 4.0]]))
    assert half[0, 1].isnan()
    assert (half.double() * undo.double()[:, None])[[0, 1, 1], [0, 0, 1]].tolist() == [1.0, 2.0, 4.0]
