"""common.gemv_fp4 against dequantized products in float64. NaN stands in all scales and activations past the end.

Where elements and activations are small multiples of a power of two, all sums are exact in float32 in any order (which
`exact` asserts), so that each way to compute them must give float64's result to the last bit.
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from common import build, rows
from common.build import Operand
from common.gemv_fp4 import gemv_fp4, gemv_fp4_fp8

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
NAN_SCALE = 255
SHAPES = [(1, 32), (7, 96), (13, 160), (5, 2880)]
BLOCKS = [(1, 32), (4, 64), (8, 256), (16, 4096)]
WAYS = ["float32", "mxfp8", "dot_scaled"]


@triton.jit
def gemv_kernel(
    out_ptr,
    blocks_ptr,
    scales_ptr,
    x_ptr,
    x_scale_ptr,
    first_row,
    MATRIX: tl.constexpr,
    WAY: tl.constexpr,
):
    tile = tl.program_id(0)
    M: tl.constexpr = MATRIX.tile_rows
    EXPERTS: tl.constexpr = rows.EXPERTS
    row0 = first_row + tile * M
    matrix = Operand(blocks_ptr, scales_ptr)
    if WAY == "float32":
        y = gemv_fp4(matrix, x_ptr, row0, MATRIX, EXPERTS)
    else:
        y = gemv_fp4_fp8(matrix, Operand(x_ptr, x_scale_ptr), row0, MATRIX, EXPERTS, WAY == "dot_scaled")
    tl.store(out_ptr + tile * M + tl.arange(0, M), y)


class Matrix:
    """codes [rows, K], E2M1, and scales uint8 [rows, K / 32]."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor):
        self.codes, self.scales = codes.to(torch.uint8), scales.to(torch.uint8)

    def packed(self) -> torch.Tensor:
        """Return int32 words [rows, K / 8], the first element in the lowest bits."""
        return (self.codes[:, 0::2] | self.codes[:, 1::2] << 4).view(torch.int32)

    def values(self) -> torch.Tensor:
        return E2M1[self.codes.int()] * powers_of_two(self.scales).repeat_interleave(32, 1)


class Vector(NamedTuple):
    elements: torch.Tensor  # [K], E4M3, or float32 for gemv_fp4 alone
    scales: torch.Tensor  # uint8 [K / 32]

    def values(self) -> torch.Tensor:
        return self.elements.double() * powers_of_two(self.scales).repeat_interleave(32)


def mxfp8(elements: torch.Tensor, scales: torch.Tensor) -> Vector:
    rounded = elements.to(torch.float8_e4m3fn)
    assert torch.equal(rounded.double(), elements.double())
    return Vector(rounded, scales.to(torch.uint8))


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scales.double() - 127)


