"""common.gemm_fp4 against products in float64. NaN stands in all memory that must not be read.

Elements and vectors that are small integers have exact sums in float32 in any order, so that each way to compute them
must give float64's result to the last bit.
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from prompt_columns import column_in_tiles

from common import build
from common.build import Operand
from common.cpu import CPU
from common.gemm_fp4 import Fp4Matrix, gemm_fp4, gemm_fp4_fp8, split_rows
from common.sm90 import SM_90
from common.sm90.tiles import pack_blocks, pack_scales
from host.tuning import Tile

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
NAN_SCALE = 255
# How a matrix stands in memory, and the vectors: rows and float16, rows and MXFP8 for scaled matrix cores, or sm_90's
# tiles and float16: packed for so many warps, and multiplied by so many, or as many as a block has tiles.
ROWS, SCALED, TILES = "rows", "scaled", [(1, 1), (2, 4), (4, 2), (8, 8)]
WAYS = [ROWS, SCALED, *TILES]
# K is a whole number of groups of 32, but no whole quad of them; rows are no whole tiles of 16.
SHAPES = [(1, 32), (7, 96), (16, 128), (33, 160), (40, 416), (19, 2880)]
BLOCKS = [(16, 128), (64, 512), (128, 128)]
with_machine = pytest.mark.parametrize("machine", [CPU, SM_90], ids=["rows", "tiles"])
with_way = pytest.mark.parametrize("way", WAYS, ids=str)
with_blocks = pytest.mark.parametrize("block_m, block_k", BLOCKS)


@triton.jit
def gemm_kernel(
    out_ptr,
    blocks_ptr,
    scales_ptr,
    base,
    x_ptr,
    x_scale_ptr,
    x_row_ptr,
    MATRIX: tl.constexpr,
    N: tl.constexpr,
    MORE_N: tl.constexpr,
    TILE: tl.constexpr,
    PACKED_WARPS: tl.constexpr,
    MACHINE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Write out [places, N + MORE_N], a tile of places per program; MORE_N vectors are a second part."""
    m0 = tl.program_id(0) * TILE.m
    at = (m0 + tl.arange(0, TILE.m))[:, None] * (N + MORE_N)
    n = tl.arange(0, N)
    if MORE_N:
        more = N + tl.arange(0, MORE_N)
        x_rows = (tl.load(x_row_ptr + n), tl.load(x_row_ptr + more))
    else:
        x_rows = (tl.load(x_row_ptr + n),)
    if SCALED:
        matrix, x = Operand(blocks_ptr, scales_ptr), Operand(x_ptr, x_scale_ptr)
        accs = gemm_fp4_fp8(matrix, x, m0, x_rows, MATRIX, TILE)
    else:
        matrix = Fp4Matrix(blocks_ptr, scales_ptr, base)
        accs = gemm_fp4(matrix, x_ptr, m0, x_rows, MATRIX, TILE, PACKED_WARPS, MACHINE)
    tl.store(out_ptr + at + n[None, :], accs[0])
    if MORE_N:
        tl.store(out_ptr + at + more[None, :], accs[1])


