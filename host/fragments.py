"""MXFP4 matrices in the order that common/fp4_fragments.py reads.

A matrix is cut into tiles of 16 rows, a tile into units of 64 columns, 512 bytes that a warp loads at once: 32 lanes of
16 bytes. Byte 8 group + 4 half + i of lane 4 g + t holds column 16 half + 4 t + i of a group of 32, row g in bits 7
(sign) and 3..1, row g + 8 in bits 0 (sign) and 6..4. Rows and columns beyond the matrix are zeros.

A step of all warps takes two units a warp: unit u of warp w in step s is number (2 s + u) * warps + w. Lane 4 g + t of
a warp has the scales of group t of its step (two groups a unit), rows g and g + 8, for two steps: four bytes, the first
step's first.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, UNIT_K, GROUP = 16, 64, 32


def tile_count(rows: int) -> int:
    return -(-rows // ROWS)


def block_words(k: int) -> int:
    """int32 words of a tile's blocks."""
    return -(-k // UNIT_K) * ROWS * UNIT_K // 8


def scale_words(k: int, warps: int) -> int:
    """int32 words of a tile's scales."""
    return -(-k // (4 * warps * UNIT_K)) * 4 * warps * UNIT_K // GROUP * ROWS // 4


def pack_blocks(blocks: Tensor) -> Tensor:
    """uint8 [..., rows, K / 32, 16] as published -> int32 [..., tiles, words of a tile]."""
    *lead, rows, groups, _ = blocks.shape
    tiles = tile_count(rows)
    blocks = pad(blocks, (0, 0, 0, -groups % 2, 0, -rows % ROWS))
    nibbles = torch.stack((blocks & 0xF, blocks >> 4), dim=-1)
    # -, tile, row / 8, row, unit, group, half, t, i
    nibbles = nibbles.view(-1, tiles, 2, 8, (groups + 1) // 2, 2, 2, 4, 4)
    nibbles = nibbles.permute(0, 1, 4, 3, 7, 5, 6, 8, 2)
    low, high = nibbles.unbind(-1)
    return ((low & 8) << 4 | (low & 7) << 1 | high >> 3 | (high & 7) << 4).reshape(*lead, tiles, -1).view(torch.int32)


def pack_scales(scales: Tensor, warps: int) -> Tensor:
    """uint8 [..., rows, K / 32] -> int32 [..., tiles, words of a tile's scales]."""
    *lead, rows, groups = scales.shape
    tile_bytes = 4 * scale_words(groups * GROUP, warps)
    scales = pad(scales, (0, tile_bytes // ROWS - groups, 0, -rows % ROWS))
    tiles = tile_count(rows)
    # -, tile, row / 8, row, pair of steps, step, unit, warp, group
    scales = scales.view(-1, tiles, 2, 8, tile_bytes // ROWS // (8 * warps), 2, 2, warps, 2)
    return scales.permute(0, 1, 4, 7, 3, 6, 8, 5, 2).reshape(*lead, tiles, tile_bytes).view(torch.int32)
