"""The order in which a program's weights pass through its ring: its tiles of QKV, O, gate-up and down, layer by layer.

A program has equally many tiles of every layer; those of the LM head follow the last layer's. The tiles of a layer's
experts are known once its router has run, so requests stop at a limit:

    | QKV O gate-up down | QKV O gate-up down | ... | LM head |
                 taken ^    asked ^   known ^   limit ^

Before a tile is asked for it is described in shared memory: where its bytes lie, and how many there are.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.experts import element, no_choice
from common.gemv_dense import item_bytes, row_scale_bytes
from common.sm90.gemv import elements_per_load, row_threads
from common.sm90.ring import (
    DESCRIPTION_BYTES,
    TilePieces,
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

KNOWN_TILES = tl.constexpr(
    64
)  # descriptions that a program keeps; one of 132 programs has 38 or 39 tiles of a layer of 120b
MIN_TILES = tl.constexpr(32)  # at least the requests between two calls of describe: a step's tiles and a ring's stages


class RingFeed(NamedTuple):
    """How far a program is in the order of its tiles. Tiles are counted from the feed's first one."""

    ring: Any  # address, see ring.py
    scratch: Any  # address of memory for sums.py and spread.py, with the descriptions of tiles behind it
    first: Any  # index of the feed's first tile in the program's order
    limit: Any  # tiles that may be described
    known: Any  # tiles described
    asked: Any  # tiles asked for
    taken: Any  # tiles taken


@triton.jit
def with_counts(feed, known, asked, taken):
    """Return the feed with other numbers of tiles described, asked for and taken."""
    return RingFeed(feed.ring, feed.scratch, feed.first, feed.limit, known, asked, taken)


@triton.jit
def with_limit(feed, limit):
    """Return the feed with another limit."""
    return RingFeed(feed.ring, feed.scratch, feed.first, limit, feed.known, feed.asked, feed.taken)


@triton.constexpr_function
def scratch_words(build) -> int:
    """Return the float32 of memory for what a program's threads exchange: sums of rows, or pieces of a vector."""

    def vector(matrix) -> int:
        run = row_threads(matrix.k, matrix.format, build.tuning.dense) * elements_per_load(matrix.format)
        return spread_words(run, 32 * build.tuning.num_warps)

    return max(sum_words(build.tuning), vector(build.qkv), vector(build.lm_head))


@triton.constexpr_function
def memory_bytes(build) -> int:
    """Return the bytes of shared memory behind the ring: the scratch memory and the descriptions of tiles."""
    return 4 * scratch_words(build) + KNOWN_TILES.value * DESCRIPTION_BYTES.value


@triton.jit
def counts_of_layer(work):
    """Return a program's number of tiles of each matrix of a layer, in the order of Build.layer_matrices."""
    return work.qkv.count, work.o.count, work.gate_up_count, work.down.count


@triton.jit
def tiles_of_layer(work):
    """Return a program's number of tiles of one layer."""
    return work.qkv.count + work.o.count + work.gate_up_count + work.down.count


@triton.jit
def tiles_before_experts(ctx, layer):
    """Return how many tiles are known before a layer's router has run; for layer n_layers the LM head's count too."""
    work = ctx.work
    dense = work.qkv.count + work.o.count
    per_layer = dense + work.gate_up_count + work.down.count
    return layer * per_layer + tl.where(layer < ctx.n_layers, dense, work.lm_head.count * ctx.want_head)


@triton.jit
def open_at(ctx, layer, index, limit, BUILD: tl.constexpr):
    """Return a feed that begins at the program's tile `index` of a layer, with no tile described yet."""
    RING: tl.constexpr = BUILD.tuning.ring
    ring = open_ring(RING.stages, RING.stage_bytes, memory_bytes(BUILD))
    scratch = behind_stages(ring, RING.stages, RING.stage_bytes)
    zero = tl.cast(0, tl.int32)
    first = tl.cast(layer * tiles_of_layer(ctx.work) + index, tl.int32)
    return RingFeed(ring, scratch, first, limit, zero, zero, zero)


@triton.jit
def open_feed(ctx, BUILD: tl.constexpr):
    """Return a feed that begins at the token's first tile, with as many in flight as the prefetch distance."""
    return ask_known(ctx, no_choice().experts, open_at(ctx, 0, 0, tiles_before_experts(ctx, 0), BUILD), BUILD)


