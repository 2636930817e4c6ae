"""The order in which a program's weights pass through its ring: its tiles of QKV, O, gate-up and down, layer by layer.

Each tile is a unit. A program has as many units of one layer as of any other; those of the LM head follow the last.
Which experts a layer takes is known when its router has spoken, so no more units are asked for than a plan's limit.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from common.fp4_fragments import block_bytes, scale_bytes
from common.gemv_dense import item_bytes, row_lanes, row_scale_bytes
from common.ring import behind_slots, fill_slot, open_ring, wait_for_slot
from common.router import element
from common.spread import spread_words
from common.sums import sum_words


class Shares(NamedTuple):
    """What a program has of each matrix. Dense tiles are consecutive; experts' are dealt out, see shares_of."""

    qkv_first: tl.tensor
    qkv: tl.tensor  # tiles
    o_first: tl.tensor
    o: tl.tensor
    gate_up: tl.tensor
    run: tl.tensor  # consecutive tiles of gate-up, see tiles_in_a_run
    lanes: tl.tensor  # programs are dealt out over so many experts of the down projection
    member: tl.tensor  # number of the program among those of its experts
    members: tl.tensor  # and how many those are
    down_each: tl.tensor  # tiles of each of its experts
    down: tl.tensor
    head_first: tl.tensor
    head: tl.tensor


class Stream(NamedTuple):
    """Where a program is in the order of its units."""

    slots: tl.tensor  # see common/ring.py
    sums: tl.tensor  # address of the program's memory for common/sums.py and common/spread.py
    asked: tl.tensor  # units asked for
    taken: tl.tensor  # units taken
    layer: tl.tensor  # of the next unit to ask for
    place: tl.tensor  # of it among the layer's


class Plan(NamedTuple):
    """What may be asked for: units below number `limit`, the experts' among them of `experts`, a tuple."""

    limit: tl.tensor
    experts: tuple
    n_layers: tl.tensor
    shares: Shares


@triton.jit
def share(n_items, pid, n_programs):
    """(first, end) of the items that a program takes: consecutive ones, as many as any other or one more."""
    return pid * n_items // n_programs, (pid + 1) * n_items // n_programs


@triton.constexpr_function
def tiles_in_a_run(tuning, quant: bool) -> int:
    """Consecutive tiles of gate-up that one program has: with `quant` those of the 32 outputs that share a scale."""
    rows = 2 * 32  # gate and up
    return rows // tuning.gate_up_m if quant and tuning.fragments else 1


