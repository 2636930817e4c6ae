"""Where the dense matrices of a layer lie in device memory."""

import triton
import triton.language as tl

from common.build import Operand
from common.gemv_dense import matrix_at, scales_at


@triton.jit
def layer_matrix(ptr, scales_ptr, layer, MATRIX: tl.constexpr):
    """Return the Operand of a layer's matrix, given pointers to those of all layers."""
    FORMAT: tl.constexpr = MATRIX.format
    ptr = matrix_at(ptr, layer, MATRIX.rows, MATRIX.k, FORMAT)
    return Operand(ptr, scales_at(scales_ptr, layer, MATRIX.rows, MATRIX.k, FORMAT))


@triton.jit
def qkv_matrix(ctx, layer, BUILD: tl.constexpr):
    """Return the Operand of a layer's W_qkv."""
    MATRIX: tl.constexpr = BUILD.qkv
    return layer_matrix(ctx.w.qkv, ctx.w.qkv_scales, layer, MATRIX)


@triton.jit
def o_matrix(ctx, layer, BUILD: tl.constexpr):
    """Return the Operand of a layer's W_o."""
    MATRIX: tl.constexpr = BUILD.o
    return layer_matrix(ctx.w.o, ctx.w.o_scales, layer, MATRIX)


@triton.jit
def router_matrix(ctx, layer, BUILD: tl.constexpr):
    """Return the Operand of a layer's router."""
    MATRIX: tl.constexpr = BUILD.router
    return layer_matrix(ctx.w.router, ctx.w.router_scales, layer, MATRIX)


@triton.jit
def lm_head_matrix(ctx, BUILD: tl.constexpr):
    """Return the Operand of the LM head."""
    return Operand(ctx.w.lm_head, ctx.w.lm_head_scales)