@triton.jit
def open_phase(ctx, layer, MATRIX: tl.constexpr, choice, BUILD: tl.constexpr):
    """Return a feed of one matrix of one layer; gate-up, which chooses the experts, asks for its own tiles."""
    work = ctx.work
    index, count = 0, work.qkv.count
    if MATRIX.name == "o":
        index, count = work.qkv.count, work.o.count
    if MATRIX.name == "gate_up":
        index, count = work.qkv.count + work.o.count, work.gate_up_count
    if MATRIX.name == "down":
        index, count = work.qkv.count + work.o.count + work.gate_up_count, work.down.count
    if MATRIX.name == "lm_head":
        layer, count = ctx.n_layers, work.lm_head.count
    feed = open_at(ctx, layer, index, count, BUILD)
    if MATRIX.name == "gate_up":
        return feed
    else:
        return ask_known(ctx, choice.experts, feed, BUILD)


@triton.jit
def extend(ctx, layer, feed):
    """Return the feed with the tiles that are known before the router of `layer` has run as its limit."""
    return with_limit(feed, tiles_before_experts(ctx, layer))


@triton.jit
def ask_experts(ctx, choice, feed, BUILD: tl.constexpr):
    """Ask for tiles of the chosen experts."""
    return ask_known(ctx, choice.experts, feed, BUILD)


@triton.jit
def fill_ring(ctx, layer, feed, BUILD: tl.constexpr):
    """Ask for as many described tiles as the ring holds: O's, while most programs wait for attention."""
    STAGES: tl.constexpr = BUILD.tuning.ring.stages
    return fill(feed, STAGES, BUILD)


@triton.jit
def keep(ctx, layer, feed, BUILD: tl.constexpr):
    """Return the feed unchanged, as its tiles have been asked for."""
    return feed


@triton.jit
def keep_for_head(ctx, feed, BUILD: tl.constexpr):
    """Return the feed unchanged, as its tiles have been asked for."""
    return feed


@triton.jit
def ask_known(ctx, experts, feed, BUILD: tl.constexpr):
    """Describe the next tiles and ask for as many as the prefetch distance."""
    DISTANCE: tl.constexpr = BUILD.tuning.ring.prefetch_distance
    return fill(describe(ctx, experts, feed, BUILD), DISTANCE, BUILD)


@triton.jit
def fill(feed, DISTANCE: tl.constexpr, BUILD: tl.constexpr):
    """Ask for known tiles until DISTANCE are in flight or wait to be taken."""
    for _ in range(DISTANCE):
        feed = ask(feed, DISTANCE, BUILD)
    return feed


@triton.jit
def ask(feed, DISTANCE: tl.constexpr, BUILD: tl.constexpr):
    """Ask for the next tile if it is known and fewer than DISTANCE are in flight or wait to be taken."""
    RING: tl.constexpr = BUILD.tuning.ring
    asked = feed.asked
    if (asked < feed.known) & (asked - feed.taken < DISTANCE):
        fill_stage(feed.ring, asked, description_at(feed, asked, BUILD), RING.stages, RING.stage_bytes)
        asked += 1
    return with_counts(feed, feed.known, asked, feed.taken)


@triton.jit
def take(feed, BUILD: tl.constexpr):
    """Wait for the next tile and return (its address, the feed)."""
    RING: tl.constexpr = BUILD.tuning.ring
    address = wait_for_stage(feed.ring, feed.taken, RING.stages, RING.stage_bytes)
    return address, with_counts(feed, feed.known, feed.asked, feed.taken + 1)


@triton.jit
def release(feed, BUILD: tl.constexpr):
    """Give back the stage of the tile that was taken last, and ask for the next tile."""
    DISTANCE: tl.constexpr = BUILD.tuning.ring.prefetch_distance
    tl.debug_barrier()  # all threads have read the tile
    return ask(feed, DISTANCE, BUILD)


@triton.jit
def description_at(feed, n, BUILD: tl.constexpr):
    """Return the address of tile n's description; n is a number or a tensor."""
    SCRATCH_BYTES: tl.constexpr = 4 * scratch_words(BUILD)
    return feed.scratch + SCRATCH_BYTES + n % KNOWN_TILES * DESCRIPTION_BYTES


@triton.jit
def describe(ctx, experts, feed, BUILD: tl.constexpr):
    """Describe the next tiles, unless enough for MIN_TILES more requests are described.

    Each thread describes one: locating them one by one when they were asked for was 28% of the instructions of a tile
    of experts.
    """
    known = feed.known
    if (known < feed.limit) & (known - feed.asked < MIN_TILES):
        tl.debug_barrier()  # the thread that asks has read the old descriptions
        n = feed.asked + tl.arange(0, KNOWN_TILES)
        known = tl.minimum(feed.asked + KNOWN_TILES, feed.limit)
        pieces = locate(ctx, feed.first + n, experts, BUILD)
        describe_tile(description_at(feed, n, BUILD), pieces, n < known)
        tl.debug_barrier()
    return with_counts(feed, known, feed.asked, feed.taken)


