"""What the GPUs of one model, called ranks, hand each other inside a launch; multi_gpu/protocol.py has the drawing.

Every rank multiplies its part of the O projection's and the experts' columns, so that each has a partial sum of every
row. The programs of one number have the same rows on all ranks. Each stores its sums in the memory of the others as
packets, reads theirs, and adds all in the order of ranks: what it hands on is the same, bit for bit, everywhere.

    o_packets of a rank     | from rank 0: [hidden] | from rank 1: [hidden] | ...
    down_packets of a rank  | from rank 0: [top k, hidden] | from rank 1: [top k, hidden] | ...

An epoch is the number of an exchange, counted through all launches, so that nothing is ever reset. A packet's place is
written again a layer later, when packets of an exchange between the two have told that the reader's rank has passed a
grid barrier since.

Where every program needs what all programs of another rank have stored, as at a token's beginning and end, ranks raise
flags. The last program of a rank to arrive raises the rank's flag everywhere:

    head_value, head_index  | from rank 0: [programs] | from rank 1: [programs] | ...
    flags of a rank         | from rank 0: epoch, rest of a cache line | from rank 1: epoch, ... | ...

A single GPU is the case of one rank: it hands on its sums, and an exchange by flags is a grid barrier.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.barrier import (
    ABORT,
    ARRIVALS,
    EXITS,
    LAYER_BARRIERS,
    OPEN_ALL,
    arrive,
    arrive_last,
    give_up,
    leave_grid,
    poll_until,
    wait,
)
from common.experts import Choice, pick
from common.packets import NO_EPOCH, count_missing, pack, receive, send, value_of

LINE_WORDS = tl.constexpr(32)  # int32 words of a 128-byte cache line: polling one flag must not slow another
RANK_UNIT = tl.constexpr(1 << 16)  # a record of a barrier that gave up: its number + RANK_UNIT * (1 + missing rank)

# Exchanges have the numbers of the megakernel's barriers; in a layer these:
O = tl.constexpr(2)  # noqa: E741
ROUTER = tl.constexpr(3)
DOWN = tl.constexpr(5)


class Peers(NamedTuple):
    """Memory of all ranks, and the launch's place among epochs. A tuple has a pointer for each rank."""

    x: Any  # tuple, float32 [hidden] of each rank: State.x
    o_packets: Any  # tuple, int64 [ranks, hidden]: partial sums of the O projection
    down_packets: Any  # tuple, int64 [ranks, top k, hidden]: partial sums of the experts
    head_value: Any  # tuple, float32 [ranks, programs]: State.head_value
    head_index: Any  # tuple, int32 [ranks, programs]: State.head_index
    logits: Any  # tuple, float32 [vocab]: logits of all ranks' rows
    flags: Any  # tuple, int32 [ranks, LINE_WORDS]: in the first word of a line the epoch that a rank has reached
    own_flags: Any  # those of this rank
    epoch: Any  # int32: what barrier numbers count from


class RolePeers(NamedTuple):
    """What a launch knows of the others where GPUs have whole matrices; see Peers and multi_gpu/rank_kernel.py."""

    inputs: Any  # tuple, a State for each GPU with experts, whose router_logits and expert_in lie in its memory
    tokens: Any  # tuple, int32 [context + 1] of each rank
    flags: Any
    own_flags: Any
    epoch: Any


# ---------------------------------------------------------------- barriers of all ranks


@triton.jit
def arrive_among_ranks(ctx, barrier, BUILD: tl.constexpr):
    """Arrive at a barrier of all ranks' programs, see common.barrier.arrive."""
    MACHINE: tl.constexpr = BUILD.machine
    if BUILD.n_ranks == 1:
        arrive(ctx.s.sync, MACHINE)
    else:
        EVERYONE: tl.constexpr = BUILD.everyone
        raise_flags(ctx, barrier, barrier, EVERYONE, BUILD)


@triton.jit
def raise_flags(ctx, local, number, TO: tl.constexpr, BUILD: tl.constexpr):
    """Arrive; the last program of this rank to do so raises the rank's flag at the ranks TO.

    local: which of this rank's barriers it is, from 1, counting all at which its programs arrive. number: that of the
    phase in the whole launch, the same on all ranks.
    """
    SYNC: tl.constexpr = BUILD.machine.rank_sync
    N_RECEIVERS: tl.constexpr = len(TO)
    SYNC.publish()
    before = tl.atomic_add(ctx.s.sync + ARRIVALS, 1, sem=SYNC.acquire_release, scope="gpu")
    if before == local * ctx.n_programs - 1:
        for i in tl.static_range(N_RECEIVERS):
            flag_ptr = ctx.peers.flags[TO[i]] + BUILD.rank * LINE_WORDS
            tl.atomic_xchg(flag_ptr, ctx.peers.epoch + number, sem=SYNC.release, scope="sys")


