"""The order in which a program's weights pass through its ring: its tiles of QKV, O, gate-up and down, layer by layer.

A program has as many tiles of one layer as of any other; those of the LM head follow the last. The tiles of a layer's
experts are known when its router has spoken, so no more are asked for than a limit:

    | QKV O gate-up down | QKV O gate-up down | ... | LM head |
                 taken ^    asked ^   known ^   limit ^

Tiles are described in shared memory before they are asked for: where their bytes lie, and how many those are.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.experts import element, no_choice
from common.gemv_dense import item_bytes, row_scale_bytes
from common.sm90.gemv import elements_each, row_threads
from common.sm90.ring import (
    DESCRIPTION_BYTES,
    behind_stages,
    describe_tile,
    fill_stage,
    open_ring,
    wait_for_stage,
)
from common.sm90.spread import spread_words
from common.sm90.sums import sum_words
from common.sm90.tiles import block_bytes, scale_bytes
from common.work import gate_up_tile

KNOWN_TILES = tl.constexpr(64)  # that a program keeps descriptions of; one of 132 has 38 or 39 a layer of 120b
LEAST_TILES = tl.constexpr(32)  # a step's tiles and a ring's stages: what is asked for between two calls of describe


class RingFeed(NamedTuple):
    """Where a program is in the order of its tiles."""

    ring: Any  # address, see ring.py
    scratch: Any  # address of memory for sums.py and spread.py, behind which tiles are described
    first: Any  # place of tile number 0 in the program's order
    limit: Any  # tiles that may be described
    known: Any  # tiles that are described
    asked: Any  # tiles asked for
    taken: Any  # tiles taken


@triton.jit
def counted(feed, known, asked, taken):
    """The feed, so many tiles further."""
    return RingFeed(feed.ring, feed.scratch, feed.first, feed.limit, known, asked, taken)


@triton.jit
def limited(feed, limit):
    """The feed with another limit."""
    return RingFeed(feed.ring, feed.scratch, feed.first, limit, feed.known, feed.asked, feed.taken)


@triton.constexpr_function
def scratch_words(build) -> int:
    """float32 of a program's memory for what its threads exchange: sums of rows, or of a vector a piece."""

    def vector(matrix) -> int:
        run = row_threads(matrix.k, matrix.format, build.tuning.dense) * elements_each(matrix.format)
        return spread_words(run, 32 * build.tuning.num_warps)

    return max(sum_words(build.tuning), vector(build.qkv), vector(build.lm_head))


@triton.constexpr_function
def memory_bytes(build) -> int:
    """Shared memory behind the ring: for that, and for the descriptions of tiles."""
    return 4 * scratch_words(build) + KNOWN_TILES.value * DESCRIPTION_BYTES.value


@triton.jit
def counts_of_layer(work):
    """A program's tiles of each matrix of a layer, in the order of Build.layer_matrices."""
    return work.qkv.count, work.o.count, work.gate_up_count, work.down.count


@triton.jit
def tiles_of_layer(work):
    """A program's tiles of one layer."""
    return work.qkv.count + work.o.count + work.gate_up_count + work.down.count


@triton.jit
def tiles_before_experts(ctx, layer):
    """A program's tiles that are known before the router of a layer has spoken; of layer n_layers, the LM head's."""
    work = ctx.work
    dense = work.qkv.count + work.o.count
    each = dense + work.gate_up_count + work.down.count
    return layer * each + tl.where(layer < ctx.n_layers, dense, work.lm_head.count * ctx.want_head)


@triton.jit
def open_at(ctx, layer, place, limit, BUILD: tl.constexpr):
    """A feed whose first tile is the one at `place` of a layer, and of which nothing is known yet."""
    RING: tl.constexpr = BUILD.tuning.ring
    ring = open_ring(RING.stages, RING.stage_bytes, memory_bytes(BUILD))
    scratch = behind_stages(ring, RING.stages, RING.stage_bytes)
    zero = tl.cast(0, tl.int32)
    first = tl.cast(layer * tiles_of_layer(ctx.work) + place, tl.int32)
    return RingFeed(ring, scratch, first, limit, zero, zero, zero)


@triton.jit
def open_feed(ctx, BUILD: tl.constexpr):
    """A feed at the token's first tile, with as many under way as the prefetch distance."""
    return ask_known(ctx, no_choice().experts, open_at(ctx, 0, 0, tiles_before_experts(ctx, 0), BUILD), BUILD)


