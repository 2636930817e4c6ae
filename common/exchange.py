"""What the GPUs of one model, called ranks, hand each other inside a launch; multi_gpu/protocol.py has the drawing.

Every rank multiplies its part of the O projection's and the experts' columns, so that each has a partial sum of every
row. It stores it in the memory of all ranks, which add the sums in the order of ranks: the residual is the same, bit
for bit, everywhere. A single GPU is the case of one rank: a store is a store, and an exchange is a grid barrier.

    o_out of a rank         | from rank 0: [hidden] | from rank 1: [hidden] | ...
    expert_out of a rank    | from rank 0: [top k, hidden] | from rank 1: [top k, hidden] | ...
    head_value, head_index  | from rank 0: [programs] | from rank 1: [programs] | ...
    flags of a rank         | from rank 0: epoch, rest of a cache line | from rank 1: epoch, ... | ...

An epoch is the number of an exchange, counted through all launches, so that no flag is ever reset. The last program of
a rank to arrive raises the rank's flag everywhere. A buffer is written again only after a later exchange, at which all
ranks have arrived behind their reads.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.barrier import ABORT, ARRIVALS, EXITS, OPEN_ALL, arrive, arrive_last, give_up, leave_grid, poll_until, wait
from common.experts import Choice, pick
from common.gemv_dense import load_row_vector
from common.rmsnorm import add_blocks

LINE_WORDS = tl.constexpr(32)  # int32 words of a 128-byte cache line: polling one flag must not slow another
RANK_UNIT = tl.constexpr(1 << 16)  # a record of a barrier that gave up: its number + RANK_UNIT * (1 + missing rank)


class Peers(NamedTuple):
    """Memory of all ranks, and the launch's place among epochs. A tuple has a pointer for each rank."""

    x: Any  # tuple, float32 [hidden] of each rank: State.x
    x_before_o: Any  # float32 [hidden] of this rank: the residual without what the O projection adds
    o_out: Any  # tuple, float32 [ranks, hidden]: partial sums of the O projection
    expert_out: Any  # tuple, float32 [ranks, top k, hidden]: State.expert_out
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
def store_o(ctx, row, x, y, mask, BUILD: tl.constexpr):
    """Store rows of the residual: x without the O projection, and y, this rank's part of the projection."""
    if BUILD.n_ranks == 1:
        tl.store(ctx.s.x + row, x + y, mask=mask)
    else:
        tl.store(ctx.peers.x_before_o + row, x, mask=mask)
        store(advance(ctx.peers.o_out, BUILD.rank * BUILD.config.hidden_size + row, BUILD), y, mask, BUILD)


@triton.jit
def load_residual(ctx, MATRIX: tl.constexpr, zero, BUILD: tl.constexpr):
    """Return the residual behind the O projection as blocks, see load_row_vector."""
    N_RANKS: tl.constexpr = BUILD.n_ranks
    if BUILD.n_ranks == 1:
        return load_row_vector(ctx.s.x, MATRIX, zero)
    else:
        x = load_row_vector(ctx.peers.x_before_o, MATRIX, zero)
        for rank in tl.static_range(N_RANKS):
            part_ptr = ctx.peers.o_out[BUILD.rank] + rank * BUILD.config.hidden_size
            x = add_blocks(x, load_row_vector(part_ptr, MATRIX, zero))
        return x


@triton.jit
def settle_residual(ctx, h, mask, BUILD: tl.constexpr):
    """Return elements h of the residual behind the O projection, which x holds from then on."""
    N_RANKS: tl.constexpr = BUILD.n_ranks
    if BUILD.n_ranks == 1:
        return tl.load(ctx.s.x + h, mask=mask, other=0.0)
    else:
        x = tl.load(ctx.peers.x_before_o + h, mask=mask, other=0.0)
        for rank in tl.static_range(N_RANKS):
            part_ptr = ctx.peers.o_out[BUILD.rank] + rank * BUILD.config.hidden_size
            x += tl.load(part_ptr + h, mask=mask, other=0.0)
        tl.store(ctx.s.x + h, x, mask=mask)
        return x


@triton.jit
def expert_out(ctx, rank, row, BUILD: tl.constexpr):
    """Return where rows of the output of the expert of this rank among the chosen go, a pointer for each GPU."""
    H: tl.constexpr = BUILD.config.hidden_size
    if BUILD.n_ranks == 1:
        return (ctx.s.expert_out + rank * H + row,)
    else:
        first = (BUILD.rank * BUILD.config.experts_per_token + rank) * H
        return advance(ctx.peers.expert_out, first + row, BUILD)


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
