"""common.sm90.tiles against a slow unpacking, one element at a time, written from the description of the layout."""

import pytest
import torch

from common.sm90.tile_product import tile_vector_size
from common.sm90.tiles import (
    block_bytes,
    drop_elements_of_nan,
    pack_blocks,
    pack_scales,
    scale_bytes,
    stage_bytes,
    tile_count,
)

# Rows and scale groups: whole tiles, one short of it and one beyond, a quad's groups and one more or less of them, and
# the published width.
SIZES = [(16, 4), (1, 1), (7, 3), (15, 2), (17, 5), (33, 13), (40, 90)]
LEADS = [(), (3,), (2, 3), (1, 1, 2)]
WARPS = [1, 2, 4, 8]
PLACES = [(15, 9), (12, 6), (14, 3), (13, 0)]  # in half a word: bit of the sign, lowest of three of the magnitude


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def codes_of(blocks: torch.Tensor) -> list[list[int]]:
    """Turn published blocks [rows, groups, 16] into E2M1 codes by row and column.

    The low nibble is the even element.
    """
    return [[code for byte in row.flatten().tolist() for code in (byte & 15, byte >> 4)] for row in blocks]


def unpack_blocks(words: torch.Tensor) -> list[list[int]]:
    """Turn int32 [tiles, words] into E2M1 codes by row and column, of all that the tiles hold."""
    n_quads = words.shape[1] // 256
    codes = [[-1] * (128 * n_quads) for _ in range(16 * len(words))]
    for tile, tile_words in enumerate(words.tolist()):
        for at, word in enumerate(tile_words):
            quad, odd, thread = at // 256, at // 128 % 2, at // 4 % 32
            r, t = thread // 4, thread % 4
            row, column = 16 * tile + 2 * r + odd, 128 * quad + 32 * t + 8 * (at % 4)
            for j, (sign, magnitude) in enumerate(PLACES):
                for half in (0, 1):
                    bits = word >> 16 * half
                    assert codes[row][column + 2 * j + half] == -1
                    codes[row][column + 2 * j + half] = (bits >> sign & 1) << 3 | bits >> magnitude & 7
    return codes


def unpack_scales(words: torch.Tensor, warps: int) -> list[list[int]]:
    """Turn int32 [tiles, words] into scales by row and group, of all that the tiles hold.

    In a step, warp w has quad number step * warps + w. A word belongs to a thread: of its group t, the scales of rows 2
    r and 2 r + 1, for two steps.
    """
    n_pairs = words.shape[1] // (32 * warps)
    scales = [[-1] * (8 * warps * n_pairs) for _ in range(16 * len(words))]
    for tile, tile_words in enumerate(words.tolist()):
        for at, word in enumerate(tile_words):
            pair, warp, thread = at // (32 * warps), at // 32 % warps, at % 32
            r, t = thread // 4, thread % 4
            for byte in range(4):
                step, odd = 2 * pair + byte // 2, byte % 2
                row, group = 16 * tile + 2 * r + odd, 4 * (step * warps + warp) + t
                assert scales[row][group] == -1
                scales[row][group] = word >> 8 * byte & 255
    return scales


def padded(values: list[list[int]], n_rows: int, n_columns: int) -> list[list[int]]:
    return [row + [0] * (n_columns - len(row)) for row in values] + [[0] * n_columns] * (n_rows - len(values))


@pytest.mark.parametrize("rows, tiles", [(1, 1), (15, 1), (16, 1), (17, 2), (2880, 180), (5760, 360)])
def test_tiles(rows, tiles):
    assert tile_count(rows) == tiles


@pytest.mark.parametrize("k, quads", [(32, 1), (96, 1), (128, 1), (160, 2), (2880, 23)])
def test_each_quad_takes_1024_bytes_of_blocks(k, quads):
    """Each quad of 128 columns takes 1,024 bytes, whole or not."""
    assert block_bytes(k) == 1024 * quads


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("k", [32, 64, 256, 288, 2048, 2080, 2880])
def test_scales_take_a_byte_for_each_row_and_group(k, warps):
    """Each row and group has a byte, in as many pairs of steps, of 128 columns a warp, as cover K."""
    pairs = next(n for n in range(1, 100) if n * 2 * warps * 128 >= k)
    assert scale_bytes(k, warps) == pairs * 2 * warps * 4 * 16


