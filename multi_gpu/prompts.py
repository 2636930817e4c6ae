"""Feed a prompt in blocks to the ranks of a model: prefill.py's launches, and exchanges between them.

Layout "tp": every rank has a part of each matrix, and adds all ranks' partial sums.

    all ranks    embed ══ norm  qkv  append  attention  o ══ norm  router  gate-up  down ══ ...

Layout "roles": each rank with experts has those of a run of ids, so that it reads only these. It stores what they leave
in the memory of the rank with attention.

    rank 0       embed  norm  qkv  append  attention  o  norm  router ──┐                   ┌── norm ...
    rank 1+                                                             └── gate-up  down ──┘
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from common.context import Context
from common.exchange import advance, leave_ranks, raise_flags, store, wait_for_flags
from host.buffers import buffer_shapes
from host.compilers import compile_errors
from multi_gpu.protocol import EPOCH_STEP, epoch_after
from prefill import DYNAMIC, Launch, Prefill

BLOCK = 1024  # elements that a program exchanges at a time
FIRST_RECORD = 1 << 12  # what waits in a prompt record when they give up: beyond all numbers of a token's launch
SETS = 2  # of buffers, taken in turns: a rank may be one exchange ahead of another that still reads


class RowPeers(NamedTuple):
    """What an exchange of rows knows of all ranks; see common.exchange.Peers."""

    rows: Any  # tuple, float32 [ranks, tokens, hidden] of each rank: partial sums
    own_rows: Any
    flags: Any
    own_flags: Any
    epoch: Any


@triton.jit(do_not_specialize=DYNAMIC)
def embed_share_kernel(tokens_ptr, embed_ptr, part_ptr, position, BUILD: tl.constexpr):
    """part = the tokens' embeddings, zeros for those of other ranks; a program takes one token."""
    H: tl.constexpr = BUILD.config.hidden_size
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, triton.next_power_of_2(H))
    row = tl.load(tokens_ptr + position + token).to(tl.int64) - BUILD.first_row
    mask = (h < H) & (row >= 0) & (row < BUILD.config.vocab_size)
    values = tl.load(embed_ptr + row * H + h, mask=mask, other=0.0)
    tl.store(part_ptr + token * H + h, values.to(tl.float32), mask=h < H)


@triton.jit(do_not_specialize=DYNAMIC)
def sum_experts_kernel(expert_out_ptr, part_ptr, BUILD: tl.constexpr):
    """part = the sum of a token's expert outputs; a program takes one token."""
    H: tl.constexpr = BUILD.config.hidden_size
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, triton.next_power_of_2(H))
    total = tl.zeros([h.shape[0]], tl.float32)
    for rank in tl.static_range(TOP_K):
        total += tl.load(expert_out_ptr + (token * TOP_K + rank) * H + h, mask=h < H, other=0.0)
    tl.store(part_ptr + token * H + h, total, mask=h < H)


@triton.jit(do_not_specialize=["n_elements", "capacity", "n_programs", "record"])
def exchange_rows_kernel(
    part_ptr,
    x_ptr,
    s,
    n_elements,
    capacity,
    n_programs,
    peers,
    record,
    ADD: tl.constexpr,
    N: tl.constexpr,
    BUILD: tl.constexpr,
):
    """x = the sum of all ranks' parts in the order of ranks, with ADD added to x. All programs are resident.

    part, x: float32 [n_elements]. capacity: elements from one rank's rows to the next rank's.
    """
    N_RANKS: tl.constexpr = BUILD.n_ranks
    EVERYONE: tl.constexpr = BUILD.everyone
    program = tl.program_id(0)
    ctx = Context((), s, 0, 0, 0, 0, program, n_programs, (), peers)
    for block in range(program, tl.cdiv(n_elements, N), n_programs):
        i = block * N + tl.arange(0, N)
        part = tl.load(part_ptr + i, mask=i < n_elements, other=0.0)
        store(advance(peers.rows, BUILD.rank * capacity + i, BUILD), part, i < n_elements, BUILD)
    raise_flags(ctx, 1, 0, EVERYONE, BUILD)
    wait_for_flags(ctx, 0, EVERYONE, BUILD, record)
    for block in range(program, tl.cdiv(n_elements, N), n_programs):
        i = block * N + tl.arange(0, N)
        if ADD:
            total = tl.load(x_ptr + i, mask=i < n_elements, other=0.0)
        else:
            total = tl.zeros([N], tl.float32)
        for rank in tl.static_range(N_RANKS):
            total += tl.load(peers.own_rows + rank * capacity + i, mask=i < n_elements, other=0.0)
        tl.store(x_ptr + i, total, mask=i < n_elements)
    leave_ranks(ctx, BUILD)