def random_matrix(rows: int, k: int, seed: int = 0, scales=(126, 129)) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), generator=generator)
    return Matrix(codes, torch.randint(*scales, (rows, k // 32), generator=generator))


def random_vector(k: int, seed: int = 0, scales=(126, 129)) -> Vector:
    generator = torch.Generator().manual_seed(seed + 100)
    elements = torch.randint(-4, 5, (k,), generator=generator).double()
    return mxfp8(elements, torch.randint(*scales, (k // 32,), generator=generator))


def before(fill: float, count: int, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.flatten(), torch.full((count,), fill).to(x.dtype)))


def gemv(matrix: Matrix, vector: Vector, way: str, block_m: int, block_k: int, first_row: int = 0) -> torch.Tensor:
    """Multiply all tiles from first_row on; results beyond the matrix must be 0, and are cut off."""
    rows, k = matrix.codes.shape
    past = (block_m + 1) * k + block_k
    x = vector.values().float() if way == "float32" else vector.elements
    x = before(torch.nan, block_k, x)
    x_scales = before(NAN_SCALE, block_k // 32, vector.scales)
    words = before(0x77777777, past // 8, matrix.packed())
    scales = before(NAN_SCALE, past // 32, matrix.scales)
    n_tiles = triton.cdiv(rows - first_row, block_m)
    out = torch.full((n_tiles * block_m,), torch.nan)
    shape = build.Matrix("", rows, k, "mxfp4", block_m, block_k)
    gemv_kernel[(n_tiles,)](out, words, scales, x, x_scales, first_row, MATRIX=shape, WAY=way)
    assert (out[rows - first_row :] == 0).all()
    return out[: rows - first_row]


def exact(matrix: Matrix, vector: Vector) -> torch.Tensor:
    """Return the products of matrix and vector, having checked that any partial sum of them is a float32."""
    products = matrix.values() * vector.values()
    unit = 0.5 * powers_of_two(matrix.scales).min() * powers_of_two(vector.scales).min()
    assert (products.abs().sum(1) / unit < 2**24).all()
    return products.sum(1).float()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block_m, block_k", BLOCKS)
@pytest.mark.parametrize("rows, k", SHAPES)
def test_exact_sums(rows, k, block_m, block_k, way):
    matrix, vector = random_matrix(rows, k), random_vector(k)
    assert torch.equal(gemv(matrix, vector, way, block_m, block_k), exact(matrix, vector))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first_row", [1, 4, 12])
def test_rows_from_the_middle_on(first_row, way):
    matrix, vector = random_matrix(13, 160), random_vector(160)
    expected = exact(matrix, vector)[first_row:]
    matrix.scales[:first_row] = NAN_SCALE  # must not be read
    assert torch.equal(gemv(matrix, vector, way, 4, 64, first_row), expected)


# Every place in a word, both ends of groups and blocks, and the tail that a block of 64 masks.
POSITIONS = [*range(8), 15, 16, 31, 32, 33, 63, 64, 65, 95]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block_k", [64, 128])
def test_a_single_activation_picks_its_column(way, block_k):
    matrix = random_matrix(3, 96)
    for k in POSITIONS:
        elements = torch.zeros(96)
        elements[k] = -3.0
        vector = mxfp8(elements, torch.tensor([126, 127, 129]))
        expected = matrix.values()[:, k] * vector.values()[k]
        assert gemv(matrix, vector, way, 4, block_k).tolist() == expected.tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block_k", [64, 128])
def test_a_single_element_picks_its_activation(way, block_k):
    vector = mxfp8(torch.arange(96.0) % 13 + 1, torch.tensor([126, 127, 129]))
    for k in POSITIONS:
        row = k % 3
        codes = torch.zeros(3, 96)
        codes[row, k] = 7 if k % 2 else 13  # 6 and -3
        matrix = Matrix(codes, torch.arange(120, 129).view(3, 3))
        expected = torch.zeros(3, dtype=torch.float64)
        expected[row] = matrix.values()[row, k] * vector.values()[k]
        assert gemv(matrix, vector, way, 2, block_k).tolist() == expected.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_every_code_times_one(way):
    codes = torch.zeros(16, 32)
    codes[:, 9] = torch.arange(16)
    matrix, vector = Matrix(codes, torch.full((16, 1), 127)), mxfp8(torch.ones(32), torch.tensor([127]))
    assert gemv(matrix, vector, way, 16, 32).tolist() == E2M1.tolist()


@pytest.mark.parametrize("way", WAYS[1:])
def test_every_activation_times_one(way):
    elements = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    matrix, vector = Matrix(torch.eye(256) * 2, torch.full((256, 8), 127)), mxfp8(elements, torch.full((8,), 127))
    assert gemv(matrix, vector, way, 16, 64).tolist() == elements.tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 253, 254])
def test_scales_are_exact_from_end_to_end(scale, way):
    """The smallest scale gives subnormal sums, which are exact too."""
    # Elements below 2, as 2 * 2^127 is no float32, to which the interpreter's dot_scaled dequantizes.
    codes = torch.randint(0, 16, (3, 96), generator=torch.Generator().manual_seed(scale)) & 0b1011
    elements = torch.zeros(96)
    elements[[0, 31, 32, 50, 95]] = torch.tensor([-2.0, 1.0, 5.0, -3.0, 4.0])
    matrix, vector = Matrix(codes, torch.full((3, 3), scale)), mxfp8(elements, torch.full((3,), 119))
    assert torch.equal(gemv(matrix, vector, way, 4, 64), exact(matrix, vector))


@pytest.mark.parametrize("way", WAYS)
def test_groups_with_their_own_scales_are_exact(way):
    """Each group has one element, at its own power of two in the matrix and in the vector."""
    codes, elements = torch.zeros(5, 160), torch.zeros(160)
    for group in range(5):
        codes[group, group * 32 + 7 * group] = 2
        elements[group * 32 + 7 * group] = 1.5
    scales = torch.tensor([[100, 110, 127, 140, 150]]).repeat(5, 1) + torch.arange(5)[:, None]
    matrix, vector = Matrix(codes, scales), mxfp8(elements, torch.tensor([120, 125, 127, 131, 139]))
    assert gemv(matrix, vector, way, 8, 64).tolist() == (matrix.values() @ vector.values()).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_groups_that_cancel_leave_zero(way):
    """The sum is 2 * 1 - 1 * 2, so that rounding hides nothing that a product's padding brings in."""
    codes, elements = torch.zeros(1, 64), torch.zeros(64)
    codes[0, 3] = codes[0, 40] = 2
    elements[3], elements[40] = 1.0, -2.0
    matrix, vector = Matrix(codes, torch.tensor([[127, 127]])), mxfp8(elements, torch.tensor([128, 127]))
    assert gemv(matrix, vector, way, 1, 64).item() == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_of_nan_shows_in_its_row_alone(way):
    matrix, vector = random_matrix(5, 96), random_vector(96)
    expected = exact(matrix, vector)
    matrix.scales[3, 2] = NAN_SCALE
    out = gemv(matrix, vector, way, 4, 64)
    assert out[3].isnan()
    assert torch.equal(out[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


@pytest.mark.parametrize("way", WAYS[1:])
def test_an_activation_of_nan_shows(way):
    matrix, vector = random_matrix(4, 96), random_vector(96)
    vector.elements[70] = torch.nan
    assert gemv(matrix, vector, way, 4, 64).isnan().all()


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("block_m, block_k", BLOCKS)
def test_real_activations(block_m, block_k, magnitude):
    rows, k = 7, 2880
    matrix = random_matrix(rows, k, scales=(118, 131))
    x = torch.randn(k, generator=torch.Generator().manual_seed(0)) * magnitude
    vector = Vector(x, torch.full((k // 32,), 127))
    actual = gemv(matrix, vector, "float32", block_m, block_k).double()
    # A group's sum is at most 8 + 2 roundings deep, then K / BLOCK_K, then a sum over the groups of a block.
    roundings = 10 + triton.cdiv(k, block_k) + (block_k // 32).bit_length() + 2
    bound = roundings * 2.0**-24 * (matrix.values().abs() @ vector.values().abs())
    assert ((actual - matrix.values() @ vector.values()).abs() <= bound).all()


@pytest.mark.parametrize("block_m, block_k", BLOCKS)
def test_both_ways_agree_on_real_mxfp8(block_m, block_k):
    """Sums of many bits round in different orders; their products are equal and exact."""
    rows, k = 7, 2880
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(rows, k, scales=(118, 131))
    elements = (torch.randn(k, generator=generator) * 60).to(torch.float8_e4m3fn).double()
    vector = mxfp8(elements, torch.randint(115, 122, (k // 32,), generator=generator))
    expected = matrix.values() @ vector.values()
    magnitudes = matrix.values().abs() @ vector.values().abs()
    for way in WAYS:
        actual = gemv(matrix, vector, way, block_m, block_k).double()
        # Whatever the order, K additions; a tree's depth is far less, and so is the error seen.
        assert ((actual - expected).abs() <= 2.0**-18 * magnitudes).all()