@triton.jit
def open_phase(ctx, layer, MATRIX: tl.constexpr, choice, BUILD: tl.constexpr):
    """A feed of one matrix of one layer alone; experts' tiles are asked for by the phase that knows them."""
    work = ctx.work
    place, count = 0, work.qkv.count
    if MATRIX.name == "o":
        place, count = work.qkv.count, work.o.count
    if MATRIX.name == "gate_up":
        place, count = work.qkv.count + work.o.count, work.gate_up_count
    if MATRIX.name == "down":
        place, count = work.qkv.count + work.o.count + work.gate_up_count, work.down.count
    if MATRIX.name == "lm_head":
        layer, count = ctx.n_layers, work.lm_head.count
    feed = open_at(ctx, layer, place, count, BUILD)
    if MATRIX.name == "gate_up":
        return feed
    else:
        return ask_known(ctx, choice.experts, feed, BUILD)


@triton.jit
def extend(ctx, layer, feed):
    """The feed with all tiles as its limit that are known before the router of `layer` has spoken."""
    return limited(feed, tiles_before_experts(ctx, layer))


@triton.jit
def ask_experts(ctx, choice, feed, BUILD: tl.constexpr):
    """Ask for tiles of the chosen experts."""
    return ask_known(ctx, choice.experts, feed, BUILD)


@triton.jit
def fill_ring(ctx, layer, feed, BUILD: tl.constexpr):
    """Ask for what the whole ring holds, of what is described. For O: most programs wait for attention."""
    STAGES: tl.constexpr = BUILD.tuning.ring.stages
    return fill(feed, STAGES, BUILD)


@triton.jit
def keep(ctx, layer, feed, BUILD: tl.constexpr):
    """The feed, to which there is nothing to add."""
    return feed


@triton.jit
def keep_for_head(ctx, feed, BUILD: tl.constexpr):
    """The feed, to which there is nothing to add."""
    return feed


@triton.jit
def ask_known(ctx, experts, feed, BUILD: tl.constexpr):
    """Describe the next tiles and ask for as many as the prefetch distance."""
    DISTANCE: tl.constexpr = BUILD.tuning.ring.prefetch_distance
    return fill(describe(ctx, experts, feed, BUILD), DISTANCE, BUILD)


@triton.jit
def fill(feed, DISTANCE: tl.constexpr, BUILD: tl.constexpr):
    """Ask for tiles that are known until so many are under way or wait to be taken."""
    for _ in range(DISTANCE):
        feed = ask(feed, DISTANCE, BUILD)
    return feed


@triton.jit
def ask(feed, DISTANCE: tl.constexpr, BUILD: tl.constexpr):
    """Ask for the next tile, if it is known and fewer than DISTANCE are under way or wait to be taken."""
    RING: tl.constexpr = BUILD.tuning.ring
    asked = feed.asked
    if (asked < feed.known) & (asked - feed.taken < DISTANCE):
        fill_stage(feed.ring, asked, description_at(feed, asked, BUILD), RING.stages, RING.stage_bytes)
        asked += 1
    return counted(feed, feed.known, asked, feed.taken)


@triton.jit
def take(feed, BUILD: tl.constexpr):
    """(address of the next tile, the feed), when its bytes have arrived."""
    RING: tl.constexpr = BUILD.tuning.ring
    at = wait_for_stage(feed.ring, feed.taken, RING.stages, RING.stage_bytes)
    return at, counted(feed, feed.known, feed.asked, feed.taken + 1)


@triton.jit
def release(feed, BUILD: tl.constexpr):
    """Give back the stage of what was taken last, for the next tile that is known."""
    DISTANCE: tl.constexpr = BUILD.tuning.ring.prefetch_distance
    tl.debug_barrier()  # all threads have read it
    return ask(feed, DISTANCE, BUILD)


@triton.jit
def description_at(feed, n, BUILD: tl.constexpr):
    """Where tile n is described, a number or a tensor."""
    SCRATCH_BYTES: tl.constexpr = 4 * scratch_words(BUILD)
    return feed.scratch + SCRATCH_BYTES + n % KNOWN_TILES * DESCRIPTION_BYTES


@triton.jit
def describe(ctx, experts, feed, BUILD: tl.constexpr):
    """Describe the next tiles, unless enough for LEAST_TILES more requests are described.

    All at once, a thread each: working them out one by one where they were asked for was 28% of the instructions of a
    tile of experts.
    """
    known = feed.known
    if (known < feed.limit) & (known - feed.asked < LEAST_TILES):
        tl.debug_barrier()  # whoever asks has read what was there
        n = feed.asked + tl.arange(0, KNOWN_TILES)
        known = tl.minimum(feed.asked + KNOWN_TILES, feed.limit)
        at, n_bytes, more, more_bytes = locate(ctx, feed.first + n, experts, BUILD)
        describe_tile(description_at(feed, n, BUILD), at, n_bytes, more, more_bytes, n < known)
        tl.debug_barrier()
    return counted(feed, known, feed.asked, feed.taken)