@triton.jit
def locate(ctx, index, experts, BUILD: tl.constexpr):
    """Return the TilePieces of the tiles `index` in a program's order."""
    per_layer = tiles_of_layer(ctx.work)
    of_layers = ctx.n_layers * per_layer
    # A program may have tiles of the LM head alone, hence the maxima.
    layer = tl.where(index < of_layers, index // tl.maximum(per_layer, 1), 0).to(tl.int64)
    index_in_matrix = tl.where(index < of_layers, index % tl.maximum(per_layer, 1), 0)
    counts = counts_of_layer(ctx.work)
    for i in tl.static_range(len(counts)):
        candidate = layer_tile(ctx, i, layer, index_in_matrix, experts, BUILD)
        if i == 0:
            tile = candidate
        else:
            tile = tile_if(index_in_matrix < 0, tile, candidate)
        index_in_matrix -= counts[i]
    head_tile = ctx.work.lm_head.first + index - of_layers
    LM_HEAD: tl.constexpr = BUILD.lm_head
    head = dense_tile(ctx.w.lm_head, ctx.w.lm_head_scales, 0 * layer, head_tile, LM_HEAD)
    return tile_if(index < of_layers, tile, head)


@triton.jit
def layer_tile(ctx, MATRIX_INDEX: tl.constexpr, layer, index, experts, BUILD: tl.constexpr):
    """Return the TilePieces of a program's tile `index` of a layer's matrix, which MATRIX_INDEX selects."""
    MATRIX: tl.constexpr = BUILD.layer_matrices[MATRIX_INDEX]
    w, work = ctx.w, ctx.work
    if MATRIX.name == "qkv":
        return dense_tile(w.qkv, w.qkv_scales, layer, work.qkv.first + index, MATRIX)
    elif MATRIX.name == "o":
        return dense_tile(w.o, w.o_scales, layer, work.o.first + index, MATRIX)
    elif MATRIX.name == "gate_up":
        tile = gate_up_tile(tl.maximum(index, 0), ctx.program, ctx.n_programs, BUILD)
        matrix = layer * BUILD.config.n_experts + element(experts, tile // MATRIX.n_tiles)
        return expert_tile(w.gate_up, w.gate_up_scales, matrix, tile % MATRIX.n_tiles, MATRIX, BUILD)
    else:
        rank, tile = down_tile(ctx, tl.maximum(index, 0), BUILD)
        matrix = layer * BUILD.config.n_experts + element(experts, rank)
        return expert_tile(w.down, w.down_scales, matrix, tile, MATRIX, BUILD)


@triton.jit
def down_tile(ctx, n, BUILD: tl.constexpr):
    """Return (expert rank, tile) of a program's n-th tile of the down projection."""
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    down = ctx.work.down
    rank = ctx.program % TOP_K + 0 * n
    if down.ranks < TOP_K:
        rank = ctx.program % down.ranks + n // tl.maximum(down.per_expert, 1) * down.ranks
        n %= tl.maximum(down.per_expert, 1)
    return rank, down.member + n * down.members


@triton.jit
def tile_if(condition, tile, other):
    """Return the TilePieces `tile` where `condition` holds, else `other`."""
    return TilePieces(
        tl.where(condition, tile.ptr, other.ptr),
        tl.where(condition, tile.n_bytes, other.n_bytes),
        tl.where(condition, tile.more_ptr, other.more_ptr),
        tl.where(condition, tile.more_bytes, other.more_bytes),
    )


@triton.jit
def dense_tile(w_ptr, scales_ptr, layer, tile, MATRIX: tl.constexpr):
    """Return the TilePieces of a layer's tile: up to tile_rows rows, and their scales."""
    ROW: tl.constexpr = MATRIX.k * item_bytes(MATRIX.format)
    SCALES: tl.constexpr = row_scale_bytes(MATRIX.k, MATRIX.format)
    row = layer * MATRIX.rows + tile * MATRIX.tile_rows
    rows = tl.minimum(MATRIX.rows - tile * MATRIX.tile_rows, MATRIX.tile_rows).to(tl.int64)
    return TilePieces(w_ptr.to(tl.int64) + row * ROW, rows * ROW, scales_ptr.to(tl.int64) + row * SCALES, rows * SCALES)


@triton.jit
def expert_tile(blocks_ptr, scales_ptr, matrix, tile, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return the TilePieces of a tile of expert matrix number `matrix`: its elements, and its scales."""
    BLOCKS: tl.constexpr = block_bytes(MATRIX.k)
    SCALES: tl.constexpr = scale_bytes(MATRIX.k, BUILD.tuning.num_warps)
    index = matrix * MATRIX.n_tiles + tile
    ptr = blocks_ptr.to(tl.int64) + index * BLOCKS
    more_ptr = scales_ptr.to(tl.int64) + index * SCALES
    return TilePieces(ptr, 0 * index + BLOCKS, more_ptr, 0 * index + SCALES)
