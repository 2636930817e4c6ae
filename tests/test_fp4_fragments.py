"""common.fp4_fragments, interpreted, against products in float64. NaN stands in all that must not be read.

Where elements and activations are small multiples of a power of two, all sums are exact in float32 in any order (which
`exact` asserts), so that the result must be float64's to the last bit.
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from common import fragment_vector, gemv_fp4_fragments, load_fp4_fragments, load_fragment_vector
from host.fragments import block_words, pack_blocks, pack_scales, scale_words, tile_count
from reference import dequantize_mxfp4, quantize_mxfp8

NAN_SCALE = 255
SHAPES = [(1, 32), (7, 96), (13, 160), (33, 416), (40, 2880)]
WARPS = [1, 2, 4, 8]
QUANT = [False, True]
UNIT = 2.0**-24  # of a float32 of 1 to 2, half the distance to the next


@triton.jit
def gemv_kernel(
    out_ptr,
    blocks_ptr,
    scales_ptr,
    x_ptr,
    valid,
    K: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    STRIDE: tl.constexpr,
    WARPS: tl.constexpr,
    QUANT: tl.constexpr,
):
    """out [vectors, tiles, 16] of x [vectors, STRIDE]: a program for each tile and vector."""
    tile = tl.program_id(0)
    vector = tl.program_id(1)
    weights = load_fp4_fragments(blocks_ptr + tile * BLOCK_WORDS, scales_ptr + tile * SCALE_WORDS, K, WARPS, valid != 0)
    x = fragment_vector(load_fragment_vector(x_ptr + vector * STRIDE, K, WARPS), WARPS, QUANT)
    y = gemv_fp4_fragments(weights, x, WARPS, "cpu")
    tl.store(out_ptr + (vector * tl.num_programs(0) + tile) * 16 + tl.arange(0, 16), y)


@triton.jit
def load_kernel(out_ptr, blocks_ptr, scales_ptr, valid, K: tl.constexpr, WARPS: tl.constexpr, N_WORDS: tl.constexpr):
    """The blocks' words one after the other, N_WORDS in all, then the scales'."""
    blocks, scales = load_fp4_fragments(blocks_ptr, scales_ptr, K, WARPS, valid != 0)
    for i in tl.static_range(len(blocks)):
        tl.store(out_ptr + i * (WARPS * 256) + tl.arange(0, WARPS * 256), blocks[i])
    for i in tl.static_range(len(scales)):
        tl.store(out_ptr + N_WORDS + i * (WARPS * 32) + tl.arange(0, WARPS * 32), scales[i])


class Matrix(NamedTuple):
    blocks: torch.Tensor  # uint8 [rows, K / 32, 16], as published
    scales: torch.Tensor  # uint8 [rows, K / 32]

    @classmethod
    def from_codes(cls, codes: torch.Tensor, scales: torch.Tensor) -> "Matrix":
        codes = codes.to(torch.uint8).unflatten(1, (-1, 32))
        return cls(codes[..., 0::2] | codes[..., 1::2] << 4, scales.to(torch.uint8))

    @property
    def k(self) -> int:
        return 32 * self.scales.shape[1]

    def values(self) -> torch.Tensor:
        return dequantize_mxfp4(self.blocks, self.scales).double()


def random_matrix(rows: int, k: int, seed: int = 0, scales=(126, 129)) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), generator=generator)
    return Matrix.from_codes(codes, torch.randint(*scales, (rows, k // 32), generator=generator))


def random_vector(k: int, seed: int = 0) -> torch.Tensor:
    """Integers of 5 bits, so that FP8 has to round, each group times 1/2, 1 or 2."""
    generator = torch.Generator().manual_seed(seed + 100)
    x = torch.randint(-31, 32, (k // 32, 32), generator=generator)
    return (x * 2.0 ** torch.randint(-1, 2, (k // 32, 1), generator=generator)).flatten()


def gemv_all(matrix: Matrix, x: torch.Tensor, warps: int, quant: bool = False, valid: bool = True) -> torch.Tensor:
    """[vectors, rows] of x [vectors, K]: what tiles give beyond the matrix must be 0, and is cut off."""
    rows, k, (n_vectors, _) = len(matrix.blocks), matrix.k, x.shape
    n_tiles = tile_count(rows)
    poison = 256 * warps  # a step and more
    x = torch.cat((x.float(), torch.full((n_vectors, poison), torch.nan)), dim=1)
    # Elements of 6 and scales of NaN beyond the last tile.
    blocks = torch.cat((pack_blocks(matrix.blocks).flatten(), torch.full((2 * poison,), 0x7E7E7E7E)))
    scales = torch.cat((pack_scales(matrix.scales, warps).flatten(), torch.full((2 * poison,), -1)))
    out = torch.full((n_vectors, n_tiles * 16), torch.nan)
    gemv_kernel[(n_tiles, n_vectors)](
        out,
        blocks.int(),
        scales.int(),
        x,
        int(valid),
        K=k,
        BLOCK_WORDS=block_words(k),
        SCALE_WORDS=scale_words(k, warps),
        STRIDE=k + poison,
        WARPS=warps,
        QUANT=quant,
    )
    assert (out[:, rows:].nan_to_num(0.0) == 0).all()
    assert x[:, :k].isnan().any() or not out[:, rows:].isnan().any()
    return out[:, :rows]


def gemv(matrix: Matrix, x: torch.Tensor, warps: int, quant: bool = False, valid: bool = True) -> torch.Tensor:
    return gemv_all(matrix, x[None], warps, quant, valid)[0]


def exact(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """The products of matrix and vector, having checked that any partial sum of them is a float32."""
    products = matrix.values() * x.double()
    unit = 0.25 * 2.0 ** (int(matrix.scales.min()) - 127)  # elements and activations are multiples of 1/2
    assert (products / unit == (products / unit).round()).all()
    assert (products.abs().sum(1) / unit < 2**24).all()
    return products.sum(1).float()


@pytest.mark.parametrize("quant", QUANT, ids=["float32", "MXFP8"])
@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("rows, k", SHAPES)
def test_exact_sums(rows, k, warps, quant):
    matrix, x = random_matrix(rows, k), random_vector(k)
    effective = quantize_mxfp8(x) if quant else x
    assert torch.equal(effective, x) != quant
    assert torch.equal(gemv(matrix, x, warps, quant), exact(matrix, effective))


@pytest.mark.parametrize("warps", [1, 2, 8])
def test_a_single_activation_picks_its_column(warps):
    """For each column of an odd number of steps (of one warp), the last of them half full."""
    k = 5 * 128 - 32
    matrix = random_matrix(19, k, scales=(118, 138))
    columns = gemv_all(matrix, -3 * torch.eye(k), warps)
    assert torch.equal(columns.double(), -3 * matrix.values().T)


@pytest.mark.parametrize("quant", QUANT, ids=["float32", "MXFP8"])
def test_every_code_times_one(quant):
    for column in (0, 1, 9, 31):
        codes = torch.zeros(16, 32)
        codes[:, column] = torch.arange(16)
        matrix = Matrix.from_codes(codes, torch.full((16, 1), 127))
        values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
        assert gemv(matrix, torch.ones(32), 1, quant).tolist() == values


@pytest.mark.parametrize("quant", QUANT, ids=["float32", "MXFP8"])
@pytest.mark.parametrize("scale", [0, 1, 2, 100, 126, 127, 128, 150, 253, 254])
def test_scales_from_end_to_end(scale, quant):
    """Byte 0 is 2^-127, which float32 has as a subnormal only. 2 * 2^127 is no float32, so elements are 1 at most."""
    codes = torch.randint(0, 3, (3, 96), generator=torch.Generator().manual_seed(scale))
    codes[:, 50] = 2
    matrix, x = Matrix.from_codes(codes, torch.full((3, 3), scale)), torch.zeros(96)
    x[[31, 50]] = torch.tensor([0.25, -1.5])
    expected = matrix.values() @ x.double()
    assert (expected != 0).all()
    assert torch.equal(gemv(matrix, x, 2, quant).double(), expected)


@pytest.mark.parametrize("warps", WARPS)
def test_groups_with_their_own_scales(warps):
    """One element a group, each row and group at its own power of two."""
    k = 9 * 32
    x = torch.zeros(k)
    x[torch.arange(9) * 32 + torch.arange(9) * 3] = torch.tensor([1, -2, 3, 4, -5, 6, 7, -8, 9.0])
    scales = 110 + 2 * torch.arange(9) + torch.arange(33)[:, None] % 7
    matrix = Matrix.from_codes(random_matrix(33, k).values().abs().clamp(1, 3), scales)
    assert torch.equal(gemv(matrix, x, warps).double(), matrix.values() @ x.double())


@pytest.mark.parametrize("warps", [1, 4])
def test_a_scale_of_nan_shows_in_its_row_alone(warps):
    rows, k = 18, 608
    matrix, x = random_matrix(rows, k), random_vector(k)
    expected = exact(matrix, x)
    for row, group in [(0, 0), (3, 18), (8, 7), (17, 11)]:
        scales = matrix.scales.clone()
        scales[row, group] = NAN_SCALE
        out = gemv(Matrix(matrix.blocks, scales), x, warps)
        assert out[row].isnan()
        others = torch.arange(rows) != row
        assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("quant", QUANT, ids=["float32", "MXFP8"])
@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("position", [0, 31, 70, 95])
def test_an_activation_of_nan_shows(position, warps, quant):
    matrix, x = random_matrix(4, 96), random_vector(96)
    x[position] = torch.nan
    assert gemv(matrix, x, warps, quant).isnan().all()


@pytest.mark.parametrize("quant", QUANT, ids=["float32", "MXFP8"])
@pytest.mark.parametrize("warps", WARPS)
def test_zeros(warps, quant):
    """No activation at all, though the scale of them is then that of nothing; and no element."""
    matrix, x = random_matrix(7, 416), random_vector(416)
    assert gemv(matrix, torch.zeros(416), warps, quant).tolist() == [0.0] * 7
    assert gemv(matrix, -torch.zeros(416), warps, quant).tolist() == [0.0] * 7
    nothing = Matrix(torch.zeros_like(matrix.blocks), matrix.scales)
    assert gemv(nothing, x, warps, quant).tolist() == [0.0] * 7


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("k", [32, 96, 416, 608, 2880])
def test_loading(k, warps):
    """The tile's words in their order, zeros after them; nothing at all when not valid, wherever the pointers lead."""
    matrix = random_matrix(16, k)
    blocks, scales = pack_blocks(matrix.blocks)[0], pack_scales(matrix.scales, warps)[0]
    past = torch.full((512 * warps,), -1, dtype=torch.int32)
    n_words = -(-k // (128 * warps)) * 256 * warps  # whole steps
    out = torch.full((n_words + len(scales),), 0x55555555, dtype=torch.int32)

    def load(valid: bool) -> None:
        sources = torch.cat((blocks, past)), torch.cat((scales, past))
        load_kernel[(1,)](out, *sources, int(valid), K=k, WARPS=warps, N_WORDS=n_words)

    load(True)
    assert torch.equal(out, torch.cat((blocks, blocks.new_zeros(n_words - len(blocks)), scales)))
    blocks, scales = torch.full_like(blocks, -1), torch.full_like(scales, -1)
    load(False)
    assert not out.any()


@pytest.mark.parametrize("quant", QUANT, ids=["float32", "MXFP8"])
def test_a_tile_that_is_not_valid_gives_zeros(quant):
    rows, k = 33, 416
    nothing_else = Matrix(random_matrix(rows, k).blocks, torch.full((rows, k // 32), NAN_SCALE))
    assert gemv(nothing_else, random_vector(k), 2, quant, valid=False).tolist() == [0.0] * rows


def additions(k: int, warps: int) -> int:
    """Float32 roundings on an element's way into a result, whatever the order inside a group of 32."""
    steps = triton.cdiv(k, 128 * warps)
    return 32 + 1 + 1 + steps + 2 + warps.bit_length() - 1


@pytest.mark.parametrize("quant", QUANT, ids=["float32", "MXFP8"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("warps", WARPS)
def test_real_activations(warps, magnitude, quant):
    rows, k = 40, 2880
    matrix = random_matrix(rows, k, scales=(118, 131))
    x = torch.randn(k, generator=torch.Generator().manual_seed(0)) * magnitude
    effective = (quantize_mxfp8(x) if quant else x).double()
    actual = gemv(matrix, x, warps, quant).double()
    # Two FP16 leave 2^-22 of an activation, and of the smallest ones 2^-39 of the largest.
    split = 2.0**-22 * effective.abs() + 2.0**-39 * effective.abs().max()
    bound = matrix.values().abs() @ (split + additions(k, warps) * UNIT * effective.abs())
    assert ((actual - matrix.values() @ effective).abs() <= bound).all()


@pytest.mark.parametrize("magnitude", [1e-33, 1e-36, 1e-37, 1e-39])
def test_activations_near_the_end_of_float32(magnitude):
    """Below 2^-95 they are brought no further up, or the factor would overflow: they lose what is below 2^-134."""
    rows, k, warps = 40, 416, 2
    matrix = random_matrix(rows, k, scales=(118, 131))
    x = torch.randn(k, generator=torch.Generator().manual_seed(0)) * magnitude
    actual = gemv(matrix, x, warps).double()
    split = 2.0**-22 * x.abs().double() + 2.0**-134
    bound = matrix.values().abs() @ (split + additions(k, warps) * UNIT * x.abs().double()) + 2.0**-149
    assert ((actual - matrix.values() @ x.double()).abs() <= bound).all()


@pytest.mark.parametrize("power", [-90, -20, 20, 100])
def test_a_power_of_two_changes_no_bit(power):
    """The vector is brought to FP16's range by its exponent alone."""
    matrix = random_matrix(16, 416, scales=(110, 120))
    x = torch.randn(416, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gemv(matrix, x * 2.0**power, 2), gemv(matrix, x, 2) * 2.0**power)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30, 3.4e38])
def test_an_activation_keeps_22_bits(magnitude):
    """Each alone in its row's group of 32, so that nothing but its own rounding is seen."""
    k = 64
    x = (torch.rand(k, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.1) * magnitude
    codes = torch.eye(k) * 2  # 1
    error = (gemv(Matrix.from_codes(codes, torch.full((k, 2), 127)), x, 1).double() / x.double() - 1).abs()
    assert error.max() <= 2.0**-22
    assert error.max() > 0  # what float32 has more of is lost


def test_far_closer_than_one_float16_or_bfloat16():
    """A second column a group is worth it: one FP16 value would err a thousand times as much, bfloat16 more."""
    rows, k = 40, 2880
    matrix = random_matrix(rows, k, scales=(118, 131))
    x = torch.randn(k, generator=torch.Generator().manual_seed(3))
    expected = matrix.values() @ x.double()

    def error(y: torch.Tensor) -> float:
        return ((y.double() - expected).norm() / expected.norm()).item()

    found = error(gemv(matrix, x, 4))
    assert found < error(matrix.values() @ x.half().double()) / 200
    assert found < error(matrix.values() @ x.bfloat16().double()) / 2000
