"""The order in which a program's weights pass through its ring: its tiles of QKV, O, gate-up and down, layer by layer.

Each tile is a unit. A program has as many units of one layer as of any other; those of the LM head follow the last.
Which experts a layer takes is known when its router has spoken, so no more units are asked for than a plan's limit.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from common.fp4_fragments import block_bytes, scale_bytes
from common.gemv_dense import item_bytes, row_lanes, row_scale_bytes
from common.ring import UNIT_BYTES, behind_slots, fill_slot, open_ring, store_unit, wait_for_slot
from common.router import element
from common.spread import spread_words
from common.sums import sum_words

KNOWN_UNITS = tl.constexpr(64)  # of which a program keeps descriptions; one of 132 has 38 or 39 a layer of 120b
LEAST_UNITS = tl.constexpr(32)  # a batch of tiles and a ring's slots: what is asked for between two calls of describe


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
    scratch: tl.tensor  # address of the program's memory for common/sums.py and common/spread.py
    first: tl.tensor  # the model's number, among the program's, of unit 0
    known: tl.tensor  # units that are described, see describe
    asked: tl.tensor  # units asked for
    taken: tl.tensor  # units taken


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
def memory_words(config, tuning) -> int:
    """float32 of a program's memory: for that, and behind it for the descriptions of units."""
    return scratch_words(config, tuning) + KNOWN_UNITS.value * UNIT_BYTES.value // 4


@triton.constexpr_function
def scratch_words(config, tuning) -> int:
    """float32 of a program's memory for what its threads exchange: sums of rows, or of a vector a piece."""

    def vector(dense_format: str) -> int:
        run = row_lanes(config.hidden_size, dense_format, tuning) * 16 // item_bytes(dense_format)
        return spread_words(run, 32 * tuning.num_warps)

    return max(sum_words(tuning), vector(config.dense.qkv), vector(config.dense.head))


