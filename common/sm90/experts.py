"""Products of experts' matrices whose packed tiles come through the ring, see tiles.py and tile_product.py."""

import triton
import triton.language as tl

from common.quant import round_to_mxfp8
from common.rmsnorm import largest_magnitude
from common.sm90.feed import describe, release, take
from common.sm90.sums import collect_tiles, leave_tile
from common.sm90.tile_product import (
    as_words,
    load_vector,
    multiply_tile,
    split_scale,
    store_vector,
    vector_parts,
    vector_unit,
)
from common.sm90.tiles import block_bytes


@triton.jit
def store_input(ctx, block, normed, x, factor, BUILD: tl.constexpr):
    """Store a block of the experts' input, normed; x * factor is all of it, whose largest element gives its unit."""
    NORM: tl.constexpr = BUILD.tuning.experts.norm_block
    h = block * NORM + tl.arange(0, NORM)
    unit, scale = vector_unit(largest_magnitude(x) * factor)
    if BUILD.quant:
        normed = round_to_mxfp8(normed)
    store_vector(ctx.s.expert_in, h, h < BUILD.config.hidden_size, normed, unit)
    if block == 0:  # the same for all
        tl.store(ctx.s.expert_in_scale, scale)


@triton.jit
def load_input(ctx, BUILD: tl.constexpr):
    """(the experts' input, as the right operand of tensor cores; what products with it lack)."""
    scale, missing = split_scale(tl.load(ctx.s.expert_in_scale))
    return load_vector(as_words(ctx.s.expert_in), scale, BUILD.config.hidden_size, BUILD.tuning.num_warps), missing


@triton.jit
def store_act(ctx, rank, i, act, BUILD: tl.constexpr):
    """Store activations i, float32 [n], of the experts of ranks `rank` [n]; nothing beyond the experts.

    Where they are rounded to MXFP8 they come in whole groups.
    """
    K: tl.constexpr = BUILD.config.intermediate_size
    PARTS: tl.constexpr = vector_parts(K)
    if BUILD.quant:
        act = round_to_mxfp8(act)
    unit, _ = vector_unit(tl.full([], BUILD.config.swiglu_bound, tl.float32))
    inside = (i < K) & (rank < BUILD.config.experts_per_token)
    store_vector(ctx.s.expert_act + rank * PARTS, i, inside, act, unit)


@triton.jit
def load_act(ctx, rank, BUILD: tl.constexpr):
    """An expert's activations, as the right operand of tensor cores."""
    K: tl.constexpr = BUILD.config.intermediate_size
    _, scale = vector_unit(tl.full([], BUILD.config.swiglu_bound, tl.float32))
    WORDS: tl.constexpr = vector_parts(K) // 2
    return load_vector(as_words(ctx.s.expert_act) + rank * WORDS, scale, K, BUILD.tuning.num_warps)


@triton.jit
def multiply(ctx, layer, feed, choice, vector, tiles, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """(even rows, odd rows, the feed): the next tiles.count tiles that the feed brings, times a vector."""
    TILES: tl.constexpr = BUILD.tuning.experts.step_tiles
    WARPS: tl.constexpr = BUILD.tuning.num_warps
    BLOCKS: tl.constexpr = block_bytes(MATRIX.k)
    feed = describe(ctx, choice.experts, feed, BUILD)
    for i in range(tiles.count):
        at, feed = take(feed, BUILD)
        even, odd = multiply_tile(at, at + BLOCKS, vector, WARPS)
        feed = release(feed, BUILD)
        leave_tile(feed.scratch, i, even, odd, TILES, WARPS)
    even, odd = collect_tiles(feed.scratch, TILES, WARPS)
    return even, odd, feed
