"""Products of one vector with experts' matrices whose packed tiles come through the ring.

tiles.py says how tiles are packed, tile_product.py how they are multiplied.
"""

import triton
import triton.language as tl

from common.quant import round_to_mxfp8
from common.rmsnorm import largest_magnitude
from common.sm90.feed import describe, release, take
from common.sm90.sums import collect_tiles, leave_tile
from common.sm90.tile_product import (
    as_words,
    load_tile_vector,
    multiply_tile,
    split_scale,
    store_vector,
    tile_vector_prescale,
    tile_vector_size,
)
from common.sm90.tiles import block_bytes


@triton.jit
def store_input(s, block, normed, x, factor, BUILD: tl.constexpr):
    """Store a block of the experts' input, normed, in State s.

    x * factor is all of the input, whose largest element sets the prescale.
    """
    NORM: tl.constexpr = BUILD.tuning.experts.norm_block
    h = block * NORM + tl.arange(0, NORM)
    prescale, scale = tile_vector_prescale(largest_magnitude(x) * factor)
    if BUILD.quant:
        normed = round_to_mxfp8(normed)
    store_vector(s.expert_in, h, h < BUILD.config.hidden_size, normed, prescale)
    if block == 0:  # the same for all
        tl.store(s.expert_in_scale, scale)


@triton.jit
def load_input(ctx, BUILD: tl.constexpr):
    """Return (the experts' input as the right operand of tensor cores, the factor that products with it lack)."""
    scale, factor = split_scale(tl.load(ctx.s.expert_in_scale))
    vector = load_tile_vector(as_words(ctx.s.expert_in), scale, BUILD.config.hidden_size, BUILD.tuning.num_warps)
    return vector, factor


@triton.jit
def store_act(ctx, rank, i, act, BUILD: tl.constexpr):
    """Store activations i, float32 [n], of the experts of ranks `rank` [n]; ranks beyond the chosen are left out.

    If they are rounded to MXFP8 they come in whole groups.
    """
    K: tl.constexpr = BUILD.config.intermediate_size
    SIZE: tl.constexpr = tile_vector_size(K)
    if BUILD.quant:
        act = round_to_mxfp8(act)
    prescale, _ = tile_vector_prescale(tl.full([], BUILD.config.swiglu_bound, tl.float32))
    inside = (i < K) & (rank < BUILD.config.experts_per_token)
    store_vector(ctx.s.expert_act + rank * SIZE, i, inside, act, prescale)


@triton.jit
def load_act(ctx, rank, BUILD: tl.constexpr):
    """Return an expert's activations as the right operand of tensor cores."""
    K: tl.constexpr = BUILD.config.intermediate_size
    _, scale = tile_vector_prescale(tl.full([], BUILD.config.swiglu_bound, tl.float32))
    WORDS: tl.constexpr = tile_vector_size(K) // 2
    return load_tile_vector(as_words(ctx.s.expert_act) + rank * WORDS, scale, K, BUILD.tuning.num_warps)


@triton.jit
def multiply(ctx, layer, feed, choice, vector, tiles, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return (even rows, odd rows, the feed) of the next tiles.count tiles of the feed, times a vector."""
    TILES: tl.constexpr = BUILD.tuning.experts.step_tiles
    WARPS: tl.constexpr = BUILD.tuning.num_warps
    BLOCKS: tl.constexpr = block_bytes(MATRIX.k)
    feed = describe(ctx, choice.experts, feed, BUILD)
    for i in range(tiles.count):
        address, feed = take(feed, BUILD)
        even, odd = multiply_tile(address, address + BLOCKS, vector, WARPS)
        feed = release(feed, BUILD)
        leave_tile(feed.scratch, i, even, odd, TILES, WARPS)
    even, odd = collect_tiles(feed.scratch, TILES, WARPS)
    return even, odd, feed
