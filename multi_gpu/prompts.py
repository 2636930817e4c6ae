"""Feed a prompt in blocks where several GPUs share each matrix, layout "tp": prefill.py's launches, and exchanges."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from common.barrier import leave_grid
from common.context import Context
from common.exchange import advance, raise_flags, store, wait_for_flags
from host.compilers import compile_errors
from multi_gpu.protocol import EPOCH_STEP, epoch_after
from prefill import DYNAMIC, Launch, Prefill

BLOCK = 1024  # elements that a program exchanges at a time
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


@triton.jit(do_not_specialize=["n_elements", "capacity", "n_programs"])
def exchange_rows_kernel(
    part_ptr, x_ptr, s, n_elements, capacity, n_programs, peers, ADD: tl.constexpr, N: tl.constexpr, BUILD: tl.constexpr
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
    raise_flags(ctx, 1, 1, EVERYONE, BUILD)
    wait_for_flags(ctx, 1, EVERYONE, BUILD)
    for block in range(program, tl.cdiv(n_elements, N), n_programs):
        i = block * N + tl.arange(0, N)
        if ADD:
            total = tl.load(x_ptr + i, mask=i < n_elements, other=0.0)
        else:
            total = tl.zeros([N], tl.float32)
        for rank in tl.static_range(N_RANKS):
            total += tl.load(peers.own_rows + rank * capacity + i, mask=i < n_elements, other=0.0)
        tl.store(x_ptr + i, total, mask=i < n_elements)
    MACHINE: tl.constexpr = BUILD.machine
    leave_grid(s.sync, n_programs, MACHINE)


class SharePrefill(Prefill):
    """One rank's launches for blocks of a prompt. All ranks take the same steps."""

    def __init__(self, model, rank):
        """model: multi_gpu.ranks.RankModel, whose heap has the rows. rank: multi_gpu.ranks.Rank of this process."""
        super().__init__(rank.config, rank.build, model.blocks, rank.weights, rank.own_state)
        self._model, self._rank = model, rank
        h = self.config.hidden_size
        self._part = torch.zeros(self.tokens, h, device=rank.own_state.x.device)
        self._no_bias = torch.zeros_like(rank.weights.o_bias)
        # The experts' outputs come through the exchange, so that the norm adds none.
        self._norm_config = dataclasses.replace(self.compiled_config, experts_per_token=0)
        self._turn = 0
        self.n_exchanges = 0  # of this block

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
        flags = rank.peers.flags
        epoch = epoch_after(model.epoch, EPOCH_STEP * self.n_exchanges - 1)
        peers = RowPeers(rows, rows[rank.share.rank], flags, flags[rank.share.rank], epoch)
        self.n_exchanges += 1
        arguments = (self._part, self.buffers.x, rank.own_state, n * h, self.tokens * h, model.num_programs, peers)
        options = {"ADD": add, "N": BLOCK, "BUILD": self.build, **rank.tuning.options()}
        return exchange_rows_kernel, model.grid, arguments, options


class RankPrompts:
    """Feeds a prompt's blocks to the ranks of this process, as prefill.Prefill does for one GPU."""

    def __init__(self, model):
        """model: multi_gpu.ranks.RankModel."""
        self._model = model
        self._prefills = [SharePrefill(model, rank) for rank in model.ranks]
        self.holds_experts = model.heap.all_true(all(prefill.holds_experts for prefill in self._prefills))

    def feed(self, position: int, n_tokens: int) -> None:
        """Feed the states' n_tokens tokens from `position` on into the caches, which have all earlier positions."""
        model, end = self._model, position + n_tokens
        while position < end:
            n = min(self._prefills[0].tokens, end - position)
            with compile_errors(model.device):
                for step in zip(*(prefill.launches(position, n) for prefill in self._prefills), strict=True):
                    model.run_together(step)
            model.advance_epoch(EPOCH_STEP * self._prefills[0].n_exchanges)
            for prefill in self._prefills:
                prefill.n_exchanges = 0
            position += n