@triton.jit
def column_kernel(columns_ptr, N: tl.constexpr, MACHINE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(columns_ptr + i, MACHINE.prompts.column_of(i))


@triton.jit
def in_columns_kernel(out_ptr, columns_ptr, x_ptr, i0, N: tl.constexpr, M: tl.constexpr, MACHINE: tl.constexpr):
    """Write what in_columns makes of elements i0 .. of x [N, .. M]."""
    m, n = tl.arange(0, M), tl.arange(0, N)[:, None]
    x, columns = MACHINE.prompts.in_columns(tl.load(x_ptr + n * M + m[None, :]), i0)
    tl.store(out_ptr + n * M + m[None, :], x)
    tl.store(columns_ptr + m, columns)


@triton.jit
def in_rows_kernel(out_ptr, x_ptr, M: tl.constexpr, N: tl.constexpr, MACHINE: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, MACHINE.prompts.in_rows(tl.load(x_ptr + at)))


@triton.jit
def split_kernel(even_ptr, odd_ptr, x_ptr, M: tl.constexpr, N: tl.constexpr, MACHINE: tl.constexpr):
    n = tl.arange(0, N)[None, :]
    even, odd = split_rows(tl.load(x_ptr + tl.arange(0, M)[:, None] * N + n), MACHINE)
    at = tl.arange(0, M // 2)[:, None] * N + n
    tl.store(even_ptr + at, even)
    tl.store(odd_ptr + at, odd)


class Matrix:
    """codes [rows, K], E2M1, and scales uint8 [rows, K / 32]."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor):
        self.codes, self.scales = codes.to(torch.uint8), scales.to(torch.uint8)

    def published(self) -> torch.Tensor:
        """Return uint8 [rows, K / 32, 16], the first element of two in the lower bits."""
        return (self.codes[:, 0::2] | self.codes[:, 1::2] << 4).unflatten(1, (-1, 16))

    def values(self) -> torch.Tensor:
        return E2M1[self.codes.int()] * powers_of_two(self.scales).repeat_interleave(32, 1)

    def base(self) -> int:
        return max((scale for scale in self.scales.flatten().tolist() if scale != NAN_SCALE), default=0)


class Vectors(NamedTuple):
    """Vectors of integers, or other numbers that E4M3 and float16 hold, with scales that float16 vectors hold too."""

    elements: torch.Tensor  # [vectors, K]
    scales: torch.Tensor  # uint8 [vectors, K / 32]

    def values(self) -> torch.Tensor:
        return self.elements.double() * powers_of_two(self.scales).repeat_interleave(32, 1)


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scales.double() - 127).masked_fill(scales == NAN_SCALE, torch.nan)


def random_matrix(rows: int, k: int, seed: int = 0, scales=(123, 128)) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), generator=generator)
    return Matrix(codes, torch.randint(*scales, (rows, k // 32), generator=generator))


def random_vectors(n: int, k: int, seed: int = 0, scales=(126, 129)) -> Vectors:
    generator = torch.Generator().manual_seed(seed + 100)
    elements = torch.randint(-4, 5, (n, k), generator=generator).float()
    return Vectors(elements, torch.randint(*scales, (n, k // 32), generator=generator).to(torch.uint8))


def before(fill: float, count: int, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.flatten(), torch.full((count,), fill).to(x.dtype)))


def exactly(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    assert torch.equal(x.to(dtype).double().nan_to_num(), x.double().nan_to_num())
    return x.to(dtype)


def gemm(
    matrix: Matrix,
    vectors: Vectors,
    way,
    block_m: int = 64,
    block_k: int = 128,
    x_rows: list[int] | None = None,
    more: int = 0,
) -> torch.Tensor:
    """Return float64 [rows, vectors] of W x^T with all factors, for x_rows or all vectors; `more` are in a second part.

    Places beyond the last row must hold finite numbers if all numbers are finite, and are cut off.
    """
    rows, k = matrix.codes.shape
    packed = way in TILES
    x_rows = x_rows or list(range(len(vectors.elements)))
    n = max(16, triton.next_power_of_2(len(x_rows) - more))
    blocks = pack_blocks(matrix.published()) if packed else matrix.published().flatten(1).view(torch.int32)
    packed_warps, num_warps = (way[0], min(way[1], block_m // 16)) if packed else (0, 0)
    scales = pack_scales(matrix.scales, packed_warps) if packed else matrix.scales
    if way == SCALED:
        x, x_scales = exactly(vectors.elements, torch.float8_e4m3fn), vectors.scales
    else:
        x, x_scales = exactly(vectors.values(), torch.float16), torch.zeros(0, dtype=torch.uint8)
    if packed:
        x = in_the_order_of_tiles(x)
    n_tiles = triton.cdiv(rows, block_m)
    places = n_tiles * block_m
    out = torch.full((places, n + more), torch.nan)
    gemm_kernel[(n_tiles,)](
        out,
        before(0x77777777, places * block_k, blocks),
        before(-1 if packed else NAN_SCALE, places * block_k, scales),
        matrix.base(),
        before(torch.nan, block_k, x),
        before(NAN_SCALE, block_k, x_scales),
        torch.tensor([*x_rows, *[x_rows[-1]] * (n + more - len(x_rows))], dtype=torch.int32),
        MATRIX=build.Matrix("", rows, k, "mxfp4", block_m, block_k),
        N=n,
        MORE_N=more,
        TILE=Tile(block_m, n, block_k, num_warps, stages=1),
        PACKED_WARPS=packed_warps,
        MACHINE=SM_90 if packed else CPU,
        SCALED=way == SCALED,
    )
    place = [place_in_tiles(row) if packed else row for row in range(rows)]
    beyond = [m for m in range(places) if m not in place]
    finite = not (matrix.scales == NAN_SCALE).any() and vectors.elements[x_rows].isfinite().all()
    assert out[beyond].isfinite().all() or not finite
    factor = 1.0 if way == SCALED else 2.0 ** (matrix.base() - 127)
    return out[place, : len(x_rows)].double() * factor


def place_in_tiles(row: int) -> int:
    """Return a row's place in a tile of 16, in which even rows come first."""
    return row // 16 * 16 + [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15][row % 16]


def in_the_order_of_tiles(x: torch.Tensor) -> torch.Tensor:
    """Reorder [vectors, K] to [vectors, K in whole 128], with zeros beyond K."""
    k = x.shape[1]
    padded = x.new_zeros(len(x), -(-k // 128) * 128)
    padded[:, [column_in_tiles(column) for column in range(k)]] = x
    return padded


def expected(matrix: Matrix, vectors: Vectors) -> torch.Tensor:
    return matrix.values() @ vectors.values().T


@pytest.mark.parametrize("n", [16, 128, 512])
@with_machine
def test_the_columns_of_elements(machine, n):
    columns = torch.full((n,), -1, dtype=torch.int32)
    column_kernel[(1,)](columns, N=n, MACHINE=machine)
    assert columns.tolist() == [column_in_tiles(k) if machine is SM_90 else k for k in range(n)]
    assert n < 128 or sorted(columns.tolist()) == list(range(n))


@pytest.mark.parametrize(
    "i0, m", [(0, 32), (32, 32), (96, 32), (224, 32), (0, 64), (64, 64), (192, 64), (256, 128), (256, 256)]
)
@with_machine
def test_elements_are_in_the_order_of_their_columns(machine, i0, m):
    """Runs that are stored together hold as many of each 128 elements' 8 columns as there are quarters."""
    x = torch.arange(2 * m, dtype=torch.float32).view(2, m)
    out, columns = torch.zeros(2, m), torch.full((m,), -1, dtype=torch.int32)
    in_columns_kernel[(1,)](out, columns, x, i0, N=2, M=m, MACHINE=machine)
    assert columns.tolist() == sorted(columns.tolist())
    stands = {column_in_tiles(i0 + i) if machine is SM_90 else i0 + i: i for i in range(m)}
    assert columns.tolist() == sorted(stands)
    assert torch.equal(out, x[:, [stands[column] for column in columns.tolist()]])


@pytest.mark.parametrize("k, padded", [(32, 128), (128, 128), (160, 256), (2880, 2944)])
def test_vectors_for_tiles_have_whole_quads(k, padded):
    assert (SM_90.prompts.vector_stride(k), CPU.prompts.vector_stride(k)) == (padded, k)


@pytest.mark.parametrize("m, n", [(16, 16), (64, 2), (128, 32)])
@with_machine
def test_rows_of_a_result_are_in_order(machine, m, n):
    """All rows come in order, and gate and up, the even and odd ones, apart."""
    x = torch.arange(m * n, dtype=torch.float32).view(m, n)
    place = [place_in_tiles(row) if machine is SM_90 else row for row in range(m)]
    stored = torch.empty(m, n)
    stored[place] = x
    rows = torch.zeros(m, n)
    in_rows_kernel[(1,)](rows, stored, M=m, N=n, MACHINE=machine)
    assert torch.equal(rows, x)
    even, odd = torch.zeros(m // 2, n), torch.zeros(m // 2, n)
    split_kernel[(1,)](even, odd, stored, M=m, N=n, MACHINE=machine)
    assert torch.equal(even, x[0::2])
    assert torch.equal(odd, x[1::2])


@with_way
@with_blocks
@pytest.mark.parametrize("rows, k", SHAPES)
def test_sums_of_integers_are_exact(rows, k, block_m, block_k, way):
    matrix, vectors = random_matrix(rows, k), random_vectors(5, k)
    sums = expected(matrix, vectors)
    unit = 0.5 * powers_of_two(matrix.scales).min() * powers_of_two(vectors.scales).min()
    assert (matrix.values().abs() @ vectors.values().abs().T / unit < 2**24).all(), "then any partial sum is a float32"
    assert torch.equal(gemm(matrix, vectors, way, block_m, block_k), sums)


@with_way
@pytest.mark.parametrize("n", [17, 20, 32, 33])
def test_vectors_in_two_parts_are_exact(n, way):
    """The second part has 16 vectors; the last vector is repeated where there are not enough."""
    matrix, vectors = random_matrix(33, 160), random_vectors(n, 160)
    assert torch.equal(gemm(matrix, vectors, way, more=16), expected(matrix, vectors))


@with_way
def test_vectors_in_any_order_are_exact(way):
    """Some vectors in memory are used, some twice; the others are NaN."""
    matrix, vectors = random_matrix(20, 160), random_vectors(9, 160)
    x_rows = [7, 2, 2, 0, 8]
    sums = expected(matrix, vectors)[:, x_rows]
    others = [row for row in range(9) if row not in x_rows]
    vectors.elements[others], vectors.scales[others] = torch.nan, NAN_SCALE
    if way != SCALED:
        vectors.scales[others] = 127
    assert torch.equal(gemm(matrix, vectors, way, x_rows=x_rows), sums)


# Every place in a word, both ends of words, groups, quads and blocks, and the tail that a block masks.
POSITIONS = [*range(8), 15, 16, 31, 32, 63, 64, 96, 127, 128, 150, 159]


@with_way
def test_a_single_activation_picks_its_column(way):
    """Each vector has one activation; all are multiplied together."""
    matrix = random_matrix(20, 160)
    vectors = Vectors(torch.zeros(len(POSITIONS), 160), torch.full((len(POSITIONS), 5), 127, dtype=torch.uint8))
    vectors.elements[range(len(POSITIONS)), POSITIONS] = -3.0
    assert torch.equal(gemm(matrix, vectors, way), -3.0 * matrix.values()[:, POSITIONS])


@with_way
def test_a_single_element_picks_its_activation(way):
    """Each row has one element."""
    codes = torch.zeros(len(POSITIONS), 160)
    codes[range(len(POSITIONS)), POSITIONS] = 13  # -3
    matrix = Matrix(codes, 120 + torch.arange(5 * len(POSITIONS)).view(-1, 5) % 8)
    vectors = Vectors((torch.arange(160.0) % 13 + 1)[None], torch.full((1, 5), 127, dtype=torch.uint8))
    at = torch.tensor(POSITIONS)
    picked = -3.0 * powers_of_two(matrix.scales)[range(len(at)), at // 32] * vectors.elements[0, at].double()
    assert gemm(matrix, vectors, way)[:, 0].tolist() == picked.tolist()


@with_way
def test_every_code_at_every_place_of_a_word(way):
    """With the identity as vectors the result is the matrix."""
    codes = (torch.arange(32)[:, None] + torch.arange(32)[None, :]) % 16
    matrix = Matrix(codes, torch.full((32, 1), 127))
    vectors = Vectors(torch.eye(32), torch.full((32, 1), 127, dtype=torch.uint8))
    assert torch.equal(gemm(matrix, vectors, way), E2M1[codes])


@pytest.mark.parametrize("base", [0, 1, 26, 127, 200, 253, 254])
@pytest.mark.parametrize("way", [ROWS, TILES[1]], ids=str)
def test_scales_are_exact_from_end_to_end(way, base):
    """Relative to the largest scale all are exact down to 2^-23, in subnormal float16 too."""
    least = max(0, base - 23)
    generator = torch.Generator().manual_seed(base)
    codes = torch.randint(0, 16, (24, 768), generator=generator)
    scales = torch.cat([torch.randperm(24, generator=generator)[None] for _ in range(24)]).clamp(max=base - least)
    matrix = Matrix(codes, least + scales)
    assert (matrix.scales.amin(), matrix.scales.amax()) == (least, base)
    # One activation a vector: a sum of one product is exact whatever its scale. A group each.
    vectors = Vectors(torch.zeros(24, 768), torch.full((24, 24), 127, dtype=torch.uint8))
    vectors.elements[range(24), torch.arange(24) * 32 + torch.arange(24)] = 5.0
    assert torch.equal(gemm(matrix, vectors, way), expected(matrix, vectors))


@pytest.mark.parametrize("way", [ROWS, *TILES], ids=str)
def test_small_scales_keep_the_absolute_precision_of_large_ones(way):
    """Beside the largest scale stand all of E8M0; float16 errs by half of its least step, 2^-24."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 416), generator=generator)
    matrix = Matrix(codes, torch.randint(0, 255, (40, 13), generator=generator))
    matrix.scales[0, 0] = 254
    vectors = Vectors(torch.randint(-4, 5, (3, 416), generator=generator).float(), random_vectors(3, 416).scales)
    error = (gemm(matrix, vectors, way) - expected(matrix, vectors)).abs()
    bound = 2.0 ** (254 - 127) * vectors.values().abs().sum(1) * 2.0**-25
    # Besides, a sum of numbers as large as the largest element is rounded.
    bound = bound + 2.0**-20 * (matrix.values().abs() @ vectors.values().abs().T)
    assert (error <= bound).all()


@pytest.mark.parametrize("below", [22, 23, 24, 25, 28, 29, 60, 254])
@pytest.mark.parametrize("way", [ROWS, TILES[0]], ids=str)
def test_one_small_scale_is_rounded_beside_the_largest(way, below):
    """Row 0 has the largest scale, row 1 one so far `below` that it is rounded to multiples of 2^-24 of the largest."""
    matrix = Matrix(torch.arange(32).repeat(2, 1) % 16, torch.tensor([[254], [254 - below]]))
    vectors = Vectors(torch.eye(32), torch.full((32, 1), 127, dtype=torch.uint8))
    found = gemm(matrix, vectors, way) / 2.0**127
    values = E2M1[matrix.codes[1].int()] * 2.0**-below
    assert torch.equal(found[0], E2M1[matrix.codes[0].int()])
    assert torch.equal(found[1], (values * 2**24).round() / 2**24)  # to even, as float16 does


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 253, 254])
def test_scales_from_end_to_end_for_scaled_products(scale):
    """The smallest scale gives subnormal sums, which are exact too."""
    # Elements below 2, as 2 * 2^127 is no float32, to which the interpreter's dot_scaled dequantizes.
    codes = torch.randint(0, 16, (20, 96), generator=torch.Generator().manual_seed(scale)) & 0b1011
    matrix = Matrix(codes, torch.full((20, 3), scale))
    elements = torch.zeros(2, 96)
    elements[0, [0, 31, 32, 50, 95]] = torch.tensor([-2.0, 1.0, 5.0, -3.0, 4.0])
    elements[1, 64:] = 1.0
    vectors = Vectors(elements, torch.full((2, 3), 119, dtype=torch.uint8))
    assert torch.equal(gemm(matrix, vectors, SCALED), expected(matrix, vectors))


def test_groups_with_their_own_scales_for_scaled_products():
    """Each group has one element, at its own power of two in the matrix and in the vector."""
    codes, elements = torch.zeros(5, 160), torch.zeros(1, 160)
    for group in range(5):
        codes[group, group * 32 + 7 * group] = 2
        elements[0, group * 32 + 7 * group] = 1.5
    scales = torch.tensor([[100, 110, 127, 140, 150]]).repeat(5, 1) + torch.arange(5)[:, None]
    vectors = Vectors(elements, torch.tensor([[120, 125, 127, 131, 139]], dtype=torch.uint8))
    matrix = Matrix(codes, scales)
    assert torch.equal(gemm(matrix, vectors, SCALED), expected(matrix, vectors))


def test_every_activation_for_scaled_products():
    elements = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)[None]
    matrix = Matrix(torch.eye(256) * 2, torch.full((256, 8), 127))
    vectors = Vectors(elements, torch.full((1, 8), 127, dtype=torch.uint8))
    assert torch.equal(gemm(matrix, vectors, SCALED)[:, 0], elements[0].double())


@with_way
@pytest.mark.parametrize("row, group", [(3, 4), (17, 0), (19, 2)])
def test_a_scale_of_nan_shows_in_its_row_alone(row, group, way):
    """A scale of NaN does not enter `base`."""
    matrix, vectors = random_matrix(20, 160), random_vectors(3, 160)
    sums = expected(matrix, vectors)
    matrix.scales[row, group] = NAN_SCALE
    out = gemm(matrix, vectors, way)
    others = [r for r in range(20) if r != row]
    assert out[row].isnan().all()
    assert torch.equal(out[others], sums[others])


@with_way
def test_nothing_but_scales_of_nan(way):
    matrix, vectors = random_matrix(20, 96), random_vectors(3, 96)
    matrix.scales[:] = NAN_SCALE
    assert gemm(matrix, vectors, way).isnan().all()


@with_way
def test_an_activation_of_nan_shows_in_its_column_alone(way):
    matrix, vectors = random_matrix(20, 96), random_vectors(3, 96)
    sums = expected(matrix, vectors)
    vectors.elements[1, 70] = torch.nan
    out = gemm(matrix, vectors, way)
    assert out[:, 1].isnan().all()
    assert torch.equal(out[:, [0, 2]], sums[:, [0, 2]])


@with_way
@with_blocks
def test_real_vectors_agree_with_float64(block_m, block_k, way):
    """Vectors are float16 within its range, or MXFP8; sums of many bits round."""
    rows, k = 19, 2880
    generator = torch.Generator().manual_seed(0)
    matrix = random_matrix(rows, k, scales=(112, 131))
    elements = torch.randn(3, k, generator=generator) * 60
    scales = torch.full((3, k // 32), 127, dtype=torch.uint8)
    if way == SCALED:
        vectors = Vectors(elements.to(torch.float8_e4m3fn).float(), random_vectors(3, k, scales=(115, 122)).scales)
    else:
        vectors = Vectors(elements.half(), scales)
    error = (gemm(matrix, vectors, way, block_m, block_k) - expected(matrix, vectors)).abs()
    # Whatever the order, K additions; a tree's depth is far less, and so is the error seen.
    assert (error <= 2.0**-18 * (matrix.values().abs() @ vectors.values().abs().T)).all()
