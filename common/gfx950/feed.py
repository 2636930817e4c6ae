"""Dense tiles loaded into registers one ahead: the first of a phase before its barrier, each next one before a product.

Experts' matrices are loaded by their products, which pipeline their own blocks over K.
"""

import triton
import triton.language as tl

from common.dense import lm_head_stack, o_stack, qkv_stack
from common.gemv_dense import gemv_rows
from common.rows import load_tile
from common.work import share_rows


@triton.jit
def load_first_tile(ctx, stack, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """The first tile of this program's rows."""
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    return load_tile(stack, first, end, MATRIX, BUILD)


@triton.jit
def ask_qkv(ctx, layer, feed, BUILD: tl.constexpr):
    """A layer's first QKV tile."""
    MATRIX: tl.constexpr = BUILD.qkv
    return load_first_tile(ctx, qkv_stack(ctx, layer, BUILD), MATRIX, BUILD)


@triton.jit
def ask_o(ctx, layer, feed, BUILD: tl.constexpr):
    """A layer's first O tile."""
    MATRIX: tl.constexpr = BUILD.o
    return load_first_tile(ctx, o_stack(ctx, layer, BUILD), MATRIX, BUILD)


@triton.jit
def ask_head(ctx, feed, BUILD: tl.constexpr):
    """The first tile of the LM head."""
    MATRIX: tl.constexpr = BUILD.lm_head
    return load_first_tile(ctx, lm_head_stack(ctx, BUILD), MATRIX, BUILD)


@triton.jit
def open_feed(ctx, BUILD: tl.constexpr):
    """The first layer's first QKV tile."""
    return ask_qkv(ctx, tl.cast(0, tl.int64), (), BUILD)


@triton.jit
def open_phase(ctx, layer, MATRIX: tl.constexpr, choice, BUILD: tl.constexpr):
    """A matrix's first tile, if the matrix is dense; the LM head's is asked for by its phase."""
    if MATRIX.name == "qkv":
        return ask_qkv(ctx, layer, (), BUILD)
    elif MATRIX.name == "o":
        return ask_o(ctx, layer, (), BUILD)
    else:
        return ()


@triton.jit
def multiply(ctx, feed, x, stack, row0, end_row, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """(the rows of the tile that was loaded ahead times x, the tile behind it)."""
    MACHINE: tl.constexpr = BUILD.machine
    following = load_tile(stack, row0 + MATRIX.tile_rows, end_row, MATRIX, BUILD)
    return gemv_rows(feed, x, MATRIX, MACHINE), following
