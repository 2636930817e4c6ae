"""Dense tiles loaded into registers one ahead: the first of a phase before its barrier, each next one before a product.

The products of experts load their matrices themselves, and pipeline their own k-blocks.
"""

import triton
import triton.language as tl

from common.dense import lm_head_matrix, o_matrix, qkv_matrix
from common.gemv_dense import gemv_rows
from common.rows import load_tile
from common.work import share_rows


@triton.jit
def load_first_tile(ctx, matrix, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Load the first tile of this program's rows of an Operand."""
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    return load_tile(matrix, first, end, MATRIX, BUILD)


@triton.jit
def ask_qkv(ctx, layer, feed, BUILD: tl.constexpr):
    """Load this program's first QKV tile of a layer."""
    MATRIX: tl.constexpr = BUILD.qkv
    return load_first_tile(ctx, qkv_matrix(ctx, layer, BUILD), MATRIX, BUILD)


@triton.jit
def ask_o(ctx, layer, feed, BUILD: tl.constexpr):
    """Load this program's first O tile of a layer."""
    MATRIX: tl.constexpr = BUILD.o
    return load_first_tile(ctx, o_matrix(ctx, layer, BUILD), MATRIX, BUILD)


@triton.jit
def ask_head(ctx, feed, BUILD: tl.constexpr):
    """Load this program's first tile of the LM head."""
    MATRIX: tl.constexpr = BUILD.lm_head
    return load_first_tile(ctx, lm_head_matrix(ctx, BUILD), MATRIX, BUILD)


@triton.jit
def open_feed(ctx, BUILD: tl.constexpr):
    """Load this program's first QKV tile of the first layer."""
    return ask_qkv(ctx, tl.cast(0, tl.int64), (), BUILD)


@triton.jit
def open_phase(ctx, layer, MATRIX: tl.constexpr, choice, BUILD: tl.constexpr):
    """Load this program's first tile of a layer's QKV or O; the other matrices' phases load their tiles themselves."""
    if MATRIX.name == "qkv":
        return ask_qkv(ctx, layer, (), BUILD)
    elif MATRIX.name == "o":
        return ask_o(ctx, layer, (), BUILD)
    else:
        return ()


@triton.jit
def multiply(ctx, feed, x, matrix, row0, end_row, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return (the rows of the tile that was loaded ahead times x, the tile behind it)."""
    MACHINE: tl.constexpr = BUILD.machine
    following = load_tile(matrix, row0 + MATRIX.tile_rows, end_row, MATRIX, BUILD)
    return gemv_rows(feed, x, MATRIX, MACHINE), following
