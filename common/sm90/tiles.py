"""The layout of an expert's MXFP4 matrix on sm_90: tiles of 16 rows, in the order in which tensor cores take them.

The instruction is mma.m16n8k16, whose left operand gives each thread of a warp two rows and, of every 16 columns, four.
A matrix [rows, k] is cut into tiles of 16 rows, a tile into quads of 4 scale groups of 32 columns:

             columns   0 .. 127    128 .. 255   ...
    rows  0 .. 15     | quad 0    | quad 1     | ...    tile 0
    rows 16 .. 31     | quad 0    | quad 1     | ...    tile 1

A quad is 1,024 bytes. Thread 4 r + t of a warp, r < 8 and t < 4, reads 16 of them from either half:

    | row 0, group 0 | row 0, group 1 | ... | row 2, group 0 | ... | row 14, group 3 |    even rows: 16 (4 r + t)
    | row 1, group 0 | row 1, group 1 | ... | row 3, group 0 | ... | row 15, group 3 |    odd rows: 512 + 16 (4 r + t)

so that it has the 32 elements of group t of rows 2 r and 2 r + 1. They are four int32 words of eight elements each,
with elements 2 j and 2 j + 1 at the j-th of four places in the lower and the upper 16 bits. s is an element's sign, m
its magnitude, the digit its j:

    bit  15 14 13 12 | 11 10  9 |  8  7  6 |  5  4  3 |  2  1  0
         s0 s2 s3 s1 | m0 m0 m0 | m1 m1 m1 | m2 m2 m2 | m3 m3 m3

Bits 15 and 11 .. 9 alone, as a float16, are element 0 times 2^-14, subnormals included; one mask and one
multiplication move each of the others to these bits.

In a step each warp of a program takes a quad: warp w takes quad step * warps + w. Thread 4 r + t has one int32 of
scales for two steps, which holds group t's E8M0 bytes:

    byte 0: row 2 r, first step | 1: row 2 r + 1, first step | 2: row 2 r, second step | 3: row 2 r + 1, second step

Rows and columns beyond the matrix are zeros.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

TILE_ROWS = tl.constexpr(16)
PAIRS = tl.constexpr(8)  # of an even and an odd row, which one thread takes, in a tile
QUAD = tl.constexpr(4)  # scale groups that a warp multiplies at a time
QUAD_BYTES = tl.constexpr(1024)
GROUP = tl.constexpr(32)  # elements that share a scale
UNPLACED = tl.constexpr(2.0**14)  # undoes the 2^-14
PLACES = ((15, 9), (12, 6), (14, 3), (13, 0))  # (bit of the sign, lowest bit of the magnitude) of element j


def _mask_and_factor(sign: int, magnitude: int) -> tuple[int, int]:
    """Return (int32 mask of a place in both halves, factor that moves it to the first place).

    The factor moves sign and magnitude at once, and on another pipe than the masks, which limit the loop over tiles.
    """
    mask = ((1 << sign) | (7 << magnitude)) * 0x10001
    shifts = {PLACES[0][0] - sign, PLACES[0][1] - magnitude}
    return mask - (mask >> 31 << 32), sum(1 << shift for shift in shifts)


MASKS = tl.constexpr(tuple(_mask_and_factor(*place)[0] for place in PLACES))
FACTORS = tl.constexpr(tuple(_mask_and_factor(*place)[1] for place in PLACES))


@triton.constexpr_function
def tile_count(rows: int) -> int:
    """Return the number of tiles of a matrix."""
    return -(-rows // TILE_ROWS.value)


@triton.constexpr_function
def block_bytes(k: int) -> int:
    """Return the bytes of a tile's elements."""
    return -(-k // (QUAD.value * GROUP.value)) * QUAD_BYTES.value


@triton.constexpr_function
def scale_bytes(k: int, warps: int) -> int:
    """Return the bytes of a tile's scales."""
    return -(-k // (2 * warps * QUAD.value * GROUP.value)) * 2 * warps * QUAD.value * TILE_ROWS.value


@triton.constexpr_function
def stage_bytes(k: int, warps: int) -> int:
    """Return the bytes of shared memory that a tile needs: its bytes, and what the last warps read behind them."""
    read = -(-k // (warps * QUAD.value * GROUP.value)) * warps * QUAD_BYTES.value
    return max(block_bytes(k) + scale_bytes(k, warps), read)


def place_asm(place: int, source: str, scratch: str, result: str) -> list[str]:
    """Return PTX that extracts the two float16 at a place of word `source`, times 2^-14; `scratch` is a register."""
    mask, factor = MASKS.value[place], FACTORS.value[place]
    lines = []
    if factor & (factor - 1):  # a shift alone needs no mask before it
        lines.append(f"and.b32 {scratch}, {source}, {mask};")
        source = scratch
    if factor > 1:
        lines.append(f"mul.lo.u32 {scratch}, {source}, {factor};")
        source = scratch
    return [*lines, f"and.b32 {result}, {source}, {MASKS.value[0]};"]


def pack_blocks(blocks: Tensor) -> Tensor:
    """Pack elements uint8 [..., rows, K / 32, 16], as published, into int32 [..., tiles, words of a tile]."""
    *lead, rows, groups, _ = blocks.shape
    tiles = tile_count(rows)
    blocks = pad(blocks, (0, 0, 0, -groups % QUAD.value, 0, -rows % TILE_ROWS.value))
    # -, tile, row / 2, row, quad, group, word
    words = blocks.view(torch.int32).view(-1, tiles, PAIRS.value, 2, blocks.shape[-2] // QUAD.value, QUAD.value, 4)
    words = words.permute(0, 1, 4, 3, 2, 5, 6).reshape(*lead, tiles, -1)
    lower, upper = _half_words(blocks.device)
    return lower[words & 0xFFFF] | upper[words >> 16 & 0xFFFF]


@functools.cache
def _half_words(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tables int32 [65536] from each half of a published word to its bits in a packed one: elements 0-3, 4-7.

    Looking halves up takes some 7 operations on a GPU, moving their bits some 30, for which loading would wait.
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
    """Zero the elements whose scale is NaN, in packed blocks and scales [..., tiles, words] of the same matrices.

    The kernel takes such a scale for infinity, and infinity times 0 is NaN.
    """
    tiles, words = blocks.shape[-2:]
    quads = words * 4 // QUAD_BYTES.value
    nan = scales.view(torch.uint8) == 255
    if nan.any():
        steps = scales.shape[-1] * 4 // (2 * warps * QUAD.value * TILE_ROWS.value)
        # -, tile, pair of steps, warp, row / 2, group, step, row: see pack_scales
        nan = nan.view(-1, tiles, steps, warps, PAIRS.value, QUAD.value, 2, 2)
        nan = nan.permute(0, 1, 2, 6, 3, 7, 4, 5).flatten(2, 4)[:, :, :quads]  # -, tile, quad, row, row / 2, group
        blocks.view(-1, tiles, quads, 2, PAIRS.value, QUAD.value, 4).masked_fill_(nan[..., None], 0)


def pack_scales(scales: Tensor, warps: int) -> Tensor:
    """Pack scales uint8 [..., rows, K / 32] into int32 [..., tiles, words of a tile's scales] for `warps` warps."""
    *lead, rows, groups = scales.shape
    tile_bytes = scale_bytes(groups * GROUP.value, warps)
    row_bytes = tile_bytes // TILE_ROWS.value
    scales = pad(scales, (0, row_bytes - groups, 0, -rows % TILE_ROWS.value))
    tiles = tile_count(rows)
    # -, tile, row / 2, row, pair of steps, step, warp, group
    scales = scales.view(-1, tiles, PAIRS.value, 2, row_bytes // (2 * warps * QUAD.value), 2, warps, QUAD.value)
    return scales.permute(0, 1, 4, 6, 2, 7, 5, 3).reshape(*lead, tiles, tile_bytes).view(torch.int32)
