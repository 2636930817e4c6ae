"""common.sm90.tile_product, interpreted, against products in float64. NaN stands in all that must not be read.

Where elements and activations are small multiples of a power of two, all sums are exact in float32 in any order (which
`exact` asserts), so that the result must be float64's to the last bit.
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from common.sm90.ring import (
    DESCRIPTION_BYTES,
    TilePieces,
    behind_stages,
    describe_tile,
    fill_stage,
    open_ring,
    wait_for_stage,
)
from common.sm90.sums import collect_tiles, leave_tile
from common.sm90.tile_product import (
    REST_OFFSET,
    as_words,
    load_tile_vector,
    multiply_tile,
    split_vector,
    tile_vector_prescale,
    tile_vector_size,
    vector_offset,
)
from common.sm90.tiles import block_bytes, pack_blocks, pack_scales, scale_bytes, stage_bytes, tile_count
from reference import dequantize_mxfp4, quantize_mxfp8

NAN_SCALE = 255
SHAPES = [(1, 32), (7, 96), (13, 160), (33, 416), (40, 2880)]
WARPS = [1, 2, 4, 8]
UNIT = 2.0**-24  # of a float32 of 1 to 2, half the distance to the next
SPLIT = 2.0**-23  # how much of an activation two FP16 may lose, see split_error


@triton.jit
def split_kernel(parts_ptr, scale_ptr, x_ptr, K: tl.constexpr, STRIDE: tl.constexpr, N_PARTS: tl.constexpr):
    """Write parts [vectors, N_PARTS] and scale [vectors] of x [vectors, STRIDE], one vector per program."""
    vector = tl.program_id(0)
    k = tl.arange(0, triton.next_power_of_2(K))
    x = tl.load(x_ptr + vector * STRIDE + k, mask=k < K, other=0.0)
    prescale, scale = tile_vector_prescale(tl.max(tl.abs(x), axis=0))
    value, rest = split_vector(x, prescale)
    at = parts_ptr + vector * N_PARTS + vector_offset(k)
    tl.store(at, value, mask=k < K)
    tl.store(at + REST_OFFSET, rest, mask=k < K)
    tl.store(scale_ptr + vector, scale)


@triton.jit
def gemv_kernel(
    out_ptr,
    blocks_ptr,
    scales_ptr,
    x_ptr,
    scale_ptr,
    n_tiles,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Write out [vectors, tiles, 16]: a program multiplies a vector by all tiles, one after another in one stage.

    The sums stand in shared memory a step and more behind the stage.
    """
    BLOCKS: tl.constexpr = block_bytes(K)
    SCALES: tl.constexpr = scale_bytes(K, WARPS)
    STAGE: tl.constexpr = (stage_bytes(K, WARPS) + 127) // 128 * 128
    PAST: tl.constexpr = 2048 * WARPS
    SUMS: tl.constexpr = 4 * 16 * WARPS
    vector = tl.program_id(0)
    ring = open_ring(1, STAGE, PAST + SUMS + DESCRIPTION_BYTES)
    sums = behind_stages(ring, 1, STAGE) + PAST
    x = load_tile_vector(as_words(x_ptr) + vector * STRIDE, tl.load(scale_ptr + vector), K, WARPS)
    for tile in range(n_tiles):
        blocks, scales = blocks_ptr.to(tl.int64) + tile * BLOCKS, scales_ptr.to(tl.int64) + tile * SCALES
        pieces = TilePieces(blocks, blocks * 0 + BLOCKS, scales, scales * 0 + SCALES)
        describe_tile(sums + SUMS, pieces, tile < n_tiles)
        fill_stage(ring, tile, sums + SUMS, 1, STAGE)
        at = wait_for_stage(ring, tile, 1, STAGE)
        even, odd = multiply_tile(at, at + BLOCKS, x, WARPS)
        leave_tile(sums, 0, even, odd, 1, WARPS)
        even, odd = collect_tiles(sums, 1, WARPS)
        pair = out_ptr + (vector * n_tiles + tile) * 16 + 2 * tl.arange(0, 8)
        tl.store(pair, even)
        tl.store(pair + 1, odd)


