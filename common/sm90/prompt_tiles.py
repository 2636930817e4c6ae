"""Experts' matrices in tiles (see tiles.py), for products with many vectors: see common/gemm_fp4.py.

The even rows of a tile of 16 come before the odd ones, also in a result: see in_rows. In that order each thread decodes
what it holds as an operand of the tensor cores, so that nothing is exchanged between threads, which took 16 barriers a
step. For that the columns of every 128 are permuted, also in the vectors: see column_of.
"""

import triton
import triton.language as tl

from common.gemm_fp4 import PromptLayout, for_words, join8
from common.sm90.tiles import GROUP, QUAD, QUAD_BYTES, block_bytes, place_asm, scale_bytes, tile_count


def _decode_asm() -> str:
    """Return PTX that decodes a packed word ($8) to eight float16 in order, times a scale that $9 holds twice."""
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
    """Return the elements from one vector to the next, whole quads."""
    return -(-k // (QUAD.value * GROUP.value)) * QUAD.value * GROUP.value


@triton.constexpr_function
def matrix_words(rows: int, k: int) -> int:
    """Return the int32 of a matrix's elements."""
    return tile_count(rows) * block_bytes(k) // 4


@triton.constexpr_function
def matrix_scales(rows: int, k: int, warps: int) -> int:
    """Return the int32 of a matrix's scales."""
    return tile_count(rows) * scale_bytes(k, warps) // 4


@triton.jit
def column_of(k):
    """Return the column of a vector's element k.

    Of each 16 columns of the left operand, thread t of four holds 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a row. The 32
    that it holds of 128 are consecutive elements, four packed words.
    """
    return k // 128 * 128 + k // 4 % 8 * 16 + k // 2 % 2 * 8 + k // 32 % 4 * 2 + k % 2


@triton.jit
def in_columns(x, i0):
    """Return elements i0 .. of vectors, x [N, M], in an order of rising columns, and these columns [M].

    i0 is a multiple of M, M of 32. With M below 128 the columns are runs of up to 8, see column_of.
    """
    N: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    i = tl.arange(0, M)
    QUARTERS: tl.constexpr = min(M // 32, 4)
    RUN: tl.constexpr = 2 * QUARTERS
    quarters = tl.reshape(x, (N, M // (32 * QUARTERS), QUARTERS, 16, 2))
    x = tl.reshape(tl.permute(quarters, (0, 1, 3, 2, 4)), (N, M))
    # These are the columns of column_of, written so that the compiler sees the runs and stores them whole.
    first = i0 // 128 * 128 + i0 // (32 * QUARTERS) % (4 // QUARTERS) * RUN
    return x, first + i // RUN * 8 + i % RUN


@triton.jit
def in_rows(acc):
    """Return a result [M, N] in the order of the matrix's rows."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.reshape(tl.permute(tl.reshape(acc, (M // 16, 2, 8, N)), (0, 2, 1, 3)), (M, N))


@triton.jit
def load(matrix, m0, k0, MATRIX: tl.constexpr, TILE: tl.constexpr, PACKED_WARPS: tl.constexpr):
    """Return (int32 words [TILE.m, TILE.k / 8], scales int32 [TILE.m, TILE.k / 32]), rows in the order of warps' loads.

    In each 16 TILE.num_warps rows, which are multiplied together, each warp's first eight come before each warp's
    second eight.
    """
    K: tl.constexpr = MATRIX.k
    NUM_WARPS: tl.constexpr = TILE.num_warps
    BLOCKS: tl.constexpr = block_bytes(K) // 4
    LAST_TILE: tl.constexpr = (MATRIX.rows + 15) // 16 - 1
    i = tl.arange(0, TILE.m)
    warp, half, round_ = i // 8 % NUM_WARPS, i // (8 * NUM_WARPS) % 2, i // (16 * NUM_WARPS)
    tile = tl.minimum(m0 // 16 + round_ * NUM_WARPS + warp, LAST_TILE)
    word = k0 // 8 + tl.arange(0, TILE.k // 8)
    offset = (tile * BLOCKS + (8 * half + i % 8) * 16)[:, None] + (word // 16 * (QUAD_BYTES // 4) + word % 16)[None, :]
    if BLOCKS % (2 * TILE.k) == 0:
        words = tl.load(matrix.ptr + offset)
    else:
        words = tl.load(matrix.ptr + offset, mask=(word // 16 * (QUAD_BYTES // 4) < BLOCKS)[None, :], other=0)
    # A word has a group's scales of an even row and an odd row, in each of two steps.
    SCALES: tl.constexpr = scale_bytes(K, PACKED_WARPS) // 4
    GROUPS: tl.constexpr = TILE.k // GROUP
    group = k0 // GROUP + tl.arange(0, GROUPS)
    quad = group // QUAD
    pair = tl.arange(0, TILE.m // 2)
    tile = tl.minimum(m0 // 16 + pair // 8, LAST_TILE)
    first = quad // (2 * PACKED_WARPS) * (32 * PACKED_WARPS)
    offset = (tile * SCALES + pair % 8 * QUAD)[:, None] + (first + quad % PACKED_WARPS * 32 + group % QUAD)[None, :]
    scales = tl.load(matrix.scales_ptr + offset, mask=(first < SCALES)[None, :], other=0)
    ROUNDS: tl.constexpr = TILE.m // (16 * NUM_WARPS)
    odd = (tl.arange(0, 2) * 8)[None, :, None, None]
    later = (quad // PACKED_WARPS % 2 * 16)[None, None, None, :]
    scales = tl.reshape(scales, (ROUNDS, 1, 8 * NUM_WARPS, GROUPS)) >> (odd + later)
    return words, tl.reshape(scales, (TILE.m, GROUPS)) & 0xFF


@triton.jit
def decode(words, scales, NUM_WARPS: tl.constexpr):
    """Return float16 [M, 8 W] of what `load` returned: rows in the order of places, columns in that of column_of."""
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
    # round, half, warp, row of eight, 128 columns, thread of four, its word, and of that three bits of the element
    w = tl.reshape(join8(e), (M // (16 * NUM_WARPS), 2, NUM_WARPS, 8, W // 16, 4, 4, 2, 2, 2))
    return tl.reshape(tl.permute(w, (0, 2, 1, 3, 4, 6, 7, 8, 5, 9)), (M, 8 * W))


TILES = PromptLayout(vector_stride, matrix_words, matrix_scales, column_of, in_columns, in_rows, load, decode)
