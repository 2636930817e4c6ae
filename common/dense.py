"""Where the dense matrices of a layer stand."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.gemv_dense import matrix_at, scales_of


class Stack(NamedTuple):
    """A layer's matrix in a stack of them."""

    ptr: Any
    scales_ptr: Any


@triton.jit
def stack_at(ptr, scales_ptr, layer, MATRIX: tl.constexpr):
    """A layer's matrix, given the stack's first."""
    FORMAT: tl.constexpr = MATRIX.format
    ptr = matrix_at(ptr, layer, MATRIX.rows, MATRIX.k, FORMAT)
    return Stack(ptr, scales_of(scales_ptr, layer, MATRIX.rows, MATRIX.k, FORMAT))


@triton.jit
def qkv_stack(ctx, layer, BUILD: tl.constexpr):
    """A layer's W_qkv."""
    MATRIX: tl.constexpr = BUILD.qkv
    return stack_at(ctx.w.qkv, ctx.w.qkv_scales, layer, MATRIX)


@triton.jit
def o_stack(ctx, layer, BUILD: tl.constexpr):
    """A layer's W_o."""
    MATRIX: tl.constexpr = BUILD.o
    return stack_at(ctx.w.o, ctx.w.o_scales, layer, MATRIX)


@triton.jit
def router_stack(ctx, layer, BUILD: tl.constexpr):
    """A layer's router."""
    MATRIX: tl.constexpr = BUILD.router
    return stack_at(ctx.w.router, ctx.w.router_scales, layer, MATRIX)


@triton.jit
def lm_head_stack(ctx, BUILD: tl.constexpr):
    """The LM head."""
    return Stack(ctx.w.lm_head, ctx.w.lm_head_scales)