@triton.jit
def places_kernel(out_ptr, N: tl.constexpr):
    k = tl.arange(0, triton.next_power_of_2(N))
    tl.store(out_ptr + k, vector_offset(k), mask=k < N)
    tl.store(out_ptr + N + k, vector_offset(k) + REST_OFFSET, mask=k < N)


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
    """Make integers of 5 bits, which FP8 must round, each group times 1/2, 1 or 2."""
    generator = torch.Generator().manual_seed(seed + 100)
    x = torch.randint(-31, 32, (k // 32, 32), generator=generator)
    return (x * 2.0 ** torch.randint(-1, 2, (k // 32, 1), generator=generator)).flatten()


def normal_vector(k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, generator=torch.Generator().manual_seed(seed))


def packed(matrix: Matrix, warps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (blocks, scales), tile after tile, with elements of -6 in the last quad's groups beyond K.

    Elements of -6 and scales of NaN also follow a tile in shared memory, where unwritten bytes are 255.
    """
    blocks = pack_blocks(matrix.blocks).unflatten(1, (-1, 2, 8, 4, 4))  # tile, quad, row % 2, row / 2, group, word
    blocks[:, -1, :, :, (matrix.k - 1) // 32 % 4 + 1 :] = -1
    return blocks.flatten(), pack_scales(matrix.scales, warps).flatten()


def prepared(x: torch.Tensor, warps: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return (parts, scales, stride) of x [vectors, K], with NaN behind each for a step and more."""
    n_vectors, k = x.shape
    n_parts = tile_vector_size(k) + 512 * warps
    parts = torch.full((n_vectors, n_parts), torch.nan, dtype=torch.float16)
    scale = torch.full((n_vectors,), torch.nan)
    split_kernel[(n_vectors,)](parts, scale, x.float().contiguous(), K=k, STRIDE=k, N_PARTS=n_parts)
    return parts, scale, n_parts // 2


def gemv_all(matrix: Matrix, x: torch.Tensor, warps: int) -> torch.Tensor:
    """Return [vectors, rows] of x [vectors, K]; results beyond the matrix must be 0, and are cut off."""
    rows, k, n_vectors = len(matrix.blocks), matrix.k, len(x)
    n_tiles = tile_count(rows)
    parts, scale, stride = prepared(x, warps)
    out = torch.full((n_vectors, n_tiles * 16), torch.nan)
    gemv_kernel[(n_vectors,)](
        out,
        *packed(matrix, warps),
        parts,
        scale,
        n_tiles,
        K=k,
        STRIDE=stride,
        WARPS=warps,
    )
    assert not x.isfinite().all() or (out[:, rows:] == 0).all()
    return out[:, :rows]


def gemv(matrix: Matrix, x: torch.Tensor, warps: int) -> torch.Tensor:
    return gemv_all(matrix, x[None], warps)[0]


def exact(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """Return the products of matrix and vector, having checked that any partial sum of them is a float32."""
    products = matrix.values() * x.double()
    unit = 0.25 * 2.0 ** (int(matrix.scales.min()) - 127)  # elements and activations are multiples of 1/2
    assert (products / unit == (products / unit).round()).all()
    assert (products.abs().sum(1) / unit < 2**24).all()
    return products.sum(1).float()


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "MXFP8"])
@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("rows, k", SHAPES)
def test_sums_of_integers_are_exact(rows, k, warps, rounded):
    """Vectors rounded to MXFP8 by their writer are tested too: their parts lose nothing of that."""
    matrix, x = random_matrix(rows, k), random_vector(k)
    if rounded:
        assert not torch.equal(quantize_mxfp8(x), x)
        x = quantize_mxfp8(x)
    assert torch.equal(gemv(matrix, x, warps), exact(matrix, x))


@pytest.mark.parametrize("warps", [1, 2, 8])
def test_a_single_activation_picks_its_column(warps):
    """Each column of an odd number of steps (of one warp) is picked; the last step is not full."""
    k = 3 * 128 - 32
    matrix = random_matrix(13, k, scales=(118, 138))
    columns = gemv_all(matrix, -3 * torch.eye(k), warps)
    assert torch.equal(columns.double(), -3 * matrix.values().T)


def test_every_pair_of_codes_at_every_place():
    """Two codes are the halves of a word at one place; neither they nor the other places disturb each other."""
    pair = (73 * torch.arange(16) + torch.arange(256)[:, None]) % 256  # another one at each place of a row
    matrix = Matrix.from_codes(torch.stack((pair % 16, pair // 16), dim=-1).flatten(1), torch.full((256, 1), 127))
    x = torch.zeros(16, 32)
    x[torch.arange(16), torch.arange(0, 32, 2)] = 1
    x[torch.arange(16), torch.arange(1, 32, 2)] = 32
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = values[pair % 16] + 32 * values[pair // 16]
    assert all(len(column.unique()) == 256 - 31 for column in expected.T)  # but for the zeros of either sign
    assert torch.equal(gemv_all(matrix, x, 1).T, expected)


@pytest.mark.parametrize("scale", [0, 1, 2, 100, 126, 127, 128, 150, 253, 254])
def test_scales_are_exact_from_end_to_end(scale):
    """Byte 0 is 2^-127, a subnormal in float32; the vector is as large as the largest byte allows."""
    codes = torch.randint(0, 7, (3, 96), generator=torch.Generator().manual_seed(scale))
    codes[:, 50] = 2
    matrix, x = Matrix.from_codes(codes, torch.full((3, 3), scale)), torch.zeros(96)
    x[[31, 50]] = torch.tensor([0.25, -1.5]) * 2.0**-11
    # In float64 from the start, as 4 * 2^127 is no float32.
    expected = Matrix(matrix.blocks, torch.full((3, 3), 127)).values() @ x.double()
    expected *= 2.0 ** (scale - 127)
    assert (expected != 0).all()
    assert torch.equal(gemv(matrix, x, 2).double(), expected)


@pytest.mark.parametrize("scale", [200, 254])
def test_scales_whose_product_overflows_lose_no_row(scale):
    """The scale times the vector's unit, a power of two, overflows; no row is lost, and zeros stay zeros."""
    codes = torch.zeros(3, 64)
    codes[:2, 40] = 1  # 0.5
    scales = torch.tensor([scale, scale - 1, scale])[:, None].expand(3, 2)
    x = torch.zeros(64)
    x[40] = -1.75 * 2.0 ** (127 - (scale - 127))
    matrix = Matrix.from_codes(codes, scales)
    assert torch.equal(gemv(matrix, x, 1).double(), matrix.values() @ x.double())
    for power in (2, 4, 2**20):
        expected = power * (matrix.values() @ x.double())
        expected[expected.abs() > torch.finfo(torch.float32).max] = -torch.inf
        assert torch.equal(gemv(matrix, power * x, 1).double(), expected)


def test_a_sum_beyond_float32_is_infinite():
    codes = torch.full((2, 32), 7)  # 6
    x = torch.zeros(32)
    x[[0, 1]] = torch.tensor([1.0, -0.75])
    matrix = Matrix.from_codes(codes, torch.full((2, 1), 254))
    assert gemv(matrix, x, 1).tolist() == [1.5 * 2.0**127] * 2
    assert gemv(matrix, x.abs(), 1).isposinf().all()


@pytest.mark.parametrize("warps", WARPS)
def test_groups_with_their_own_scales_are_exact(warps):
    """Each group has one element, and each row and group its own power of two."""
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


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_activation_that_is_no_number_shows(value, warps):
    """NaN or infinity in an activation makes all rows NaN."""
    matrix = random_matrix(4, 416)
    x = random_vector(416).repeat(5, 1)
    x[torch.arange(5), torch.tensor([0, 31, 70, 383, 415])] = value
    assert gemv_all(matrix, x, warps).isnan().all()


@pytest.mark.parametrize("warps", WARPS)
def test_zeros_give_zeros(warps):
    """A vector without activations has no largest magnitude to scale by; a matrix may have no elements."""
    matrix, x = random_matrix(7, 416), random_vector(416)
    assert gemv(matrix, torch.zeros(416), warps).tolist() == [0.0] * 7
    assert gemv(matrix, -torch.zeros(416), warps).tolist() == [0.0] * 7
    nothing = Matrix(torch.zeros_like(matrix.blocks), matrix.scales)
    assert gemv(nothing, x, warps).tolist() == [0.0] * 7


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("k", [32, 96, 416, 2048, 2080, 2880])
def test_bytes_of_a_tile_are_those_that_packing_makes(k, warps):
    """The kernel's byte counts are those of the packed tensors."""
    matrix = random_matrix(16, k)
    assert block_bytes(k) == pack_blocks(matrix.blocks).nbytes
    assert scale_bytes(k, warps) == pack_scales(matrix.scales, warps).nbytes


@pytest.mark.parametrize("k", [128, 416, 2880])
def test_each_part_has_its_place(k):
    """Each part has its own place, those of elements beyond K too, where the description says."""
    n = tile_vector_size(k) // 2  # whole quads
    places = torch.full((2, n), -1, dtype=torch.int32)
    places_kernel[(1,)](places, N=n)
    assert torch.equal(places.flatten().sort().values, torch.arange(2 * n, dtype=torch.int32))
    described = torch.arange(2 * n, dtype=torch.int32).view(-1, 4, 2, 4, 8)  # quad, eight of a group, part, group, -
    assert torch.equal(places, described.permute(2, 0, 3, 1, 4).reshape(2, n))


def additions(k: int, warps: int) -> int:
    """Count the float32 roundings on an element's way into a result, in any order inside a group of 32."""
    steps = triton.cdiv(k, 128 * warps)
    # A group's products and their sum, that of values and rests, and what is summed over steps, threads and warps.
    return 32 + 1 + steps + 2 + warps.bit_length() - 1


def split_error(x: torch.Tensor) -> torch.Tensor:
    """Return the error that two FP16 numbers may leave of each activation.

    The value errs by at most half its last place, 2^-11 of its power of two. The second number is 2^11 times that rest,
    at most the value's power of two, and as FP16 errs by 2^-12 of it: 2^-23 in all. A subnormal second number errs by
    2^-25, 2^-36 in all, where the largest activation is at least 2^14: 2^-50 of it. Vectors below 2^-95 are scaled up
    by 2^109 only, which leaves 2^-145.
    """
    x = x.double().abs()
    return torch.maximum(SPLIT * x, (2.0**-50 * x.max()).clamp(min=2.0**-145))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("warps", WARPS)
def test_real_activations_agree_with_float64(warps, magnitude):
    rows, k = 40, 2880
    matrix = random_matrix(rows, k, scales=(118, 131))
    x = normal_vector(k) * magnitude
    actual = gemv(matrix, x, warps).double()
    bound = matrix.values().abs() @ (split_error(x) + additions(k, warps) * UNIT * x.double().abs())
    assert ((actual - matrix.values() @ x.double()).abs() <= bound).all()


@pytest.mark.parametrize("magnitude", [1e-33, 1e-36, 1e-37, 1e-39, 1e-41])
def test_activations_near_the_end_of_float32_are_right(magnitude):
    """Results may be subnormal; each group's contribution is then rounded to 2^-149, by half of it at most."""
    rows, k, warps = 40, 416, 2
    matrix = random_matrix(rows, k, scales=(118, 131))
    x = normal_vector(k) * magnitude
    actual = gemv(matrix, x, warps).double()
    bound = matrix.values().abs() @ (split_error(x) + additions(k, warps) * UNIT * x.double().abs())
    assert ((actual - matrix.values() @ x.double()).abs() <= bound + k // 32 * 2.0**-150).all()
    assert actual.any()


@pytest.mark.parametrize("power", [-90, -20, 20, 100])
def test_a_power_of_two_changes_no_bit(power):
    """A vector is brought to FP16's range by exponents alone."""
    matrix = random_matrix(16, 416, scales=(110, 120))
    x = normal_vector(416, seed=1)
    assert torch.equal(gemv(matrix, x * 2.0**power, 2), gemv(matrix, x, 2) * 2.0**power)


def each_alone(x: torch.Tensor) -> torch.Tensor:
    """Put each activation in a row by itself, so that only its own rounding shows."""
    k = len(x)
    return gemv(Matrix.from_codes(torch.eye(k) * 2, torch.full((k, k // 32), 127)), x, 1)  # 1


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30, 3.4e38])
def test_an_activation_keeps_22_bits(magnitude):
    x = (torch.rand(64, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.1) * magnitude
    error = (each_alone(x).double() / x.double() - 1).abs()
    assert error.max() <= SPLIT
    assert error.max() > 0  # what float32 has more of is lost


def test_small_activations_keep_as_many_bits():
    """Rests are times 2^11, so precision holds down to 2^-27 of the largest activation; below, 2^-50 of it is lost."""
    below = torch.arange(64) % 40
    x = (torch.rand(64, generator=torch.Generator().manual_seed(4)) + 1) * 2.0**-below
    error = (each_alone(x).double() - x.double()).abs()
    assert (error <= torch.where(below <= 27, SPLIT * x.double(), 2.0**-50)).all()
    assert (error <= split_error(x)).all()


def test_two_float16_are_far_closer_than_one_or_bfloat16():
    """One FP16 value would err two thousand times as much, bfloat16 more: a second column a group is worth it."""
    rows, k = 40, 2880
    matrix = random_matrix(rows, k, scales=(118, 131))
    x = normal_vector(k, seed=3)
    expected = matrix.values() @ x.double()

    def error(y: torch.Tensor) -> float:
        return ((y.double() - expected).norm() / expected.norm()).item()

    found = error(gemv(matrix, x, 4))
    assert found < error(matrix.values() @ x.half().double()) / 1000
    assert found < error(matrix.values() @ x.bfloat16().double()) / 8000
