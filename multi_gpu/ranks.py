"""A model on several GPUs: what each rank holds and launches. multi_gpu/protocol.py describes the layouts."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

import interpreter
from checkpoints.config import FP8_GROUPS, MXFP4_GROUP, ModelConfig
from common.barrier import ABORT
from common.build import Build
from common.exchange import LINE_WORDS, RANK_UNIT, Peers, RolePeers
from gpt_oss_megakernel import MegaModel, megakernel
from host.launch import tuning_for, with_shorter_ring
from host.limits import check_memory
from host.phases import PHASES, barrier_name
from host.state import State, new_state
from host.tuning import Tuning
from host.weights import Weights, bytes_to_load, load_weights
from multi_gpu.checkpoint import ShareCheckpoint
from multi_gpu.group import Group
from multi_gpu.heap import Buffer, Heap, aligned
from multi_gpu.prompts import FIRST_RECORD, SETS, RankPrompts, prompt_buffers
from multi_gpu.protocol import FIRST_EPOCH, LAST_EPOCH, Share, epoch_after, exchanges_of, shares_of
from multi_gpu.rank_kernel import attention_rank_kernel, expert_rank_kernel
from prefill import Launch, block_tokens
from system.errors import InputError, MegakernelAborted

# Fields of State that other ranks write, by layout: they lie in the heap.
TP_FIELDS = ("x", "head_value", "head_index", "logits")
PACKETS = ("o_packets", "down_packets")
ROLE_FIELDS = ("expert_in", "expert_in_scale", "router_logits", "expert_out", "tokens")


@dataclasses.dataclass
class Rank:
    """One rank of a model, in this process."""

    share: Share
    config: ModelConfig
    tuning: Tuning
    weights: Weights
    build: Build | None = None
    state: State | None = None  # as the rank's kernels take it: buffers of other ranks are pointers
    own_state: State | None = None
    peers: Any = None


class RankModel(MegaModel):
    """A model whose ranks run on several GPUs, of which this process has one; on a CPU it has all of them.

    Its interface is Decoder's. All processes call the same methods with the same arguments, and get the same tokens.
    """

    def __init__(
        self,
        checkpoint,
        layout: str,
        n_ranks: int,
        ranks: Sequence[int],
        open_heap: Callable[[int], Heap],
        quant: bool = False,
        together: Callable[[Callable], Any] = lambda call: call(),
        **options,
    ):
        """Load the shares of `ranks`, those of this process.

        open_heap: opens a heap with room for so many bytes of buffers on each rank.
        together: calls a function and raises on all ranks what it raises on one. Options are those of Decoder,
        without `weights`, `tuning` and `trace_position`. Raise InputError if the layout does not exist for so many
        ranks or cannot split this model, and what Decoder raises.
        """
        self.layout, self.together = layout, together
        self.shares = shares_of(checkpoint.config, layout, n_ranks)
        self._rank_numbers, self._open_heap = tuple(ranks), open_heap
        self.heap: Heap | None = None
        self.buffers: dict[str, tuple[Buffer, ...]] = {}
        self.epoch = FIRST_EPOCH  # what the next launch's exchanges count from
        super().__init__(checkpoint, quant, **options)

    @classmethod
    def of_group(cls, group: Group, checkpoint, layout: str, quant: bool, **options) -> "RankModel":
        """Load this process's ranks of a group. Raise InputError on all ranks if one cannot."""
        return cls(
            checkpoint,
            layout,
            group.n_ranks,
            group.ranks,
            group.open_heap,
            quant,
            together=group.together,
            device=group.device,
            **options,
        )

    def _new_seed(self) -> int:
        """Return a seed for an answer. Raise InputError if other processes would draw with another one."""
        if len(self.ranks) < len(self.shares):
            raise InputError("seed: None would be another one in each process, so that their answers would differ")
        return super()._new_seed()

    # ------------------------------------------------------------ loading

    def _load(self, checkpoint, show_progress: bool) -> Weights:
        return self.together(lambda: self._load_ranks(checkpoint, show_progress))

    def _load_ranks(self, checkpoint, show_progress: bool) -> Weights:
        self._check_groups()
        self.ranks = []
        for number in self._rank_numbers:
            part = ShareCheckpoint(checkpoint, self.shares[number], self.config.dense)
            tuning = tuning_for(self.device, part.config)
            needed = bytes_to_load(part, part.config, self.device, tuning)
            check_memory(part.config, self.max_context, self.kv_dtype, self.device, needed)
            weights = load_weights(part, part.config, self.device, tuning, show_progress)
            self.ranks.append(Rank(self.shares[number], part.config, tuning, weights))
        return self.ranks[0].weights

    def _check_groups(self) -> None:
        """Raise InputError if a rank's query heads end within a scale group of the O projection."""
        for share in self.shares:
            if self.config.dense.o == FP8_GROUPS and len(share.heads) * self.config.head_dim % MXFP4_GROUP:
                raise InputError(f"--layout {self.layout}: {len(share.heads)} heads are no whole scale groups of o")

    # ------------------------------------------------------------ memory

    def _new_state(self) -> State:
        self._allocate()
        for rank in self.ranks:
            self._connect(rank)
        return self.ranks[0].own_state

    def states(self) -> Sequence[State]:
        return [rank.own_state for rank in self.ranks]

    def _state_of(self, share: Share, config: ModelConfig, tuning: Tuning, device) -> State:
        """Return a rank's state with fields of its own sizes."""
        context = self.max_context if share.has_attention else 1
        return new_state(config, tuning, self.quant, context, self.num_programs, device, self.kv_dtype)

    def _allocate(self) -> None:
        """Allocate the buffers that other ranks write, once for both paths, as the heap takes nothing back."""
        if self.heap is None:
            specs = dict.fromkeys(spec for quant in (False, True) for spec in self._buffer_specs(quant))
            n_bytes = sum(aligned(math.prod(shape) * dtype.itemsize) for _, shape, dtype in specs)
            self.heap = self._open_heap(n_bytes)
            self._allocated = {spec: self.heap.zeros(*spec[1], dtype=spec[2]) for spec in specs}
        self.buffers = {spec[0]: self._allocated[spec] for spec in self._buffer_specs(self.quant)}

    def _buffer_specs(self, quant: bool) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Return (name, shape, dtype) of each buffer of the heap that a path uses."""
        n, config, programs = len(self.shares), self.config, self.num_programs
        hidden, top_k = config.hidden_size, config.experts_per_token
        if self.layout == "tp":
            f32, i32, i64 = torch.float32, torch.int32, torch.int64
            shapes = {
                "x": ((hidden,), f32),
                "o_packets": ((n, hidden), i64),
                "down_packets": ((n, top_k, hidden), i64),
                "head_value": ((n * programs,), f32),
                "head_index": ((n * programs,), i32),
                "logits": ((config.vocab_size,), f32),
            }
            tokens = block_tokens(config, self.blocks, self.max_context)
            shapes |= {f"rows {turn}": ((n, tokens, hidden), f32) for turn in range(SETS)}
        else:
            whole = new_state(config, self.tuning, quant, self.max_context, programs, "meta")
            shapes = {name: (tuple(getattr(whole, name).shape), getattr(whole, name).dtype) for name in ROLE_FIELDS}
            tokens = block_tokens(config, self.blocks, self.max_context)
            shapes |= prompt_buffers(config, tokens, Build(config.compiled(), self.tuning, quant))
        shapes["flags"] = ((n, LINE_WORDS.value), torch.int32)
        return [(name, *spec) for name, spec in shapes.items()]

    def _connect(self, rank: Rank) -> None:
        """Make a rank's state, and what its launches know of the others."""
        share, number = rank.share, rank.share.rank
        state = self._state_of(share, rank.config, rank.tuning, self.device)
        fields = TP_FIELDS if self.layout == "tp" else ROLE_FIELDS
        rank.own_state = state._replace(**{name: self.buffers[name][number] for name in fields})
        flags = self.buffers["flags"]
        if self.layout == "tp":
            rank.state = rank.own_state
            rank.peers = Peers(
                **{name: self.buffers[name] for name in TP_FIELDS + PACKETS},
                flags=flags,
                own_flags=flags[number],
                epoch=0,
            )
        else:
            self._connect_role(rank)

    def _connect_role(self, rank: Rank) -> None:
        number, buffers = rank.share.rank, self.buffers
        targets = range(1, len(self.shares)) if number == 0 else (number,)
        inputs = tuple(
            rank.own_state._replace(
                **{name: buffers[name][target] for name in ("expert_in", "expert_in_scale", "router_logits")}
            )
            for target in targets
        )
        first = self._first_expert(number) * self.config.hidden_size
        out = rank.own_state.expert_out if number == 0 else offset(buffers["expert_out"][0], first)
        rank.state = inputs[0]._replace(expert_out=out)
        rank.peers = RolePeers(inputs, buffers["tokens"], buffers["flags"], buffers["flags"][number], 0)

    # ------------------------------------------------------------ launches

    def _build(self) -> None:
        for rank in self.ranks:
            share, config = rank.share, rank.config
            if self.layout == "tp":
                roles = {"n_ranks": share.n_ranks, "rank": share.rank, "first_row": share.vocabulary.start}
            elif share.has_attention:
                roles = {"n_expert_ranks": share.n_ranks - 1, "has_experts": False}
            else:
                ends = self._first_expert(share.rank), self._first_expert(share.rank + 1)
                config = dataclasses.replace(config, experts_per_token=ends[1] - ends[0])
                chosen = self.config.experts_per_token
                roles = {"rank": share.rank, "has_attention": False, "top_k": chosen, "first_expert": ends[0]}
            rank.build = Build(config.compiled(), rank.tuning, self.quant, **roles)
        self.build = self.traced_build = self.ranks[0].build

    @property
    def n_readers(self) -> int:
        """GPUs that read a token's weights at the same time."""
        return len(self.shares) if self.layout == "tp" else 1

    def _first_expert(self, number: int) -> int:
        """Return the rank of the first chosen expert that a GPU with experts has; layout roles."""
        return (number - 1) * self.config.experts_per_token // (len(self.shares) - 1)

    def _new_prefill(self) -> RankPrompts:
        return RankPrompts(self)

    def _launch(self, position: int, token: bool = False, logits: bool = False, n_layers: int | None = None) -> None:
        n_layers = self.config.n_layers if n_layers is None else n_layers
        self.run_together([self._launch_of(rank, position, token, logits, n_layers) for rank in self.ranks])
        self.advance_epoch(2 + len(PHASES) * n_layers)

    def advance_epoch(self, n_numbers: int) -> None:
        """Go on to the epoch behind a launch whose exchanges have numbers up to n_numbers; begin anew in time."""
        self.epoch = epoch_after(self.epoch, n_numbers)
        if self.epoch > LAST_EPOCH:
            self._lower_all_flags()

    def _lower_all_flags(self) -> None:
        """Begin with the first epoch anew. No rank clears what another one may still wait for or send."""
        self.together(self._finish_launches)
        self.together(self._lower_flags)
        self.epoch = FIRST_EPOCH

    def _finish_launches(self) -> None:
        for rank in self.ranks:
            int(rank.own_state.sync[0])

    def _lower_flags(self) -> None:
        for rank in self.ranks:
            for name in ("flags", *PACKETS):
                if name in self.buffers:
                    self.buffers[name][rank.share.rank].zero_()
        self._finish_launches()

    def run_together(self, launches: Sequence[Launch]) -> None:
        """Launch a kernel of each rank of this process; they may wait for each other."""
        if self.device.type == "cpu":
            interpreter.launch_together(launches)
            return
        for kernel, grid, arguments, options in launches:
            kernel[grid](*arguments, **options)

    def _launch_of(self, rank: Rank, position: int, token: bool, logits: bool, n_layers: int) -> Launch:
        """Return a rank's launch for a position."""
        w, s, build, peers = rank.weights, rank.state, rank.build, rank.peers._replace(epoch=self.epoch)
        options = rank.tuning.options()
        where = (position, int(token), int(logits), n_layers, self.max_context, self.num_programs)
        if self.layout == "tp":
            block_p = triton.next_power_of_2(len(self.shares) * self.num_programs)
            return megakernel, self.grid, (w, s, *where, build, block_p, peers), options
        if rank.share.has_attention:
            constants = {
                "BUILD": build,
                "BLOCK_P": triton.next_power_of_2(self.num_programs),
            }
            return attention_rank_kernel, self.grid, (w, s, *where, peers), constants | options
        arguments = (w, s, int(token), n_layers, self.num_programs, peers)
        return expert_rank_kernel, self.grid, arguments, {"BUILD": build} | options

    def _compile(self) -> None:
        if self.device.type == "cuda":
            self.together(self._fit_rings)
        super()._compile()

    def reset(self) -> None:
        """Forget all positions, and the record of a launch that gave up. See Decoder.reset."""
        super().reset()
        self._lower_all_flags()  # a launch that gave up has raised those that it waited for

    def _token(self, token: torch.Tensor, position: int) -> int:
        if len(self.ranks) > 1:  # the token is the first rank's, which may have had no part in the launch
            self._check_barriers()
        return super()._token(token, position)

    def _fit_rings(self) -> None:
        """Compile and load this process's kernels, with rings as long as shared memory allows."""
        for rank in self.ranks:
            while missing_bytes := self._missing_bytes_of(rank):
                rank.tuning = with_shorter_ring(rank.tuning, missing_bytes, self.device)
                self._build()

    def _missing_bytes_of(self, rank: Rank) -> int:
        """Return the bytes of shared memory that a rank's kernel lacks, 0 if it fits."""
        try:
            self.prepare([self._launch_of(rank, 0, False, False, 0)])
        except OutOfResources as error:
            return error.required - error.limit
        return 0

    @staticmethod
    def prepare(launches: Iterable[Launch]) -> None:
        """Compile and load kernels, as no rank may wait while another one compiles."""
        for kernel, grid, arguments, options in launches:
            kernel.warmup(*arguments, grid=grid, **options)._init_handles()

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Raise MegakernelAborted for a KeyboardInterrupt in the body if a launch has missed a rank.

        When a process dies, torchrun interrupts the others, whose launches wait for it until they give up.
        """
        try:
            yield
        except KeyboardInterrupt:
            self._check_barriers()
            raise

    def _check_barriers(self) -> None:
        for rank in self.ranks:
            record = int(rank.own_state.sync[ABORT.value])
            if record:
                missing, barrier = divmod(record, RANK_UNIT.value)
                who = f"rank {missing - 1}" if missing else f"a program of rank {rank.share.rank}"
                raise MegakernelAborted(
                    f"{who} did not arrive behind {self._place(barrier)} (rank {rank.share.rank} waited for it)"
                )

    def _place(self, number: int) -> str:
        """Return the name of the phase that a wait's record means."""
        if number < FIRST_RECORD:
            return barrier_name(number, self.config.n_layers)
        exchanges = exchanges_of(self.layout, len(self.shares), self.config.n_layers, want_head=False)
        exchange, layer = exchanges[number - FIRST_RECORD]
        return f"the {exchange.name}{'' if layer is None else f' of layer {layer}'} of a prompt's block"


def offset(buffer: Buffer, n_elements: int) -> Buffer:
    """Return a buffer without its first elements."""
    if isinstance(buffer, torch.Tensor):
        return buffer.view(-1)[n_elements:]
    return dataclasses.replace(buffer, address=buffer.address + n_elements * buffer.dtype.itemsize)