@triton.jit
def locate(ctx, number, experts, BUILD: tl.constexpr):
    """(address, bytes) of both pieces, int64, of a program's tiles `number`; the second piece may have 0 bytes."""
    each = tiles_of_layer(ctx.work)
    of_layers = ctx.n_layers * each
    # A program may have tiles of the LM head alone.
    layer = tl.where(number < of_layers, number // tl.maximum(each, 1), 0).to(tl.int64)
    place = tl.where(number < of_layers, number % tl.maximum(each, 1), 0)
    counts = counts_of_layer(ctx.work)
    for i in tl.static_range(len(counts)):
        found = layer_tile(ctx, i, layer, place, experts, BUILD)
        if i == 0:
            tile = found
        else:
            tile = tile_if(place < 0, tile, found)
        place -= counts[i]
    tile_of_head = ctx.work.lm_head.first + number - of_layers
    LM_HEAD: tl.constexpr = BUILD.lm_head
    head = dense_tile(ctx.w.lm_head, ctx.w.lm_head_scales, 0 * layer, tile_of_head, LM_HEAD)
    return tile_if(number < of_layers, tile, head)


@triton.jit
def layer_tile(ctx, NUMBER: tl.constexpr, layer, place, experts, BUILD: tl.constexpr):
    """(address, bytes) of both pieces of a program's tile number `place` of matrix NUMBER of a layer."""
    MATRIX: tl.constexpr = BUILD.layer_matrices[NUMBER]
    w, work = ctx.w, ctx.work
    if MATRIX.name == "qkv":
        return dense_tile(w.qkv, w.qkv_scales, layer, work.qkv.first + place, MATRIX)
    elif MATRIX.name == "o":
        return dense_tile(w.o, w.o_scales, layer, work.o.first + place, MATRIX)
    elif MATRIX.name == "gate_up":
        tile = gate_up_tile(tl.maximum(place, 0), ctx.program, ctx.n_programs, BUILD)
        matrix = layer * BUILD.config.n_experts + element(experts, tile // MATRIX.n_tiles)
        return expert_tile(w.gate_up, w.gate_up_scales, matrix, tile % MATRIX.n_tiles, MATRIX, BUILD)
    else:
        rank, tile = down_tile(ctx, tl.maximum(place, 0), BUILD)
        matrix = layer * BUILD.config.n_experts + element(experts, rank)
        return expert_tile(w.down, w.down_scales, matrix, tile, MATRIX, BUILD)


@triton.jit
def down_tile(ctx, n, BUILD: tl.constexpr):
    """(expert rank, tile) of a program's tile number n of the down projection."""
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    down = ctx.work.down
    rank = ctx.program % TOP_K + 0 * n
    if down.ranks < TOP_K:
        rank = ctx.program % down.ranks + n // tl.maximum(down.each, 1) * down.ranks
        n %= tl.maximum(down.each, 1)
    return rank, down.member + n * down.members


@triton.jit
def tile_if(condition, tile, other):
    """Where `condition`, a tile's four numbers, else the other's."""
    chosen = ()
    for i in tl.static_range(4):
        chosen = chosen + (tl.where(condition, tile[i], other[i]),)
    return chosen


@triton.jit
def dense_tile(w_ptr, scales_ptr, layer, tile, MATRIX: tl.constexpr):
    """(address, bytes) of a tile of a layer's matrix, tile_rows rows or what is left, and of its scales."""
    ROW: tl.constexpr = MATRIX.k * item_bytes(MATRIX.format)
    SCALES: tl.constexpr = row_scale_bytes(MATRIX.k, MATRIX.format)
    row = layer * MATRIX.rows + tile * MATRIX.tile_rows
    rows = tl.minimum(MATRIX.rows - tile * MATRIX.tile_rows, MATRIX.tile_rows).to(tl.int64)
    at, more = w_ptr.to(tl.int64) + row * ROW, scales_ptr.to(tl.int64) + row * SCALES
    return at, rows * ROW, more, rows * SCALES


@triton.jit
def expert_tile(blocks_ptr, scales_ptr, matrix, tile, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """(address, bytes) of the elements and of the scales of a tile of matrix number `matrix` of a stack."""
    BLOCKS: tl.constexpr = block_bytes(MATRIX.k)
    SCALES: tl.constexpr = scale_bytes(MATRIX.k, BUILD.tuning.num_warps)
    index = matrix * MATRIX.n_tiles + tile
    at = blocks_ptr.to(tl.int64) + index * BLOCKS
    more = scales_ptr.to(tl.int64) + index * SCALES
    return at, 0 * index + BLOCKS, more, 0 * index + SCALES