@pytest.mark.parametrize("k, quads", [(32, 1), (96, 1), (128, 1), (160, 2), (2880, 23)])
def test_each_element_of_a_vector_has_two_parts(k, quads):
    """Each element of whole quads has two parts."""
    assert tile_vector_size(k) == 2 * 128 * quads


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("k", [32, 128, 160, 256, 416, 1024, 1056, 2048, 2080, 2880, 4096])
def test_a_stage_holds_an_expert_tile_and_all_reads(k, warps):
    """A stage has as many bytes as arrive or are read. All warps read a quad and a word of scales each step."""
    arrive = block_bytes(k) + scale_bytes(k, warps)
    reads = []
    for step in range(-(-k // (128 * warps))):
        for warp in range(warps):
            reads.append(1024 * (step * warps + warp) + 1024)
            reads.append(block_bytes(k) + step // 2 * 128 * warps + 128 * warp + 128)
    assert stage_bytes(k, warps) == max(arrive, *reads)


@pytest.mark.parametrize("rows, groups", SIZES)
def test_blocks_are_where_the_description_says(rows, groups):
    """Every element is where the description says, and all others are zeros."""
    blocks = random_bytes(rows, groups, 16)
    words = pack_blocks(blocks)
    assert words.dtype == torch.int32
    assert words.shape == (tile_count(rows), block_bytes(32 * groups) // 4)
    found = unpack_blocks(words)
    assert found == padded(codes_of(blocks), len(found), len(found[0]))


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("rows, groups", SIZES)
def test_scales(rows, groups, warps):
    scales = random_bytes(rows, groups)
    words = pack_scales(scales, warps)
    assert words.dtype == torch.int32
    assert words.shape == (tile_count(rows), scale_bytes(32 * groups, warps) // 4)
    found = unpack_scales(words, warps)
    assert found == padded(scales.tolist(), len(found), len(found[0]))


def test_whole_tiles_take_no_more_room():
    """The packing is a bijection: unpacking finds all elements, and no room is left over."""
    rows, groups, warps = 32, 16, 2
    assert pack_blocks(random_bytes(rows, groups, 16)).nbytes == rows * groups * 16
    assert pack_scales(random_bytes(rows, groups), warps).nbytes == rows * groups


@pytest.mark.parametrize("lead", LEADS)
def test_each_matrix_of_a_stack_is_packed_alone(lead):
    """Each matrix of a stack is packed as if it were alone."""
    rows, groups, warps = 19, 3, 2
    blocks, scales = random_bytes(*lead, rows, groups, 16), random_bytes(*lead, rows, groups)
    words, scale = pack_blocks(blocks), pack_scales(scales, warps)
    assert words.shape == (*lead, 2, block_bytes(32 * groups) // 4)
    assert scale.shape == (*lead, 2, scale_bytes(32 * groups, warps) // 4)
    n = blocks.numel() // (rows * groups * 16)
    for i in range(n):
        assert torch.equal(words.view(n, 2, -1)[i], pack_blocks(blocks.view(n, rows, groups, 16)[i]))
        assert torch.equal(scale.view(n, 2, -1)[i], pack_scales(scales.view(n, rows, groups)[i], warps))


def test_views_are_packed_like_their_copies():
    """A checkpoint's tensors need not be contiguous."""
    blocks, scales = random_bytes(4, 40, 16).transpose(0, 1)[::2], random_bytes(4, 40).T[::2]
    assert torch.equal(pack_blocks(blocks), pack_blocks(blocks.contiguous()))
    assert torch.equal(pack_scales(scales, 2), pack_scales(scales.contiguous(), 2))


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("rows, groups", [(18, 19), (32, 8)])
def test_elements_whose_scale_is_nan_are_packed_as_zeros(rows, groups, warps):
    """Nothing but these elements changes."""
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(0, 256, (3, rows, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, rows, groups), generator=generator, dtype=torch.uint8)
    packed = pack_blocks(blocks)
    drop_elements_of_nan(packed, pack_scales(scales, warps), warps)
    assert torch.equal(packed, pack_blocks(blocks))
    for at in [(0, 0, 0), (1, 3, groups - 1), (2, rows - 1, 4)]:
        scales[at] = 255
        blocks[at] = 0
    drop_elements_of_nan(packed, pack_scales(scales, warps), warps)
    assert torch.equal(packed, pack_blocks(blocks))