@triton.jit
def wait_for_ranks(ctx, barrier, BUILD: tl.constexpr):
    """Wait until all programs of all ranks have arrived at a barrier, and what they stored before is visible."""
    if BUILD.n_ranks == 1:
        MACHINE: tl.constexpr = BUILD.machine
        wait(ctx.s.sync, barrier, ctx.n_programs, BUILD.tuning.spin_limit, MACHINE)
    else:
        EVERYONE: tl.constexpr = BUILD.everyone
        wait_for_flags(ctx, barrier, EVERYONE, BUILD)


@triton.jit
def wait_for_flags(ctx, number, FROM: tl.constexpr, BUILD: tl.constexpr, recorded_from=0):
    """Wait for the flags of the ranks FROM to reach the phase of this number.

    A wait that gives up records the number + recorded_from.
    """
    SYNC: tl.constexpr = BUILD.machine.rank_sync
    SPINS: tl.constexpr = BUILD.tuning.spin_limit
    N_SENDERS: tl.constexpr = len(FROM)
    for i in tl.static_range(N_SENDERS):
        flag_ptr = ctx.peers.own_flags + FROM[i] * LINE_WORDS
        target = ctx.peers.epoch + number
        if poll_until(flag_ptr, target, SPINS, SYNC) < target:
            give_up(ctx.s.sync, number + recorded_from + (FROM[i] + 1) * RANK_UNIT)
            for n in tl.static_range(N_SENDERS):  # no later wait for a flag has to give up once more
                tl.atomic_max(ctx.peers.own_flags + FROM[n] * LINE_WORDS, OPEN_ALL, sem="relaxed", scope="gpu")
        tl.debug_barrier()


@triton.jit
def leave_ranks(ctx, BUILD: tl.constexpr):
    """Leave the kernel, see common.barrier.leave_grid.

    After a wait that gave up, the counter of arrivals stays beyond all numbers, so that no later launch raises a flag:
    the other ranks, too, give up, instead of going on with values that never came.
    """
    MACHINE: tl.constexpr = BUILD.machine
    if BUILD.is_alone:
        leave_grid(ctx.s.sync, ctx.n_programs, MACHINE)
    else:
        if arrive_last(ctx.s.sync + EXITS, ctx.n_programs, MACHINE):
            if tl.load(ctx.s.sync + ABORT) == 0:
                tl.store(ctx.s.sync + ARRIVALS, 0)


# ---------------------------------------------------------------- sums of all ranks


@triton.jit
def exchange_number(layer, PHASE: tl.constexpr):
    """Return the number of the exchange behind a phase of a layer."""
    return (2 + layer * LAYER_BARRIERS + PHASE).to(tl.int32)


@triton.jit
def epoch_of(ctx, layer, PHASE: tl.constexpr, BUILD: tl.constexpr):
    """Return the epoch of this program's packets of a phase; NO_EPOCH after a wait of this rank that gave up.

    It is asked for at the phase's beginning, where the answer's way from memory is hidden.
    """
    if BUILD.n_ranks == 1:
        return NO_EPOCH
    else:
        arrivals = BUILD.machine.load_now(ctx.s.sync + ARRIVALS)
        return tl.where(arrivals < OPEN_ALL, ctx.peers.epoch + exchange_number(layer, PHASE), NO_EPOCH)


@triton.jit
def sum_o(ctx, layer, row, y, mask, epoch, BUILD: tl.constexpr):
    """Return the sum of all ranks' parts y of rows of the O projection."""
    if BUILD.n_ranks == 1:
        return y
    else:
        SIZE: tl.constexpr = BUILD.config.hidden_size
        when = (epoch, exchange_number(layer, O))
        return sum_packets(ctx, ctx.peers.o_packets, SIZE, row, (y,), mask, when, BUILD)[0]


@triton.jit
def sum_down(ctx, layer, rank, row, rows, biases, epoch, BUILD: tl.constexpr):
    """Return (rows `row` and row + 1 of the expert of this rank among the chosen, their biases).

    Where several ranks have parts of the rows, each adds its part of the biases, and none is left.
    """
    if BUILD.n_ranks == 1:
        return rows, biases
    else:
        parts = (rows[0] + biases[0], rows[1] + biases[1])
        H: tl.constexpr = BUILD.config.hidden_size
        SIZE: tl.constexpr = BUILD.config.experts_per_token * H
        when = (epoch, exchange_number(layer, DOWN))
        return sum_packets(ctx, ctx.peers.down_packets, SIZE, rank * H + row, parts, row < H, when, BUILD), (0.0, 0.0)


