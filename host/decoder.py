"""One sequence on one device: the tokens that are fed, the order of launches, and whose turn it is.

Which kernels a launch runs is said by a class that derives from Decoder, such as gpt_oss_megakernel.MegaModel.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from checkpoints.checkpoint import check_unchanged
from checkpoints.config import DenseFormats, ModelConfig, check_token, checkpoint_bytes, held_formats
from common.argmax import NOT_FINITE
from common.barrier import ABORT
from common.build import Build
from host.backend import usable_device
from host.compilers import compile_errors
from host.launch import LEAST_STAGES, blocks_for, check_program_count, program_count, tuning_for
from host.limits import check_memory, context_length
from host.phases import PHASES, barrier_name
from host.state import State, new_state
from host.tuning import BlockTuning, Tuning
from host.weights import Weights, bytes_to_load, load_weights, weights_in_place
from system.arguments import boolean, function_or_none, instance, integer, integer_or_none, integers, one_of
from system.errors import InputError, LogitsNotFinite, MegakernelAborted, PositionsLost
from system.turns import LAUNCHING, Turns, exclusive


class Decoder:
    """A GPT-OSS model on one device, decoded greedily, one token a launch.

    It holds one sequence. generate and decode check their arguments when they are called and take the model when their
    first token is asked for; from then on generate, decode, step, logits, hidden, reset and switch_path end the
    sequence, and the generator raises GenerationOvertaken at its next token. Closing a generator changes nothing.

    Threads may share a model, and each may have one of its own: a use waits until another thread's is over, be it a
    call or one token of a generator. No lock is held between two tokens, nor while on_logits or on_launch run, which
    may use any model. A signal handler may not, amid a use by its thread: ModelInUse.

    Whatever ends a use early, an interrupt or an error, the next one starts clean: positions that were fed before it
    count as fed, those that it was feeding do not. PositionsLost if a token is to be fed behind them. After
    MegakernelAborted each use raises it again until reset.
    """

    _last_stream = None  # of a GPU, that any model used last

    def __init__(
        self,
        checkpoint,
        quant: bool = False,
        max_context: int | None = None,
        device: torch.device | str | None = None,
        num_programs: int | None = None,
        tuning: Tuning | None = None,
        kv_dtype: torch.dtype = torch.bfloat16,
        show_progress: bool = False,
        trace_position: int | None = None,
        weights: Weights | None = None,
        dense: DenseFormats | None = None,
        blocks: BlockTuning | None = None,
    ):
        """The context defaults to 4096 positions, or all of a model with fewer; the device to the GPU if there is one.

        dense: how the dense matrices are held that the checkpoint has in bfloat16, quantized while they are loaded; as
        they are unless said. InputError if an archive has them in another FP8 format than this says.
        blocks: how prompts are fed, see prefill.py.
        kv_dtype is float32 for comparisons without rounding. `weights` are those of another model, with the same
        checkpoint and tuning, to share. InputError if the context is longer than the model's, or it does not fit the
        device; TypeError names an argument of the wrong kind.
        """
        if not hasattr(checkpoint, "config"):
            raise TypeError(f"checkpoint must be an open one, not {type(checkpoint).__name__}; see from_pretrained")
        boolean(show_progress, "show_progress")
        for value, kind, name in (
            (tuning, Tuning, "tuning"),
            (weights, Weights, "weights"),
            (dense, DenseFormats, "dense"),
            (blocks, BlockTuning, "blocks"),
        ):
            instance(value, kind, name)
        max_context = integer_or_none(max_context, "max_context")
        num_programs = integer_or_none(num_programs, "num_programs")
        one_of(kv_dtype, (torch.bfloat16, torch.float32), "kv_dtype")
        self.config: ModelConfig = dataclasses.replace(checkpoint.config, dense=held_formats(checkpoint, dense))
        self.compiled_config = self.config.compiled()
        self.device = usable_device(device)
        self.quant = boolean(quant, "quant")
        self.max_context = context_length(self.config, max_context)
        self.trace_position = integer_or_none(trace_position, "trace_position", least=0)
        if self.trace_position is not None and self.trace_position >= self.max_context:
            raise InputError(f"trace_position {trace_position}: the context has {self.max_context} positions")
        self.tuning = tuning or tuning_for(self.device, self.config)
        self.num_programs = program_count(self.device, self.tuning) if num_programs is None else num_programs
        check_program_count(self.num_programs, self.device, self.tuning)
        self.grid = (self.num_programs,)
        self.blocks = blocks or blocks_for(self.device)
        needed = bytes_to_load(checkpoint, self.config, self.device, self.tuning) if weights is None else 0
        check_memory(self.config, self.max_context, kv_dtype, self.device, needed)
        start = time.perf_counter()
        # Weights that stay in a mapped file are as good as that file.
        in_place = weights_in_place(checkpoint, self.config, self.device, self.tuning)
        self._mapped = checkpoint if in_place else None
        self.weights = weights or load_weights(checkpoint, self.config, self.device, self.tuning, show_progress)
        self.load_seconds = time.perf_counter() - start
        self.checkpoint_bytes = checkpoint_bytes(checkpoint.config)
        self.kv_dtype = kv_dtype
        self.turns = Turns()
        self._start()

    def _start(self) -> None:
        """A new sequence in new memory."""
        self._started = False
        self.state = self.prefill = None  # before the new ones need their memory
        self.n_fed = 0  # positions that the cache holds, whose tokens are the first of state.tokens
        self._feeding: range | None = None  # positions whose launches have begun and not ended
        self._lost = 0  # so far the cache may hold anything behind n_fed, left by launches that did not end; 0: nowhere
        self.state = self._new_state(self.kv_dtype)
        self._build()
        self.prefill = self._new_prefill()
        with compile_errors(self.device):
            self._compile()
        self._check_barriers()
        self._started = True

    def _build(self) -> None:
        """What kernels are compiled for."""
        self.build = Build(self.compiled_config, self.tuning, self.quant)
        self.traced_build = Build(self.compiled_config, self.tuning, self.quant, trace=True)

    def _compile(self) -> None:
        """Launch without layers: shows that the programs can be resident before anyone waits.

        What attention needs of shared memory, more with a float32 cache or wide heads, is taken from the ring.
        """
        while missing := self._missing_shared_memory():
            ring = self.tuning.ring
            stages = ring.stages - -(-missing // ring.stage_bytes) if ring else 0
            if stages < LEAST_STAGES:
                raise InputError(f"{self.device} has too little shared memory for this model")
            distance = min(ring.prefetch_distance, stages)
            ring = dataclasses.replace(ring, stages=stages, prefetch_distance=distance)
            self.tuning = dataclasses.replace(self.tuning, ring=ring)
            self._build()

    def _missing_shared_memory(self) -> int:
        """Bytes that the kernel needs beyond what there is."""
        try:
            for position in {0, self.trace_position or 0}:
                self._run(range(0), self._launch, position, n_layers=0)
        except OutOfResources as error:
            return error.required - error.limit
        return 0

    def load_rate(self) -> str:
        """One line: bytes of the weights as the checkpoint has them, and what loading took, packing included."""
        gigabytes = self.checkpoint_bytes / 1e9
        return f"weights: {gigabytes:.3f} GB in {self.load_seconds:.2f} s, {gigabytes / self.load_seconds:.2f} GB/s"

    @exclusive
    def reset(self) -> None:
        """Forget all positions, and a barrier that gave up."""
        self._take()
        s, self.n_fed = self.state, 0
        self._feeding = range(self.max_context)  # an interrupt may leave some
        for tensor in (s.k_cache, s.v_cache, s.split_arrivals, s.sync):
            tensor.zero_()
        self._feeding, self._lost = None, 0

    @exclusive
    def switch_path(self, quant: bool) -> None:
        """Go on with the quantized or the default path: the same weights, a new state."""
        quant = boolean(quant, "quant")
        self._take()
        self._started, self.quant = False, quant
        self._start()

    def _take(self) -> int:
        """Begin a use of the model, which ends the generation before it, and put right what an unfinished one left."""
        turn = self.turns.take()
        if not self._started:
            self._start()
        self._follow_stream()
        if self._feeding is not None:
            self.n_fed = min(self.n_fed, self._feeding.start)
            self._lost = max(self._lost, self._feeding.stop)
            self.state.sync[: ABORT.value] = 0  # arrivals of programs that were stopped
            self.state.split_arrivals.zero_()
            self._feeding = None
        return turn

    def _go_on(self, turn: int) -> None:
        """Go on with a generation. GenerationOvertaken if the model has been put to another use."""
        self.turns.check(turn)
        self._follow_stream()

    def _follow_stream(self) -> None:
        """What this thread queues on a GPU from now on runs behind all that models queued before, on any stream.

        Two kernels whose programs wait for each other must not share the GPU.
        """
        if self.device.type == "cuda":
            with LAUNCHING:
                stream, last = torch.cuda.current_stream(), Decoder._last_stream
                if last is not None and last != stream:
                    stream.wait_stream(last)
                Decoder._last_stream = stream

    def _new_state(self, kv_dtype: torch.dtype) -> State:
        barriers = 2 + len(PHASES) * self.config.n_layers
        return new_state(
            self.config,
            self.tuning,
            self.quant,
            self.max_context,
            self.num_programs,
            self.device,
            kv_dtype,
            trace_events=0 if self.trace_position is None else 2 + 2 * barriers,
        )

    @exclusive
    def step(self, token_id: int, position: int) -> int:
        """Feed a token at a position whose predecessors were fed; returns the most likely next token.

        InputError if the logits are not finite, the position lies outside the context or the token outside the
        vocabulary; TypeError if they are no integers.
        """
        token_id, position = self._placed(token_id, position)
        self._take_at(token_id, position)
        self._feed(position, token=True)
        return self._token(self.state.tokens[position + 1], position)

    @exclusive
    def logits(self, token_id: int, position: int) -> torch.Tensor:
        """The same, but returns the next token's logits, float32 [vocab], a copy on the model's device."""
        token_id, position = self._placed(token_id, position)
        self._take_at(token_id, position)
        return self._feed_for_logits(position)

    @exclusive
    def hidden(self, token_id: int, position: int, n_layers: int) -> torch.Tensor:
        """The same, but returns the residual stream after the first n_layers, float32 [hidden], a copy."""
        n_layers = integer(n_layers, "n_layers")
        if not 0 <= n_layers <= self.config.n_layers:
            raise InputError(f"n_layers {n_layers}: the model has {self.config.n_layers}")
        token_id, position = self._placed(token_id, position)
        self._take_at(token_id, position)
        self._run(range(position, position + 1), self._launch, position, n_layers=n_layers)
        self._check_barriers()
        return functools.reduce(torch.add, self.state.expert_out, self.state.x)

    def generate(
        self,
        prompt_ids: Iterable[int],
        max_new_tokens: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[int]:
        """Yield the ids that follow the prompt, a stop id last. Ends early when the context is full.

        What the prompt has in common with the sequence before it, such as a chat's earlier turns, is not fed again. The
        rest is fed in blocks (prefill.py), but for its last token. `on_logits` receives the logits, float32 [vocab], of
        each position of the prompt and the answer, for which all are fed one by one: a copy on the model's device.

        Raises what step does; GenerationOvertaken if the model was used otherwise since the last token. InputError if
        weights lie in a mapped file, which a CPU's may, that was changed since it was opened.
        """
        prompt_ids = integers(prompt_ids, "prompt_ids")
        max_new_tokens = integer(max_new_tokens, "max_new_tokens", least=0)
        function_or_none(on_logits, "on_logits")
        if not prompt_ids:
            raise InputError("the prompt is empty")
        self._check_fit(prompt_ids, 0)
        return self._generate(prompt_ids, max_new_tokens, on_logits)

    def _generate(
        self, prompt_ids: list[int], max_new_tokens: int, on_logits: Callable[[torch.Tensor], None] | None
    ) -> Iterator[int]:
        check_unchanged(self._mapped)
        last = len(prompt_ids) - 1
        turn = self._begin(prompt_ids, in_blocks=on_logits is None)
        if on_logits:
            for position in range(last):
                on_logits(self._next_logits(turn, position))
        for token in self._decode(turn, last, min(last + max_new_tokens, self.max_context), on_logits):
            check_unchanged(self._mapped)
            yield token
            if token in self.config.stop_ids:
                return

    @exclusive
    def _begin(self, prompt_ids: list[int], in_blocks: bool) -> int:
        """Take the model for a prompt; in_blocks: and feed all that the cache does not hold but the last token."""
        turn = self._take()
        last = len(prompt_ids) - 1
        held = min(self._held(prompt_ids), last) if in_blocks else 0
        self._write_tokens(prompt_ids[held:], held)
        if not in_blocks:
            return turn
        if last - held < self.blocks.least_tokens or not self.prefill.holds_experts:
            for position in range(held, last):
                self._feed(position)
        else:
            self._run(range(held, last), self.prefill.feed, held, last - held)
            self._fed(last)
        return turn

    def _held(self, token_ids: list[int]) -> int:
        """How many of these tokens the cache holds: the first ones that it has in common with them."""
        held = self.state.tokens[: min(self.n_fed, len(token_ids))].tolist()
        return next((n for n, (a, b) in enumerate(zip(held, token_ids)) if a != b), len(held))

    def decode(
        self, token_id: int, position: int, n_tokens: int, on_launch: Callable[[], None] | None = None
    ) -> Iterator[int]:
        """Feed a token at a position whose predecessors are in the cache and yield the n_tokens ids that follow.

        Stop ids end nothing; a full context does. `on_launch` is called after each launch, which a GPU may only have
        queued: events recorded there mark where it ends. Raises what generate does.
        """
        token_id, position = self._placed(token_id, position)
        n_tokens = integer(n_tokens, "n_tokens", least=0)
        function_or_none(on_launch, "on_launch")
        return self._decode_from(token_id, position, n_tokens, on_launch)

    def _decode_from(
        self, token_id: int, position: int, n_tokens: int, on_launch: Callable[[], None] | None
    ) -> Iterator[int]:
        turn = self._begin_at(token_id, position)
        yield from self._decode(turn, position, min(position + n_tokens, self.max_context), on_launch=on_launch)

    @exclusive
    def _begin_at(self, token_id: int, position: int) -> int:
        return self._take_at(token_id, position)

    def _decode(
        self,
        turn: int,
        start: int,
        end: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
        on_launch: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Launch positions start .. end - 1, each on the token before it, and yield their tokens.

        On a GPU the next launch is queued before a token is read back, so that the device never waits for the host.
        """
        ahead = 0 if on_logits or self.device.type == "cpu" else 1
        queued: deque[Launched] = deque()
        for position in range(start, end):
            queued.append(self._next_launch(turn, position, on_logits is not None))
            if on_launch:
                on_launch()
            if len(queued) > ahead:
                launched = queued.popleft()
                token_id = self._next_token(turn, launched)
                if on_logits:
                    on_logits(launched.logits)
                yield token_id
        while queued:
            yield self._next_token(turn, queued.popleft())

    @exclusive
    def _next_launch(self, turn: int, position: int, logits: bool) -> "Launched":
        """Feed the token at a position of a generation."""
        self._go_on(turn)
        self._feed(position, token=True, logits=logits)
        kept = self.state.logits.clone() if logits else None
        token = self.state.tokens[position + 1]
        if self.device.type == "cpu":
            return Launched(position, token.clone(), None, kept)
        pinned = torch.empty((), dtype=torch.int32, pin_memory=True)
        pinned.copy_(token, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Launched(position, pinned, copied, kept)

    def _next_token(self, turn: int, launched: "Launched") -> int:
        if launched.copied is not None:
            launched.copied.synchronize()
        return self._checked_token(turn, launched)

    @exclusive
    def _checked_token(self, turn: int, launched: "Launched") -> int:
        self._go_on(turn)
        return self._token(launched.token, launched.position)

    @exclusive
    def _next_logits(self, turn: int, position: int) -> torch.Tensor:
        self._go_on(turn)
        return self._feed_for_logits(position)

    def _check_fit(self, token_ids: list[int], position: int) -> None:
        """InputError unless positions from `position` on are in the context, and tokens in the vocabulary."""
        if position < 0 or position + len(token_ids) > self.max_context:
            raise InputError(
                f"positions {position} to {position + len(token_ids) - 1} "
                f"do not fit a context of {self.max_context} tokens"
            )
        for token_id in token_ids:
            check_token(token_id, self.config)

    def _write_tokens(self, token_ids: list[int], position: int) -> None:
        """Put tokens at positions from `position` on, still to be fed; later ones become -1, "not decoded"."""
        self._check_fit(token_ids, position)
        self.n_fed = min(self.n_fed, position)
        self.state.tokens[position:] = -1
        ids = torch.tensor(token_ids, dtype=torch.int32)
        self.state.tokens[position : position + len(token_ids)] = ids.to(self.device)

    def _placed(self, token_id: int, position: int) -> tuple[int, int]:
        """Both as int. TypeError and InputError, see step."""
        token_id, position = integer(token_id, "token_id"), integer(position, "position")
        self._check_fit([token_id], position)
        return token_id, position

    def _take_at(self, token_id: int, position: int) -> int:
        """Take the model for a token behind what was fed. PositionsLost if some of that an interrupted use has lost."""
        turn = self._take()
        if self.n_fed < min(position, self._lost):
            raise PositionsLost(
                f"position {position}: an interrupted call lost those from {self.n_fed} on; feed them again or reset()"
            )
        self._write_tokens([token_id], position)
        return turn

    def _feed(self, position: int, token: bool = False, logits: bool = False) -> None:
        """Launch a position, whose token was written, through all layers. Behind a gap the cache does not hold it."""
        self._run(range(position, position + 1), self._launch, position, token=token, logits=logits)
        if self.n_fed == position:
            self._fed(position + 1)

    def _run(self, positions: range, launch: Callable[..., None], *arguments, **options) -> None:
        """Launch what feeds these positions."""
        self._feeding = positions
        with LAUNCHING:
            self._follow_stream()
            launch(*arguments, **options)
        self._feeding = None

    def _fed(self, n: int) -> None:
        """The cache holds the first n positions; on a GPU, for what is launched from now on."""
        self.n_fed = n
        if n >= self._lost:
            self._lost = 0

    def _feed_for_logits(self, position: int) -> torch.Tensor:
        self._feed(position, logits=True)
        self._check_barriers()
        if int(self.state.head_index.min()) < 0:
            raise LogitsNotFinite(position)
        return self.state.logits.clone()

    def _token(self, token: torch.Tensor, position: int) -> int:
        """What the launch of a position left."""
        token_id = int(token)
        if token_id == NOT_FINITE.value:
            raise LogitsNotFinite(position)
        if token_id < 0:
            self._check_barriers()
            raise RuntimeError("the kernel ended without a token and without an abort record")
        return token_id

    def _check_barriers(self) -> None:
        barrier = int(self.state.sync[ABORT.value])
        if barrier:
            raise MegakernelAborted(
                f"a program did not arrive at the barrier after {barrier_name(barrier, self.config.n_layers)}; "
                "call reset() before the next step"
            )


class Launched(NamedTuple):
    """A position that a generation has fed, and what becomes of it."""

    position: int
    token: torch.Tensor  # [] int32, on the host
    copied: torch.cuda.Event | None  # when it is there; None: it is
    logits: torch.Tensor | None