class Choices(NamedTuple):
    """What the experts read of a block's tokens: buffers of these names, see host.buffers.Buffers."""

    expert_in: Any
    expert_in_scale: Any
    chosen: Any
    weights: Any


class FlagPeers(NamedTuple):
    """What an exchange without values of its own knows of all ranks; see common.exchange.Peers."""

    flags: Any
    own_flags: Any
    epoch: Any


@triton.jit(do_not_specialize=["n_tokens", "n_programs"])
def hand_out_kernel(
    own, theirs, s, n_tokens, n_programs, peers, WIDTHS: tl.constexpr, N: tl.constexpr, BUILD: tl.constexpr
):
    """Copy this rank's Choices of n_tokens tokens to those of each rank with experts, and raise its flag there.

    WIDTHS: elements of each field for a token. All programs are resident.
    """
    EXPERT_RANKS: tl.constexpr = BUILD.expert_ranks
    N_FIELDS: tl.constexpr = len(WIDTHS)
    N_RECEIVERS: tl.constexpr = len(EXPERT_RANKS)
    program = tl.program_id(0)
    for field in tl.static_range(N_FIELDS):
        n_elements = n_tokens * WIDTHS[field]
        for block in range(program, tl.cdiv(n_elements, N), n_programs):
            i = block * N + tl.arange(0, N)
            value = tl.load(own[field] + i, mask=i < n_elements)
            for receiver in tl.static_range(N_RECEIVERS):
                tl.store(theirs[receiver][field] + i, value, mask=i < n_elements)
    ctx = Context((), s, 0, 0, 0, 0, program, n_programs, (), peers)
    raise_flags(ctx, 1, 0, EXPERT_RANKS, BUILD)
    leave_ranks(ctx, BUILD)


@triton.jit(do_not_specialize=["record"])
def await_kernel(s, peers, record, FROM: tl.constexpr, BUILD: tl.constexpr):
    """Wait, as one program, until the ranks FROM have raised their flags; later launches see what they stored."""
    wait_for_flags(Context((), s, 0, 0, 0, 0, 0, 1, (), peers), 0, FROM, BUILD, record)


@triton.jit
def announce_kernel(s, peers, TO: tl.constexpr, BUILD: tl.constexpr):
    """Raise, as one program, this rank's flag at the ranks TO, behind all that earlier launches stored."""
    ctx = Context((), s, 0, 0, 0, 0, 0, 1, (), peers)
    raise_flags(ctx, 1, 0, TO, BUILD)
    leave_ranks(ctx, BUILD)


