"""MXFP4 matrices in the order that common/fp4_fragments.py reads.

A matrix is cut into tiles of 16 rows, a tile into quads of four scale groups, that is 128 columns. A quad of a tile is
1,024 bytes: for its even rows, then for its odd ones, 32 lanes of 16 bytes, of which lane 4 r + t has group t of row
2 r or 2 r + 1. Its four words have eight elements each: elements 2 j and 2 j + 1 in the lower and in the upper half, at
the j-th of four places for a sign and three bits of magnitude. Rows and columns beyond the matrix are zeros.

In a step each warp takes a quad: number step * warps + w is warp w's. Of the scales, a lane's word has those of its
group and its two rows for two steps: four bytes, the first step's first.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, QUAD, GROUP = 16, 4, 32
PLACES = ((15, 9), (12, 6), (14, 3), (13, 0))  # (bit of the sign, lowest bit of the magnitude)


def tile_count(rows: int) -> int:
    return -(-rows // ROWS)


def block_words(k: int) -> int:
    """int32 words of a tile's blocks."""
    return -(-k // (QUAD * GROUP)) * ROWS * QUAD * GROUP // 8


def scale_words(k: int, warps: int) -> int:
    """int32 words of a tile's scales."""
    return -(-k // (2 * warps * QUAD * GROUP)) * 2 * warps * QUAD * ROWS // 4


def expert_slot_bytes(k: int, warps: int) -> int:
    """Bytes of shared memory for a tile's blocks, for what the last warps read behind them, and for its scales."""
    blocks, scales = 4 * block_words(k), 4 * scale_words(k, warps)
    read = -(-k // (warps * QUAD * GROUP)) * warps * 1024
    return max(blocks + scales, read)


def vector_parts(k: int) -> int:
    """float16 elements of a vector's values and rests, see common.fp4_fragments.fragment_places."""
    return -(-k // (QUAD * GROUP)) * 2 * QUAD * GROUP


def pack_blocks(blocks: Tensor) -> Tensor:
    """uint8 [..., rows, K / 32, 16] as published -> int32 [..., tiles, words of a tile]."""
    *lead, rows, groups, _ = blocks.shape
    tiles = tile_count(rows)
    blocks = pad(blocks, (0, 0, 0, -groups % QUAD, 0, -rows % ROWS))
    # -, tile, row / 2, row, quad, group, word
    words = blocks.view(torch.int32).view(-1, tiles, ROWS // 2, 2, blocks.shape[-2] // QUAD, QUAD, 4)
    words = words.permute(0, 1, 4, 3, 2, 5, 6).reshape(*lead, tiles, -1)
    lower, upper = _half_words(blocks.device)
    return lower[words & 0xFFFF] | upper[words >> 16 & 0xFFFF]


@functools.cache
def _half_words(device: torch.device) -> tuple[Tensor, Tensor]:
    """What each half of a published word gives to a packed one, int32 [65536]: elements 0 to 3, and 4 to 7.

    Looking halves up is some 7 operations on a GPU, moving their bits some 30, which are what loading waits for.
    """
    half = torch.arange(1 << 16, dtype=torch.int32, device=device)
    tables = []
    for places in (PLACES[:2], PLACES[2:]):
        table = torch.zeros_like(half)
        for byte, (sign, magnitude) in enumerate(places):
            code = half >> 8 * byte
            code = (code & 0xF) | (code & 0xF0) << 12  # a byte's elements in the halves of a word
            table |= (code & 0x00080008) << (sign - 3) | (code & 0x00070007) << magnitude
        tables.append(table)
    return tables[0], tables[1]


def drop_elements_of_nan(blocks: Tensor, scales: Tensor, warps: int) -> None:
    """Make elements 0 whose scale is NaN, of packed blocks and scales [..., tiles, words] of the same matrices.

    The kernel takes such a scale for infinity, which times 0 is NaN.
    """
    tiles, words = blocks.shape[-2:]
    quads = words // (ROWS * QUAD * GROUP // 8)
    nan = scales.view(torch.uint8) == 255
    if nan.any():
        # -, tile, pair of steps, warp, row / 2, group, step, row: see pack_scales
        nan = nan.view(-1, tiles, scales.shape[-1] * 4 // (2 * warps * QUAD * ROWS), warps, ROWS // 2, QUAD, 2, 2)
        nan = nan.permute(0, 1, 2, 6, 3, 7, 4, 5).flatten(2, 4)[:, :, :quads]  # -, tile, quad, row, row / 2, group
        blocks.view(-1, tiles, quads, 2, ROWS // 2, QUAD, 4).masked_fill_(nan[..., None], 0)


def pack_scales(scales: Tensor, warps: int) -> Tensor:
    """uint8 [..., rows, K / 32] -> int32 [..., tiles, words of a tile's scales]."""
    *lead, rows, groups = scales.shape
    tile_bytes = 4 * scale_words(groups * GROUP, warps)
    scales = pad(scales, (0, tile_bytes // ROWS - groups, 0, -rows % ROWS))
    tiles = tile_count(rows)
    # -, tile, row / 2, row, pair of steps, step, warp, group
    scales = scales.view(-1, tiles, ROWS // 2, 2, tile_bytes // ROWS // (2 * warps * QUAD), 2, warps, QUAD)
    return scales.permute(0, 1, 4, 6, 2, 7, 5, 3).reshape(*lead, tiles, tile_bytes).view(torch.int32)