@triton.jit
def sum_packets(ctx, buffers, SIZE: tl.constexpr, place, values, mask, when, BUILD: tl.constexpr):
    """Return the sums of all ranks' values, which each stores as packets in the others' buffers.

    values: a tuple, of which the n-th has packets at place + n of SIZE. when: the packets' epoch, and the exchange's
    number, which a wait that gives up records.
    """
    OTHERS: tl.constexpr = BUILD.others
    N_OTHERS: tl.constexpr = len(OTHERS)
    N: tl.constexpr = len(values)
    SPINS: tl.constexpr = BUILD.tuning.spin_limit
    MACHINE: tl.constexpr = BUILD.machine
    epoch, number = when
    pointers = ()
    for i in tl.static_range(N_OTHERS):
        for n in tl.static_range(N):
            send(buffers[OTHERS[i]] + BUILD.rank * SIZE + place + n, pack(values[n], epoch), mask)
            pointers = pointers + (buffers[BUILD.rank] + OTHERS[i] * SIZE + tl.where(mask, place + n, 0),)
    packets, n_missing = receive(pointers, mask, epoch, SPINS, MACHINE)
    if n_missing > 0:
        for i in tl.static_range(N_OTHERS):
            if count_missing(packets[N * i : N * (i + 1)], mask, epoch) > 0:
                give_up(ctx.s.sync, number + (OTHERS[i] + 1) * RANK_UNIT)
    sums = ()
    for n in tl.static_range(N):
        parts = ()
        for i in tl.static_range(N_OTHERS):
            parts = parts + (value_of(packets[N * i + n]),)
        parts = parts[: BUILD.rank] + (values[n],) + parts[BUILD.rank :]
        total = parts[0]
        for rank in tl.static_range(1, N_OTHERS + 1):
            total += parts[rank]
        sums = sums + (total,)
    return sums


# ---------------------------------------------------------------- values


@triton.jit
def store(pointers, value, mask, BUILD: tl.constexpr):
    """Store a value at each rank's pointer."""
    N_RANKS: tl.constexpr = BUILD.n_ranks
    for rank in tl.static_range(N_RANKS):
        tl.store(pointers[rank], value, mask=mask)


@triton.jit
def advance(pointers, offset, BUILD: tl.constexpr):
    """Return each rank's pointer plus an offset."""
    N_RANKS: tl.constexpr = BUILD.n_ranks
    advanced = ()
    for rank in tl.static_range(N_RANKS):
        advanced = advanced + (pointers[rank] + offset,)
    return advanced


@triton.jit
def local_row(token, BUILD: tl.constexpr):
    """Return the row of a token in this rank's embedding; any row that it has if the token is another rank's."""
    if BUILD.n_ranks == 1:
        return token
    else:
        return tl.minimum(tl.maximum(token - BUILD.first_row, 0), BUILD.config.vocab_size - 1)


@triton.jit
def store_embedding(ctx, token, h, values, BUILD: tl.constexpr):
    """x = the token's embedding, on all ranks, from the one that has it."""
    H: tl.constexpr = BUILD.config.hidden_size
    if BUILD.n_ranks == 1:
        tl.store(ctx.s.x + h, values.to(tl.float32), mask=h < H)
    else:
        if local_row(token, BUILD) + BUILD.first_row == token:
            store(advance(ctx.peers.x, h, BUILD), values.to(tl.float32), h < H, BUILD)


@triton.jit
def router_targets(ctx, BUILD: tl.constexpr):
    """Return a State for each GPU that needs what the router leaves, which leads into its memory."""
    if BUILD.n_expert_ranks == 1:
        return (ctx.s,)
    else:
        return ctx.peers.inputs


@triton.jit
def own_choice(choice, BUILD: tl.constexpr):
    """Return the part of a Choice that this GPU has: all, or some ranks of the experts."""
    N: tl.constexpr = BUILD.config.experts_per_token
    if BUILD.n_chosen == N:
        return choice
    else:
        experts, weights = (), tl.zeros(choice.weights.shape, tl.float32)
        for n in tl.static_range(N):
            experts = experts + (choice.experts[BUILD.first_expert + n],)
            weight = pick(choice.weights, BUILD.first_expert + n)
            weights = tl.where(tl.arange(0, weights.shape[0]) == n, weight, weights)
        return Choice(experts, weights)


@triton.jit
def store_logits(ctx, row, logits, mask, BUILD: tl.constexpr):
    """Store logits of rows of this rank's LM head."""
    if BUILD.n_ranks == 1:
        tl.store(ctx.s.logits + row, logits, mask=mask)
    else:
        store(advance(ctx.peers.logits, BUILD.first_row + row, BUILD), logits, mask, BUILD)


@triton.jit
def store_largest(ctx, value, index, BUILD: tl.constexpr):
    """Store a program's largest logit and its token id, or NOT_FINITE."""
    if BUILD.n_ranks == 1:
        tl.store(ctx.s.head_value + ctx.program, value)
        tl.store(ctx.s.head_index + ctx.program, index)
    else:
        index = tl.where(index < 0, index, index + BUILD.first_row)
        at = BUILD.rank * ctx.n_programs + ctx.program
        store(advance(ctx.peers.head_value, at, BUILD), value, None, BUILD)
        store(advance(ctx.peers.head_index, at, BUILD), index, None, BUILD)