@triton.jit(do_not_specialize=DYNAMIC)
def keep_own_kernel(chosen_ptr, n_pairs, FIRST: tl.constexpr, END: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """chosen = E, which is no expert, for pairs with an expert below FIRST or from END on."""
    pair = tl.program_id(0) * N + tl.arange(0, N)
    expert = tl.load(chosen_ptr + pair, mask=pair < n_pairs, other=0)
    tl.store(chosen_ptr + pair, tl.where((expert >= FIRST) & (expert < END), expert, E), mask=pair < n_pairs)


class RankPrefill(Prefill):
    """One rank's launches for blocks of a prompt."""

    def __init__(self, model, rank):
        """model: multi_gpu.ranks.RankModel, whose heap has the buffers. rank: multi_gpu.ranks.Rank of this process."""
        build = dataclasses.replace(rank.build, config=rank.config.compiled(), top_k=None)
        super().__init__(rank.config, build, model.blocks, rank.weights, rank.own_state, model.max_context)
        self._model, self._rank = model, rank
        self.n_exchanges = 0  # of this block, which all ranks count alike

    def launches(self, position: int, n: int) -> Iterator[Launch]:
        self.n_exchanges = 0
        return super().launches(position, n)

    def _next_exchange(self) -> tuple[FlagPeers, int]:
        """Return the next exchange's flags and epoch, and what a wait for it records if it gives up."""
        index = self.n_exchanges
        self.n_exchanges += 1
        flags = self._model.buffers["flags"]
        epoch = epoch_after(self._model.epoch, EPOCH_STEP * index - 1)
        return FlagPeers(flags, flags[self._rank.share.rank], epoch), FIRST_RECORD + index


class SharePrefill(RankPrefill):
    """The launches of a rank with a part of each matrix, layout "tp". All ranks take the same steps."""

    def __init__(self, model, rank):
        super().__init__(model, rank)
        h = self.config.hidden_size
        self._part = torch.zeros(self.tokens, h, device=rank.own_state.x.device)
        self._no_bias = torch.zeros_like(rank.weights.o_bias)
        # The experts' outputs come through the exchange, so that the norm adds none.
        self._norm_config = dataclasses.replace(self.compiled_config, experts_per_token=0)
        self._turn = 0

    def _embed(self, position: int, n: int) -> Iterator[Launch]:
        arguments = (self.state.tokens, self.weights.embed, self._part, position)
        yield embed_share_kernel, (n,), arguments, {"BUILD": self.build}
        yield self._exchange(n, add=False)

    def _attention_norm(self, layer: int, n: int) -> Launch:
        kernel, grid, arguments, options = super()._attention_norm(layer, n)
        return kernel, grid, arguments, options | {"CONFIG": self._norm_config}

    def _project(self, layer: int, n: int) -> Iterator[Launch]:
        kernel, grid, arguments, options = self._dense(self.build.o, self._part, layer, n)
        if self._rank.share.rank > 0:  # the bias is added once
            arguments = (*arguments[:2], self._no_bias, *arguments[3:])
        yield kernel, grid, arguments, options
        yield self._exchange(n, add=True)

    def _experts(self, layer: int, n: int) -> Iterator[Launch]:
        yield from super()._experts(layer, n)
        yield sum_experts_kernel, (n,), (self.buffers.expert_out, self._part), {"BUILD": self.build}
        yield self._exchange(n, add=True)

    def _exchange(self, n: int, add: bool) -> Launch:
        """Add all ranks' parts to the residual, or make them the residual."""
        model, rank, h = self._model, self._rank, self.config.hidden_size
        rows = model.buffers[f"rows {self._turn % SETS}"]
        self._turn += 1
        flags, record = self._next_exchange()
        peers = RowPeers(rows, rows[rank.share.rank], *flags)
        arguments = (
            self._part,
            self.buffers.x,
            rank.own_state,
            n * h,
            self.tokens * h,
            model.num_programs,
            peers,
            record,
        )
        options = {"ADD": add, "N": BLOCK, "BUILD": self.build, **rank.tuning.options()}
        return exchange_rows_kernel, model.grid, arguments, options


class AttentionPrefill(RankPrefill):
    """The launches of the rank with attention and router, layout "roles"; ranks with experts store its expert_out."""

    holds_experts = True  # the others say

    def __init__(self, model, rank):
        super().__init__(model, rank)
        self.buffers = self.buffers._replace(expert_out=model.buffers["prompt expert_out"][0])

    def _experts(self, layer: int, n: int) -> Iterator[Launch]:
        model, rank, state = self._model, self._rank, self._rank.own_state
        launches = super()._experts(layer, n)
        yield next(launches)  # norm
        yield next(launches)  # router
        own = Choices(*(getattr(self.buffers, name) for name in Choices._fields))
        theirs = tuple(choices_at(model, number) for number in self.build.expert_ranks)
        widths = tuple(buffer.shape[1] if buffer.dim() > 1 else 1 for buffer in own)
        flags, _ = self._next_exchange()
        arguments = (own, theirs, state, n, model.num_programs, flags)
        options = {"WIDTHS": widths, "N": BLOCK, "BUILD": self.build, **rank.tuning.options()}
        yield hand_out_kernel, model.grid, arguments, options
        yield (
            await_kernel,
            (1,),
            (state, *self._next_exchange()),
            {"FROM": self.build.expert_ranks, "BUILD": self.build},
        )


class ExpertPrefill(RankPrefill):
    """The launches of a rank with experts, layout "roles"."""

    def __init__(self, model, rank):
        super().__init__(model, rank)
        own = choices_at(model, rank.share.rank)
        self.buffers = self.buffers._replace(**own._asdict(), expert_out=model.buffers["prompt expert_out"][0])
        n_experts, number, n_ranks = self.config.n_experts, rank.share.rank, rank.share.n_ranks - 1
        self._own_experts = range(n_experts * (number - 1) // n_ranks, n_experts * number // n_ranks)

    def launches(self, position: int, n: int) -> Iterator[Launch]:
        self.n_exchanges = 0
        for layer in range(self.config.n_layers - 1):  # the last layer's output is not needed
            yield from self._experts(layer, n)

    def _experts(self, layer: int, n: int) -> Iterator[Launch]:
        state, ranks = self._rank.own_state, self.build.attention_ranks
        n_pairs, experts = n * self.config.experts_per_token, self._own_experts
        yield await_kernel, (1,), (state, *self._next_exchange()), {"FROM": ranks, "BUILD": self.build}
        options = {"FIRST": experts.start, "END": experts.stop, "E": self.config.n_experts, "N": BLOCK}
        yield keep_own_kernel, (triton.cdiv(n_pairs, BLOCK),), (self.buffers.chosen, n_pairs), options
        launches = super()._experts(layer, n)
        next(launches)  # norm
        next(launches)  # router
        yield from launches
        flags, _ = self._next_exchange()
        yield announce_kernel, (1,), (state, flags), {"TO": ranks, "BUILD": self.build}


def choices_at(model, number: int) -> Choices:
    """Return the Choices in a rank's memory."""
    return Choices(*(model.buffers[f"prompt {name}"][number] for name in Choices._fields))


def prompt_buffers(config, tokens: int, build) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of the heap's buffers for prompts, layout "roles"."""
    shapes = buffer_shapes(config, tokens, build.is_scaled, build.machine.prompts.vector_stride)._asdict()
    return {f"prompt {name}": shapes[name] for name in (*Choices._fields, "expert_out")}


def one_by_one(launches: Sequence[Iterator[Launch]]) -> Iterator[Launch]:
    """Yield the launches of the ranks of a process, layout "roles", so that none waits for a later one.

    The first rank's go on until it hands out, then those of each rank with experts until it announces.
    """
    ends = (hand_out_kernel, announce_kernel)
    while launches:
        unfinished = []
        for rank in launches:
            launch = next(rank, None)
            while launch is not None:
                yield launch
                if launch[0] in ends:
                    unfinished.append(rank)
                    break
                launch = next(rank, None)
        launches = unfinished


class RankPrompts:
    """Feeds a prompt's blocks to the ranks of this process, as prefill.Prefill does for one GPU."""

    def __init__(self, model):
        """model: multi_gpu.ranks.RankModel."""
        self._model = model
        self._prefills = [prefill_of(model, rank) for rank in model.ranks]
        self._prepared: set[int] = set()  # lengths of blocks
        self.tokens = self._prefills[0].tokens  # of the longest block
        self.holds_experts = model.heap.all_true(all(prefill.holds_experts for prefill in self._prefills))

    def feed(self, position: int, n_tokens: int) -> None:
        """Feed the states' n_tokens tokens from `position` on into the caches, which have all earlier positions."""
        model, end = self._model, position + n_tokens
        while position < end:
            n = min(self.tokens, end - position)
            self._prepare(n)
            with compile_errors(model.device):
                for step in self._steps([prefill.launches(position, n) for prefill in self._prefills]):
                    model.run_together(step)
            model.advance_epoch(EPOCH_STEP * self._prefills[0].n_exchanges)
            position += n

    def _prepare(self, n: int) -> None:
        """Compile and load the kernels for blocks of n tokens on all ranks before any of them waits for another."""
        if self._model.device.type == "cuda" and n not in self._prepared:
            self._model.together(lambda: self._compile(n))
            self._prepared.add(n)

    def _compile(self, n: int) -> None:
        kernels = {}
        for prefill in self._prefills:
            for launch in prefill.launches(0, n):
                kernels.setdefault((launch[0].__name__, str(launch[3])), launch)
        with compile_errors(self._model.device):
            self._model.prepare(kernels.values())

    def _steps(self, launches: Sequence[Iterator[Launch]]) -> Iterator[Sequence[Launch]]:
        """Yield the launches that may wait for each other, together."""
        if self._model.layout == "tp":
            return zip(*launches, strict=True)
        return ([launch] for launch in one_by_one(launches))


def prefill_of(model, rank) -> RankPrefill:
    """Make the launches of a rank for a prompt's blocks."""
    if model.layout == "tp":
        return SharePrefill(model, rank)
    return AttentionPrefill(model, rank) if rank.share.has_attention else ExpertPrefill(model, rank)