@triton.jit
def open_stream(s, shares, pid, layer, place, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """A stream whose first unit is the one at `place` of a layer; () where weights are not streamed."""
    ARCH: tl.constexpr = TUNING.arch
    BYTES: tl.constexpr = 4 * memory_words(CONFIG, TUNING)
    if TUNING.ring_slots > 0:
        slots = open_ring(TUNING.ring_slots, TUNING.slot_bytes, BYTES, ARCH)
        if ARCH == "cuda":
            scratch = behind_slots(slots, TUNING.ring_slots, TUNING.slot_bytes)
        else:
            scratch = s.scratch.to(tl.int64) + BYTES * pid
        zero = tl.cast(0, tl.int32)
        first = tl.cast(layer * units_of_layer(shares) + place, tl.int32)
        return Stream(slots, scratch, first, zero, zero, zero)
    else:
        return ()


@triton.jit
def units_of_layer(shares):
    return shares.qkv + shares.o + shares.gate_up + shares.down


@triton.jit
def take(stream, PLACE: tl.constexpr, TUNING: tl.constexpr):
    """(addresses of the next unit's two pieces, the stream), when its bytes have arrived; the first piece has PLACE."""
    ARCH: tl.constexpr = TUNING.arch
    pieces = wait_for_slot(stream.slots, stream.taken, PLACE, TUNING.ring_slots, TUNING.slot_bytes, ARCH)
    return pieces, Stream(stream.slots, stream.scratch, stream.first, stream.known, stream.asked, stream.taken + 1)


@triton.jit
def release(stream, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Give back the slot of what was taken last, for the next unit that is known."""
    tl.debug_barrier()  # all threads have read it
    return ask(stream, CONFIG, TUNING, TUNING.window)


@triton.jit
def fill(stream, CONFIG: tl.constexpr, TUNING: tl.constexpr, WINDOW: tl.constexpr):
    """Ask for units that are known until WINDOW are under way or wait to be taken."""
    if TUNING.ring_slots > 0:
        for _ in range(WINDOW):
            stream = ask(stream, CONFIG, TUNING, WINDOW)
    return stream


@triton.jit
def describe_and_fill(stream, plan, w, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Know the plan's next units and ask for a window of them."""
    if TUNING.ring_slots > 0:
        stream = describe(stream, plan, w, pid, n_programs, CONFIG, TUNING)
    return fill(stream, CONFIG, TUNING, TUNING.window)


@triton.jit
def ask(stream, CONFIG: tl.constexpr, TUNING: tl.constexpr, WINDOW: tl.constexpr):
    """Ask for the next unit, if it is known and fewer than WINDOW are under way or wait to be taken."""
    ARCH: tl.constexpr = TUNING.arch
    slots, asked = stream.slots, stream.asked
    if (asked < stream.known) & (asked - stream.taken < WINDOW):
        unit = unit_address(stream, asked, CONFIG, TUNING)
        slots = fill_slot(slots, asked, unit, TUNING.ring_slots, TUNING.slot_bytes, ARCH)
        asked += 1
    return Stream(slots, stream.scratch, stream.first, stream.known, asked, stream.taken)


@triton.jit
def unit_address(stream, n, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Where unit n is described, a number or a tensor."""
    SCRATCH: tl.constexpr = 4 * scratch_words(CONFIG, TUNING)
    return stream.scratch + SCRATCH + n % KNOWN_UNITS * UNIT_BYTES


@triton.jit
def describe(stream, plan, w, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Know the plan's next units, unless enough for LEAST_UNITS more requests are known.

    All at once, a thread each: working them out one by one where they were asked for was 28% of the instructions of a
    tile of experts.
    """
    ARCH: tl.constexpr = TUNING.arch
    known = stream.known
    if (known < plan.limit) & (known - stream.asked < LEAST_UNITS):
        tl.debug_barrier()  # whoever asks has read what was there
        n = stream.asked + tl.arange(0, KNOWN_UNITS)
        known = tl.minimum(stream.asked + KNOWN_UNITS, plan.limit)
        at, n_bytes, more, more_bytes = locate(w, stream.first + n, plan, pid, n_programs, CONFIG, TUNING)
        store_unit(unit_address(stream, n, CONFIG, TUNING), at, n_bytes, more, more_bytes, n < known, ARCH)
        tl.debug_barrier()
    return Stream(stream.slots, stream.scratch, stream.first, known, stream.asked, stream.taken)


@triton.jit
def locate(w, number, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """(address, bytes) of both pieces, int64, of a program's units `number`; the second piece may have 0 bytes."""
    H: tl.constexpr = CONFIG.hidden_size
    QKV_FORMAT: tl.constexpr = CONFIG.dense.qkv
    O_FORMAT: tl.constexpr = CONFIG.dense.o
    HEAD_FORMAT: tl.constexpr = CONFIG.dense.head
    GATE_UP: tl.constexpr = (2 * CONFIG.intermediate_size + TUNING.gate_up_m - 1) // TUNING.gate_up_m
    DOWN: tl.constexpr = (H + TUNING.down_m - 1) // TUNING.down_m
    shares = plan.shares
    each = units_of_layer(shares)
    of_layers = plan.n_layers * each
    # A program may have units of the LM head alone.
    layer = tl.where(number < of_layers, number // tl.maximum(each, 1), 0).to(tl.int64)
    place = tl.where(number < of_layers, number % tl.maximum(each, 1), 0)
    unit = dense_tile(
        w.qkv, w.qkv_scales, layer, shares.qkv_first + place, CONFIG.qkv_size, H, TUNING.qkv_m, QKV_FORMAT
    )
    place -= shares.qkv
    o = dense_tile(w.o, w.o_scales, layer, shares.o_first + place, H, CONFIG.q_size, TUNING.o_m, O_FORMAT)
    unit = keep_or(place < 0, unit, o)
    place -= shares.o
    item = gate_up_item(tl.maximum(place, 0), pid, n_programs, shares.run)
    matrix = layer * CONFIG.n_experts + element(plan.experts, item // GATE_UP)
    gate_up = expert_tile(w.gate_up, w.gate_up_scales, matrix * GATE_UP + item % GATE_UP, H, TUNING)
    unit = keep_or(place < 0, unit, gate_up)
    place -= shares.gate_up
    turn = tl.maximum(place, 0)
    slot = pid % CONFIG.experts_per_token + 0 * turn
    if shares.lanes < CONFIG.experts_per_token:
        slot = pid % shares.lanes + turn // tl.maximum(shares.down_each, 1) * shares.lanes
        turn %= tl.maximum(shares.down_each, 1)
    matrix = layer * CONFIG.n_experts + element(plan.experts, slot)
    tile = shares.member + turn * shares.members
    down = expert_tile(w.down, w.down_scales, matrix * DOWN + tile, CONFIG.intermediate_size, TUNING)
    unit = keep_or(place < 0, unit, down)
    tile = shares.head_first + number - of_layers
    head = dense_tile(w.lm_head, w.lm_head_scales, 0 * layer, tile, CONFIG.vocab_size, H, TUNING.head_m, HEAD_FORMAT)
    return keep_or(number < of_layers, unit, head)


@triton.jit
def keep_or(keep, unit, other):
    """Where `keep`, a unit's four numbers, else the other's."""
    chosen = ()
    for i in tl.static_range(4):
        chosen = chosen + (tl.where(keep, unit[i], other[i]),)
    return chosen


@triton.jit
def dense_tile(
    w_ptr, scales_ptr, layer, tile, ROWS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr
):
    """(address, bytes) of a tile of a layer's matrix [ROWS, K], M rows or what is left, and of its scales."""
    ROW: tl.constexpr = K * item_bytes(FORMAT)
    SCALES: tl.constexpr = row_scale_bytes(K, FORMAT)
    row = layer * ROWS + tile * M
    rows = tl.minimum(ROWS - tile * M, M).to(tl.int64)
    at, more = w_ptr.to(tl.int64) + row * ROW, scales_ptr.to(tl.int64) + row * SCALES
    return at, rows * ROW, more, rows * SCALES


@triton.jit
def expert_tile(blocks_ptr, scales_ptr, index, K: tl.constexpr, TUNING: tl.constexpr):
    """(address, bytes) of the blocks and of the scales of packed tile number `index` of a stack."""
    BLOCKS: tl.constexpr = block_bytes(K)
    SCALES: tl.constexpr = scale_bytes(K, TUNING.num_warps)
    at = blocks_ptr.to(tl.int64) + index * BLOCKS
    more = scales_ptr.to(tl.int64) + index * SCALES
    return at, 0 * index + BLOCKS, more, 0 * index + SCALES