@triton.jit
def gate_up_item(n, pid, n_programs, run):
    """A program's tile number n, counted through those of all chosen experts. Runs are dealt out."""
    return (n // run * n_programs + pid) * run + n % run


@triton.jit
def shares_of(pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    """A program's Shares; it has its tiles of an expert's down projection from `member` on in steps of `members`."""
    GATE_UP: tl.constexpr = (2 * CONFIG.intermediate_size + TUNING.gate_up_m - 1) // TUNING.gate_up_m
    DOWN: tl.constexpr = (CONFIG.hidden_size + TUNING.down_m - 1) // TUNING.down_m
    qkv_first, qkv_end = share(tl.cdiv(CONFIG.qkv_size, TUNING.qkv_m), pid, n_programs)
    o_first, o_end = share(tl.cdiv(CONFIG.hidden_size, TUNING.o_m), pid, n_programs)
    head_first, head_end = share(tl.cdiv(CONFIG.vocab_size, TUNING.head_m), pid, n_programs)
    RUN: tl.constexpr = tiles_in_a_run(TUNING, QUANT)
    # Whole runs, as intermediate sizes are multiples of 32.
    gate_up = RUN * tl.maximum(tl.cdiv(GATE_UP * CONFIG.experts_per_token // RUN - pid, n_programs), 0)
    # Programs are dealt out over the experts, as each expert has another vector to prepare; too few take several.
    lanes = tl.minimum(n_programs, CONFIG.experts_per_token)
    member = pid // lanes
    members = (n_programs - pid % lanes + lanes - 1) // lanes
    down_each = tl.maximum(tl.cdiv(DOWN - member, members), 0)
    down = down_each * tl.cdiv(CONFIG.experts_per_token - pid % lanes, lanes)
    return Shares(
        qkv_first,
        qkv_end - qkv_first,
        o_first,
        o_end - o_first,
        gate_up,
        tl.cast(RUN, tl.int32),
        lanes,
        member,
        members,
        down_each,
        down,
        head_first,
        head_end - head_first,
    )


@triton.jit
def plan_until(layer, experts, n_layers, want_head, shares):
    """The units that are known before the router of a layer has spoken, `experts` those of the layer before.

    Of layer n_layers, which is none, those of the LM head, if it is wanted (0 or 1).
    """
    dense = shares.qkv + shares.o
    each = dense + shares.gate_up + shares.down
    return Plan(layer * each + tl.where(layer < n_layers, dense, shares.head * want_head), experts, n_layers, shares)


@triton.constexpr_function
def scratch_words(config, tuning) -> int:
    """float32 of a program's memory for what its threads exchange: sums of rows, or of a vector a piece."""

    def vector(dense_format: str) -> int:
        run = row_lanes(config.hidden_size, dense_format, tuning) * 16 // item_bytes(dense_format)
        return spread_words(run, 32 * tuning.num_warps)

    return max(sum_words(tuning), vector(config.dense.qkv), vector(config.dense.head))


@triton.jit
def open_stream(s, pid, layer, place, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """A stream whose first unit is the one at `place` of a layer; () where weights are not streamed."""
    ARCH: tl.constexpr = TUNING.arch
    WORDS: tl.constexpr = scratch_words(CONFIG, TUNING)
    if TUNING.ring_slots > 0:
        slots = open_ring(TUNING.ring_slots, TUNING.slot_bytes, 4 * WORDS, ARCH)
        if ARCH == "cuda":
            sums = behind_slots(slots, TUNING.ring_slots, TUNING.slot_bytes)
        else:
            sums = s.sums.to(tl.int64) + 4 * WORDS * pid
        zero = tl.cast(0, tl.int32)
        return Stream(slots, sums, zero, zero, tl.cast(layer, tl.int32), tl.cast(place, tl.int32))
    else:
        return ()


@triton.jit
def take(stream, PLACE: tl.constexpr, TUNING: tl.constexpr):
    """(addresses of the next unit's two pieces, the stream), when its bytes have arrived; the first piece has PLACE."""
    ARCH: tl.constexpr = TUNING.arch
    pieces = wait_for_slot(stream.slots, stream.taken, PLACE, TUNING.ring_slots, TUNING.slot_bytes, ARCH)
    return pieces, Stream(stream.slots, stream.sums, stream.asked, stream.taken + 1, stream.layer, stream.place)


@triton.jit
def release(stream, plan, w, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, DENSE: tl.constexpr):
    """Give back the slot of what was taken last, for the next unit of the plan. DENSE: that is no expert's."""
    tl.debug_barrier()  # all threads have read it
    return ask(stream, plan, w, pid, n_programs, CONFIG, TUNING, DENSE, TUNING.window)


@triton.jit
def fill(
    stream,
    plan,
    w,
    pid,
    n_programs,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
    DENSE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Ask for units of the plan until WINDOW are under way or wait to be taken."""
    if TUNING.ring_slots > 0:
        for _ in range(WINDOW):
            stream = ask(stream, plan, w, pid, n_programs, CONFIG, TUNING, DENSE, WINDOW)
    return stream


@triton.jit
def ask(
    stream,
    plan,
    w,
    pid,
    n_programs,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
    DENSE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Ask for the next unit, if it is in the plan and fewer than WINDOW are under way or wait to be taken."""
    ARCH: tl.constexpr = TUNING.arch
    slots, asked, layer, place = stream.slots, stream.asked, stream.layer, stream.place
    shares = plan.shares
    each = shares.qkv + shares.o + shares.gate_up + shares.down
    if (asked < plan.limit) & (asked - stream.taken < WINDOW):
        layer = tl.where(each > 0, layer, plan.n_layers)  # a program may have units of the LM head alone
        at, n_bytes, more, more_bytes = locate(w, layer, place, plan, pid, n_programs, CONFIG, TUNING, DENSE)
        slots = fill_slot(slots, asked, at, n_bytes, more, more_bytes, TUNING.ring_slots, TUNING.slot_bytes, ARCH)
        asked += 1
        place += 1
        if (layer < plan.n_layers) & (place == each):
            layer += 1
            place = tl.cast(0, tl.int32)
    return Stream(slots, stream.sums, asked, stream.taken, layer, place)


@triton.jit
def locate(w, layer, place, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, DENSE: tl.constexpr):
    """(address, bytes) of each of the two pieces of a unit; the second of a dense tile may have none."""
    H: tl.constexpr = CONFIG.hidden_size
    QKV_FORMAT: tl.constexpr = CONFIG.dense.qkv
    O_FORMAT: tl.constexpr = CONFIG.dense.o
    HEAD_FORMAT: tl.constexpr = CONFIG.dense.head
    shares = plan.shares
    layer = tl.cast(layer, tl.int64)
    is_o = place < shares.qkv + shares.o
    if DENSE:
        is_o = True
    if layer >= plan.n_layers:
        tile = shares.head_first + place
        at, n_bytes, more, more_bytes = dense_tile(
            w.lm_head, w.lm_head_scales, 0, tile, CONFIG.vocab_size, H, TUNING.head_m, HEAD_FORMAT
        )
    elif place < shares.qkv:
        tile = shares.qkv_first + place
        at, n_bytes, more, more_bytes = dense_tile(
            w.qkv, w.qkv_scales, layer, tile, CONFIG.qkv_size, H, TUNING.qkv_m, QKV_FORMAT
        )
    elif is_o:
        tile = shares.o_first + place - shares.qkv
        at, n_bytes, more, more_bytes = dense_tile(w.o, w.o_scales, layer, tile, H, CONFIG.q_size, TUNING.o_m, O_FORMAT)
    else:
        place -= shares.qkv + shares.o
        if place < shares.gate_up:
            TILES: tl.constexpr = (2 * CONFIG.intermediate_size + TUNING.gate_up_m - 1) // TUNING.gate_up_m
            item = gate_up_item(place, pid, n_programs, shares.run)
            matrix = layer * CONFIG.n_experts + element(plan.experts, item // TILES)
            at, n_bytes, more, more_bytes = expert_tile(
                w.gate_up, w.gate_up_scales, matrix * TILES + item % TILES, H, TUNING
            )
        else:
            DOWN: tl.constexpr = (H + TUNING.down_m - 1) // TUNING.down_m
            place -= shares.gate_up
            slot = pid % CONFIG.experts_per_token
            if shares.lanes < CONFIG.experts_per_token:
                slot = pid % shares.lanes + place // shares.down_each * shares.lanes
                place %= shares.down_each
            matrix = layer * CONFIG.n_experts + element(plan.experts, slot)
            tile = shares.member + place * shares.members
            at, n_bytes, more, more_bytes = expert_tile(
                w.down, w.down_scales, matrix * DOWN + tile, CONFIG.intermediate_size, TUNING
            )
    return at, n_bytes, more, more_bytes


@triton.jit
def dense_tile(
    w_ptr, scales_ptr, layer, tile, ROWS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr
):
    """(address, bytes) of a tile of a layer's matrix [ROWS, K], M rows or what is left, and of its scales."""
    ROW: tl.constexpr = K * item_bytes(FORMAT)
    SCALES: tl.constexpr = row_scale_bytes(K, FORMAT)
    row = tl.cast(layer * ROWS + tile * M, tl.int64)
    rows = tl.minimum(ROWS - tile * M, M)
    at, more = w_ptr.to(tl.int64) + row * ROW, scales_ptr.to(tl.int64) + row * SCALES
    return at, rows * ROW, more, rows * SCALES


@triton.jit
def expert_tile(blocks_ptr, scales_ptr, index, K: tl.constexpr, TUNING: tl.constexpr):
    """(address, bytes) of the blocks and of the scales of packed tile number `index` of a stack."""
    BLOCKS: tl.constexpr = block_bytes(K)
    SCALES: tl.constexpr = scale_bytes(K, TUNING.num_warps)
    at = blocks_ptr.to(tl.int64) + index * BLOCKS
    more = scales_ptr.to(tl.int64) + index * SCALES
    return at, tl.cast(BLOCKS, tl.int32), more, tl.cast(SCALES, tl.int32)
