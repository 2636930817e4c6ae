"""Experts' matrices in tiles (see tiles.py), for products with many vectors: see common/gemm_fp4.py.

The even rows of a tile of 16 come before the odd ones, and so they do in a result: see in_rows. In that order each
thread decodes what it holds as an operand of the tensor cores, so that nothing is exchanged between threads, which took
16 barriers a step. For that the columns of every 128 stand in another order, also in the vectors: see column_of.
"""

import triton
import triton.language as tl

from common.gemm_fp4 import PromptLayout, for_words, join8
from common.sm90.tiles import GROUP, QUAD, QUAD_BYTES, block_bytes, place_asm, scale_bytes, tile_count


def _decode_asm() -> str:
    """PTX that makes eight float16 of a packed word ($8), in their order, times a scale that $9 holds twice."""
    lines = [".reg .b32 x;"]
    for place in range(4):
        lines += [
            *place_asm(place, "$8", "x", "x"),
            "mul.rn.f16x2 x, x, $9;",
            f"mov.b32 {{${2 * place}, ${2 * place + 1}}}, x;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


DECODE = tl.constexpr(_decode_asm())


@triton.constexpr_function
def vector_stride(k: int) -> int:
    """Elements from one vector's to the next one's, whole quads."""
    return -(-k // (QUAD.value * GROUP.value)) * QUAD.value * GROUP.value


@triton.constexpr_function
def matrix_words(rows: int, k: int) -> int:
    """int32 of a matrix's elements."""
    return tile_count(rows) * block_bytes(k) // 4


@triton.constexpr_function
def matrix_scales(rows: int, k: int, warps: int) -> int:
    """int32 of a matrix's scales."""
    return tile_count(rows) * scale_bytes(k, warps) // 4


@triton.jit
def column_of(k):
    """Where a vector's element k stands.

    A thread holds elements 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each 16 of a row of the left operand, t being one of
    four. Its share of 128 is 32 that follow each other, four packed words.
    """
    return k // 128 * 128 + k // 4 % 8 * 16 + k // 2 % 2 * 8 + k // 32 % 4 * 2 + k % 2


@triton.jit
def in_columns(x, i0):
    """(x, columns): elements i0 .. of vectors, x [N, M], in an order of rising columns; i0 is a multiple of M, M of 32.

    Of each 128 elements' 32 columns that lie together (see column_of) M may have some: runs of up to 8.
    """
    N: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    at = tl.arange(0, M)
    QUARTERS: tl.constexpr = min(M // 32, 4)
    RUN: tl.constexpr = 2 * QUARTERS
    quarters = tl.reshape(x, (N, M // (32 * QUARTERS), QUARTERS, 16, 2))
    x = tl.reshape(tl.permute(quarters, (0, 1, 3, 2, 4)), (N, M))
    # What column_of gives, written so that the compiler sees the runs and stores them whole.
    first = i0 // 128 * 128 + i0 // (32 * QUARTERS) % (4 // QUARTERS) * RUN
    return x, first + at // RUN * 8 + at % RUN


@triton.jit
def in_rows(acc):
    """A result [M, N] in the order of the matrix's rows."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.reshape(tl.permute(tl.reshape(acc, (M // 16, 2, 8, N)), (0, 2, 1, 3)), (M, N))


@triton.jit
def load(
    blocks_ptr,
    scales_ptr,
    m0,
    k0,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PACKED_WARPS: tl.constexpr,
):
    """(int32 words [BLOCK_M, BLOCK_K / 8], scales int32 [BLOCK_M, BLOCK_K / 32]), rows in the order of warps' loads.

    Of eight after eight rows: each warp's first eight, then each warp's second eight, of the 16 NUM_WARPS that are
    multiplied together.
    """
    TILE: tl.constexpr = block_bytes(K) // 4
    LAST: tl.constexpr = (ROWS + 15) // 16 - 1  # of the tiles
    i = tl.arange(0, BLOCK_M)
    warp, half, turn = i // 8 % NUM_WARPS, i // (8 * NUM_WARPS) % 2, i // (16 * NUM_WARPS)
    tile = tl.minimum(m0 // 16 + turn * NUM_WARPS + warp, LAST)
    word = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    at = (tile * TILE + (8 * half + i % 8) * 16)[:, None] + (word // 16 * (QUAD_BYTES // 4) + word % 16)[None, :]
    if TILE % (2 * BLOCK_K) == 0:
        words = tl.load(blocks_ptr + at)
    else:
        words = tl.load(blocks_ptr + at, mask=(word // 16 * (QUAD_BYTES // 4) < TILE)[None, :], other=0)
    # A word has the scales of a group, of an even and an odd row and of two steps.
    SCALES: tl.constexpr = scale_bytes(K, PACKED_WARPS) // 4
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    group = k0 // GROUP + tl.arange(0, GROUPS)
    quad = group // QUAD
    pair = tl.arange(0, BLOCK_M // 2)
    tile = tl.minimum(m0 // 16 + pair // 8, LAST)
    first = quad // (2 * PACKED_WARPS) * (32 * PACKED_WARPS)
    at = (tile * SCALES + pair % 8 * QUAD)[:, None] + (first + quad % PACKED_WARPS * 32 + group % QUAD)[None, :]
    scales = tl.load(scales_ptr + at, mask=(first < SCALES)[None, :], other=0)
    TURNS: tl.constexpr = BLOCK_M // (16 * NUM_WARPS)
    odd = (tl.arange(0, 2) * 8)[None, :, None, None]
    later = (quad // PACKED_WARPS % 2 * 16)[None, None, None, :]
    scales = tl.reshape(scales, (TURNS, 1, 8 * NUM_WARPS, GROUPS)) >> (odd + later)
    return words, tl.reshape(scales, (BLOCK_M, GROUPS)) & 0xFF


@triton.jit
def decode(words, scales, NUM_WARPS: tl.constexpr):
    """float16 [M, 8 W] of what `load` gave: rows in the order of places, columns in that of column_of."""
    M: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    e = tl.inline_asm_elementwise(
        DECODE,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [words, for_words(scales)],
        dtype=(
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
        ),
        is_pure=True,
        pack=1,
    )
    # turn, half, warp, row of eight, 128 columns, thread of four, its word, and of that three bits of the element
    w = tl.reshape(join8(e), (M // (16 * NUM_WARPS), 2, NUM_WARPS, 8, W // 16, 4, 4, 2, 2, 2))
    return tl.reshape(tl.permute(w, (0, 2, 1, 3, 4, 6, 7, 8, 5, 9)), (M, 8 * W))


TILES = PromptLayout(vector_stride, matrix_words, matrix_scales, column_of, in_columns, in_rows, load, decode)
