"""Decode one sequence on one device: feed its tokens, order the launches, and share the model between threads.

A class derived from Decoder, such as gpt_oss_megakernel.MegaModel, says which kernels a launch runs.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from host.launch import blocks_for, check_program_count, program_count, tuning_for, with_shorter_ring
from host.limits import check_memory, context_length
from host.phases import PHASES, barrier_name
from host.sampling import GREEDY, Sampling
from host.state import State, new_state
from host.tuning import BlockTuning, Tuning
from host.weights import Weights, bytes_to_load, load_weights, weights_in_place
from system.arguments import boolean, function_or_none, instance, integer, integer_or_none, integers, one_of
from system.errors import InputError, LogitsNotFinite, MegakernelAborted, PositionsLost
from system.turns import LAUNCHING, Turns, exclusive


class Decoder:
    """A GPT-OSS model on one device, decoded with one launch per token: greedily, or sampled if `generate` is told so.

    A model holds one sequence. generate and decode check their arguments at once and start using the model when their
    first token is requested. From then on any call of generate, decode, step, logits, hidden, reset or switch_path ends
    that sequence, and its generator raises GenerationOvertaken at the next token. Closing a generator has no effect.

    Threads may share a model or have one each. A call, or one token of a generator, waits until no other thread is
    using the model. No lock is held between two tokens or while on_logits or on_launch run, so these callbacks may use
    any model. A signal handler that uses a model while its thread is using one gets ModelInUse.

    If an interrupt or an error ends a use early, the next use starts clean: positions fed before it count as fed, those
    being fed do not, and feeding a token after them raises PositionsLost. After MegakernelAborted every use raises it
    again until reset() is called.
    """

    _last_stream = None  # the GPU stream that a model used last, whichever model it was

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
        """Load an opened checkpoint onto a device and compile the kernels.

        quant: quantize the experts' activations and multiply FP4 x FP8.
        max_context: positions in the KV cache; default: 4096, or all of a model with fewer.
        device: default: the GPU if there is one that can run the kernels, else the CPU.
        num_programs: programs of a launch; default: all that are resident at once.
        tuning, blocks: launch parameters of decoding and of prompts (prefill.py); default: the launch table's.
        kv_dtype: bfloat16, or float32 for comparisons without rounding.
        show_progress: print a progress bar while loading.
        trace_position: the position whose launch records timestamps.
        weights: the weights of another model with the same checkpoint and tuning, to share.
        dense: formats of the dense matrices, which are quantized on loading; default: those of the checkpoint.

        Raise InputError if max_context exceeds the model's limit, the device cannot run the kernels or has too little
        memory, `dense` names another FP8 format than the checkpoint holds, a value is out of range, or a file of the
        checkpoint changed while it was read; TypeError, naming the argument, if one has the wrong type;
        MegakernelAborted if the first launch gives up.
        """
        if not hasattr(checkpoint, "config"):
            raise TypeError(f"checkpoint must be an open one, not {type(checkpoint).__name__}; see from_pretrained")
        boolean(show_progress, "show_progress")
        instance(tuning, Tuning, "tuning")
        instance(weights, Weights, "weights")
        instance(dense, DenseFormats, "dense")
        instance(blocks, BlockTuning, "blocks")
        max_context = integer_or_none(max_context, "max_context")
        num_programs = integer_or_none(num_programs, "num_programs")
        one_of(kv_dtype, (torch.bfloat16, torch.float32), "kv_dtype")
        self.config: ModelConfig = dataclasses.replace(checkpoint.config, dense=held_formats(checkpoint, dense))
        self.compiled_config = self.config.compiled()
        self.device = self._usable_device(device)
        self.quant = boolean(quant, "quant")
        self.max_context = context_length(self.config, max_context)
        self.trace_position = integer_or_none(trace_position, "trace_position", minimum=0)
        if self.trace_position is not None and self.trace_position >= self.max_context:
            raise InputError(f"trace_position {trace_position}: the context has {self.max_context} positions")
        self.tuning = tuning or tuning_for(self.device, self.config)
        self.num_programs = program_count(self.device, self.tuning) if num_programs is None else num_programs
        check_program_count(self.num_programs, self.device, self.tuning)
        self.grid = (self.num_programs,)
        self.blocks = blocks or blocks_for(self.device)
        self.kv_dtype = kv_dtype
        self._mapped_checkpoint = None
        start = time.perf_counter()
        self.weights = weights or self._load(checkpoint, show_progress)
        self.load_seconds = time.perf_counter() - start
        self.checkpoint_bytes = checkpoint_bytes(checkpoint.config)
        self.turns = Turns()
        self._start()

    @staticmethod
    def _usable_device(device: torch.device | str | None) -> torch.device:
        return usable_device(device)

    def _load(self, checkpoint, show_progress: bool) -> Weights:
        """Load the weights. Raise InputError if there is too little memory for them and for the state."""
        load_bytes = bytes_to_load(checkpoint, self.config, self.device, self.tuning)
        check_memory(self.config, self.max_context, self.kv_dtype, self.device, load_bytes)
        # Weights that are read in place change with the mapped file, so generate checks the file again and again.
        if weights_in_place(checkpoint, self.config, self.device, self.tuning):
            self._mapped_checkpoint = checkpoint
        return load_weights(checkpoint, self.config, self.device, self.tuning, show_progress)

    def _start(self) -> None:
        """Start a new sequence in newly allocated memory."""
        self._started = False
        self.state = self.prefill = None  # frees their memory before the new ones need it
        self.n_fed = 0  # positions that the cache holds; their tokens are the first of state.tokens
        self.n_reused = 0  # positions of the last prompt of generate() that the cache held already
        self._in_flight: range | None = None  # positions whose launches have begun and not ended
        self._in_kernel: tuple[float, int] | None = GREEDY.in_kernel  # what the states say of sampling
        self._lost_end = 0  # interrupted launches may have written cache positions n_fed to _lost_end - 1; 0: none
        self.state = self._new_state()
        self._build()
        self.prefill = self._new_prefill()
        with compile_errors(self.device):
            self._compile()
        self._check_barriers()
        self._started = True

    def _build(self) -> None:
        """Set the constants that the kernels are compiled for, without and with tracing."""
        self.build = Build(self.compiled_config, self.tuning, self.quant)
        self.traced_build = Build(self.compiled_config, self.tuning, self.quant, trace=True)

    def _compile(self) -> None:
        """Launch without layers, which shows that all programs can be resident before one waits for another.

        If attention needs more shared memory, as with a float32 cache or wide heads, the ring gives up stages.
        """
        while missing_bytes := self._missing_shared_memory():
            self.tuning = with_shorter_ring(self.tuning, missing_bytes, self.device)
            self._build()

    def _missing_shared_memory(self) -> int:
        """Launch without layers and return the bytes of shared memory that the kernel lacks, 0 if it fits."""
        try:
            for position in {0, self.trace_position or 0}:
                self._run(range(0), self._launch, position, n_layers=0)
        except OutOfResources as error:
            return error.required - error.limit
        return 0

    def load_rate(self) -> str:
        """Return one line with the size of the checkpoint's weights (GB), the loading time (s) and the rate (GB/s).

        The time includes packing and quantizing.
        """
        gigabytes = self.checkpoint_bytes / 1e9
        return f"weights: {gigabytes:.3f} GB in {self.load_seconds:.2f} s, {gigabytes / self.load_seconds:.2f} GB/s"

    @exclusive
    def reset(self) -> None:
        """Forget all positions and the record of a barrier that gave up. Return None; the weights stay loaded.

        Raise ModelInUse in a signal handler whose thread is using a model.
        """
        self._begin_use()
        self.n_fed = 0
        self._in_flight = range(self.max_context)  # until all is zeroed, an interrupt leaves no position usable
        for s in self.states():
            for tensor in (s.k_cache, s.v_cache, s.split_arrivals, s.sync):
                tensor.zero_()
        self._in_flight, self._lost_end = None, 0

    @exclusive
    def switch_path(self, quant: bool) -> None:
        """Switch to the quantized or the default path, keeping the weights and starting a new, empty sequence.

        Return None. Raise TypeError if quant is not a bool, InputError if the path's kernels cannot be compiled,
        MegakernelAborted if their first launch gives up, ModelInUse in a signal handler whose thread is using a model.
        """
        quant = boolean(quant, "quant")
        self._begin_use()
        self._started, self.quant = False, quant
        self._start()

    def _begin_use(self, sampling: Sampling = GREEDY) -> int:
        """Begin a use of the model, which ends the one before and cleans up if it was interrupted. Return the turn."""
        turn = self.turns.take()
        if not self._started:
            self._start()
        self._follow_stream()
        if self._in_flight is not None:
            self.n_fed = min(self.n_fed, self._in_flight.start)
            self._lost_end = max(self._lost_end, self._in_flight.stop)
            for s in self.states():
                s.sync[: ABORT.value] = 0  # arrivals of programs that were stopped
                s.split_arrivals.zero_()
            self._in_flight = None
        if sampling.in_kernel != self._in_kernel:
            self._in_kernel = None  # unknown, should an interrupt come
            for s in self.states():
                s.inverse_temperature[0], s.seed[0] = sampling.in_kernel
            self._in_kernel = sampling.in_kernel
        return turn

    def _resume(self, turn: int) -> None:
        """Resume a generation. Raise GenerationOvertaken if the model has been used for something else."""
        self.turns.check(turn)
        self._follow_stream()

    def _follow_stream(self) -> None:
        """Make this thread's GPU stream wait for all that models queued before, on any stream.

        Two kernels whose programs wait for each other must not share the GPU.
        """
        if self.device.type == "cuda":
            with LAUNCHING:
                stream, last = torch.cuda.current_stream(), Decoder._last_stream
                if last is not None and last != stream:
                    stream.wait_stream(last)
                Decoder._last_stream = stream

    def states(self) -> Sequence[State]:
        """Return all states of this process; those of several GPUs may be among them."""
        return (self.state,)

    def _new_state(self) -> State:
        barriers = 2 + len(PHASES) * self.config.n_layers
        return new_state(
            self.config,
            self.tuning,
            self.quant,
            self.max_context,
            self.num_programs,
            self.device,
            self.kv_dtype,
            trace_events=0 if self.trace_position is None else 2 + 2 * barriers,
        )

    @exclusive
    def step(self, token_id: int, position: int) -> int:
        """Feed a token at a position whose predecessors were fed, and return the most likely next token's id.

        Raise TypeError if an argument is not an integer; InputError if the position lies outside the context or the
        token outside the vocabulary, LogitsNotFinite if a logit is not finite, and PositionsLost if an interrupted call
        lost earlier positions (both are InputErrors); MegakernelAborted if a barrier gave up; ModelInUse in a signal
        handler whose thread is using a model.
        """
        token_id, position = self._check_token_at(token_id, position)
        self._begin_use_at(token_id, position)
        self._feed(position, token=True)
        return self._token(self.state.tokens[position + 1], position)

    @exclusive
    def logits(self, token_id: int, position: int) -> torch.Tensor:
        """Feed a token at a position whose predecessors were fed, and return the next token's logits.

        They are float32 [vocab], a copy on the model's device. Raise TypeError if an argument is not an integer;
        InputError if the position lies outside the context or the token outside the vocabulary, LogitsNotFinite if a
        logit is not finite, and PositionsLost if an interrupted call lost earlier positions (both are InputErrors);
        MegakernelAborted if a barrier gave up; ModelInUse in a signal handler whose thread is using a model.
        """
        token_id, position = self._check_token_at(token_id, position)
        self._begin_use_at(token_id, position)
        return self._feed_for_logits(position)

    @exclusive
    def hidden(self, token_id: int, position: int, n_layers: int) -> torch.Tensor:
        """Feed a token at a position through the first n_layers, and return the residual stream after them.

        It is float32 [hidden], a copy on the model's device. The position does not count as fed. Raise TypeError if an
        argument is not an integer; InputError if the position lies outside the context, the token outside the
        vocabulary or n_layers outside 0 to the model's, and PositionsLost (an InputError) if an interrupted call lost
        earlier positions; MegakernelAborted if a barrier gave up; ModelInUse in a signal handler whose thread is using
        a model.
        """
        n_layers = integer(n_layers, "n_layers")
        if not 0 <= n_layers <= self.config.n_layers:
            raise InputError(f"n_layers {n_layers}: the model has {self.config.n_layers}")
        token_id, position = self._check_token_at(token_id, position)
        self._begin_use_at(token_id, position)
        self._run(range(position, position + 1), self._launch, position, n_layers=n_layers)
        self._check_barriers()
        return functools.reduce(torch.add, self.state.expert_out, self.state.x)

    def generate(
        self,
        prompt_ids: Iterable[int],
        max_new_tokens: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
        sampling: Sampling = GREEDY,
        on_block: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Return an iterator over at most max_new_tokens ids (int) that follow the prompt; a stop id is the last.

        It ends early when the context is full. The prefix that the prompt shares with the model's sequence, such as the
        earlier turns of a chat, is not fed again; the rest is fed in blocks (prefill.py), except its last token. With
        `on_logits` all positions are fed one by one instead, and it receives the logits of each one in the prompt and
        the answer: float32 [vocab], a copy on the model's device. `sampling` says how each token is chosen from its
        logits. `on_block` is called before each block of the prompt; what it raises ends the generation, and the blocks
        before count as fed.

        At the call, raise TypeError for an argument of the wrong type; InputError if the prompt is empty, too long for
        the context or has an id outside the vocabulary, or if max_new_tokens is negative. At a token, raise
        GenerationOvertaken if the model was used for something else since the last token; InputError if weights that a
        CPU reads in place lie in a file that changed, and LogitsNotFinite (an InputError) if a logit is not finite;
        MegakernelAborted if a barrier gave up; ModelInUse in a signal handler whose thread is using a model.
        """
        prompt_ids = integers(prompt_ids, "prompt_ids")
        max_new_tokens = integer(max_new_tokens, "max_new_tokens", minimum=0)
        function_or_none(on_logits, "on_logits")
        function_or_none(on_block, "on_block")
        instance(sampling, Sampling, "sampling")
        if not prompt_ids:
            raise InputError("the prompt is empty")
        self._check_fit(prompt_ids, 0)
        return self._generate(prompt_ids, max_new_tokens, on_logits, sampling or GREEDY, on_block)

    def _generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        on_logits: Callable[[torch.Tensor], None] | None,
        sampling: Sampling,
        on_block: Callable[[], None] | None,
    ) -> Iterator[int]:
        check_unchanged(self._mapped_checkpoint)
        last = len(prompt_ids) - 1
        turn = self._begin(prompt_ids, on_logits is None, sampling, on_block or _nothing)
        if on_logits:
            for position in range(last):
                on_logits(self._next_logits(turn, position))
        end = min(last + max_new_tokens, self.max_context)
        if sampling.leaves_out:
            tokens = self._decode_by_logits(turn, last, end, on_logits, sampling)
        else:
            tokens = self._decode(turn, last, end, on_logits)
        for token in tokens:
            check_unchanged(self._mapped_checkpoint)
            yield token
            if token in self.config.stop_ids:
                return

    @exclusive
    def _begin(self, prompt_ids: list[int], in_blocks: bool, sampling: Sampling, on_block: Callable[[], None]) -> int:
        """Begin to use the model for a prompt, and return the turn.

        in_blocks: feed all tokens that the cache does not hold yet, except the last one.
        """
        turn = self._begin_use(sampling)
        last = len(prompt_ids) - 1
        start = self.n_reused = min(self._shared_prefix_length(prompt_ids), last) if in_blocks else 0
        self._write_tokens(prompt_ids[start:], start)
        if not in_blocks:
            return turn
        if last - start < self.blocks.min_tokens or not self.prefill.holds_experts:
            for position in range(start, last):
                on_block()
                self._feed(position)
            return turn
        for position in range(start, last, self.prefill.tokens):
            on_block()
            n = min(self.prefill.tokens, last - position)
            self._run(range(position, position + n), self.prefill.feed, position, n)
            self._mark_fed(position + n)
        return turn

    def _shared_prefix_length(self, token_ids: list[int]) -> int:
        """Return how many of the first tokens are the same as those that the cache holds."""
        fed_ids = self.state.tokens[: min(self.n_fed, len(token_ids))].tolist()
        return next((n for n, (a, b) in enumerate(zip(fed_ids, token_ids)) if a != b), len(fed_ids))

    def decode(
        self, token_id: int, position: int, n_tokens: int, on_launch: Callable[[], None] | None = None
    ) -> Iterator[int]:
        """Return an iterator that feeds a token at a position whose predecessors were fed, and yields n_tokens int ids.

        Stop ids do not end it, but a full context does. `on_launch` is called after each launch. A GPU may only have
        queued the launch by then, so that events recorded in the callback mark its end.

        At the call, raise TypeError for an argument of the wrong type; InputError if the position lies outside the
        context, the token outside the vocabulary, or n_tokens is negative. At a token, raise GenerationOvertaken if the
        model was used for something else since the last token; LogitsNotFinite if a logit is not finite, and
        PositionsLost if an interrupted call lost earlier positions (both are InputErrors); MegakernelAborted if a
        barrier gave up; ModelInUse in a signal handler whose thread is using a model.
        """
        token_id, position = self._check_token_at(token_id, position)
        n_tokens = integer(n_tokens, "n_tokens", minimum=0)
        function_or_none(on_launch, "on_launch")
        return self._decode_from(token_id, position, n_tokens, on_launch)

    def _decode_from(
        self, token_id: int, position: int, n_tokens: int, on_launch: Callable[[], None] | None
    ) -> Iterator[int]:
        turn = self._begin_at(token_id, position)
        yield from self._decode(turn, position, min(position + n_tokens, self.max_context), on_launch=on_launch)

    @exclusive
    def _begin_at(self, token_id: int, position: int) -> int:
        return self._begin_use_at(token_id, position)

    def _decode(
        self,
        turn: int,
        start: int,
        end: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
        on_launch: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Launch positions start to end - 1 and yield the token that each one gives, which the next position feeds.

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

    def _decode_by_logits(
        self,
        turn: int,
        start: int,
        end: int,
        on_logits: Callable[[torch.Tensor], None] | None,
        sampling: Sampling,
    ) -> Iterator[int]:
        """Launch positions start to end - 1 and yield the token that `sampling` draws from each one's logits."""
        for position in range(start, end):
            logits = self._next_logits(turn, position)
            if on_logits:
                on_logits(logits)
            token_id = sampling.choose(logits, position)
            if position + 1 < end:
                self._write_next(turn, token_id, position + 1)
            yield token_id

    @exclusive
    def _write_next(self, turn: int, token_id: int, position: int) -> None:
        self._resume(turn)
        self._write_tokens([token_id], position)

    @exclusive
    def _next_launch(self, turn: int, position: int, logits: bool) -> "Launched":
        """Feed the token at a position of a generation, and start copying the next token to the host."""
        self._resume(turn)
        self._feed(position, token=True, logits=logits)
        logits_copy = self.state.logits.clone() if logits else None
        token = self.state.tokens[position + 1]
        if self.device.type == "cpu":
            return Launched(position, token.clone(), None, logits_copy)
        pinned = torch.empty((), dtype=torch.int32, pin_memory=True)
        pinned.copy_(token, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Launched(position, pinned, copied, logits_copy)

    def _next_token(self, turn: int, launched: "Launched") -> int:
        if launched.copied is not None:
            launched.copied.synchronize()
        return self._checked_token(turn, launched)

    @exclusive
    def _checked_token(self, turn: int, launched: "Launched") -> int:
        self._resume(turn)
        return self._token(launched.token, launched.position)

    @exclusive
    def _next_logits(self, turn: int, position: int) -> torch.Tensor:
        self._resume(turn)
        return self._feed_for_logits(position)

    def _check_fit(self, token_ids: list[int], position: int) -> None:
        """Raise InputError unless the tokens fit the context from `position` on and are in the vocabulary."""
        if position < 0 or position + len(token_ids) > self.max_context:
            raise InputError(
                f"positions {position} to {position + len(token_ids) - 1} "
                f"do not fit a context of {self.max_context} tokens"
            )
        for token_id in token_ids:
            check_token(token_id, self.config)

    def _write_tokens(self, token_ids: list[int], position: int) -> None:
        """Write tokens that are to be fed from `position` on; those of later positions become -1, "not decoded"."""
        self._check_fit(token_ids, position)
        self.n_fed = min(self.n_fed, position)
        ids = torch.tensor(token_ids, dtype=torch.int32).to(self.device)
        for s in self.states():
            s.tokens[position:] = -1
            s.tokens[position : position + len(token_ids)] = ids

    def _check_token_at(self, token_id: int, position: int) -> tuple[int, int]:
        """Return both as int. Raise TypeError if one is no integer, InputError if it is out of range."""
        token_id, position = integer(token_id, "token_id"), integer(position, "position")
        self._check_fit([token_id], position)
        return token_id, position

    def _begin_use_at(self, token_id: int, position: int) -> int:
        """Begin to use the model for a token at a position, and return the turn.

        Raise PositionsLost if an interrupted use has lost positions before it.
        """
        turn = self._begin_use()
        if self.n_fed < min(position, self._lost_end):
            raise PositionsLost(
                f"position {position}: an interrupted call lost those from {self.n_fed} on; feed them again or reset()"
            )
        self._write_tokens([token_id], position)
        return turn

    def _feed(self, position: int, token: bool = False, logits: bool = False) -> None:
        """Launch a position, whose token was written, through all layers.

        The position counts as fed only if all positions before it do.
        """
        self._run(range(position, position + 1), self._launch, position, token=token, logits=logits)
        if self.n_fed == position:
            self._mark_fed(position + 1)

    def _run(self, positions: range, launch: Callable[..., None], *arguments, **options) -> None:
        """Call a function whose launches feed these positions, and record them as in flight until it returns."""
        self._in_flight = positions
        with LAUNCHING:
            self._follow_stream()
            launch(*arguments, **options)
        self._in_flight = None

    def _mark_fed(self, n_positions: int) -> None:
        """Record that launches from now on find the first n_positions in the cache."""
        self.n_fed = n_positions
        if n_positions >= self._lost_end:
            self._lost_end = 0

    def _feed_for_logits(self, position: int) -> torch.Tensor:
        self._feed(position, logits=True)
        self._check_barriers()
        if int(self.state.head_index.min()) < 0:
            raise LogitsNotFinite(position)
        return self.state.logits.clone()

    def _token(self, token: torch.Tensor, position: int) -> int:
        """Return the id that the launch of a position wrote. Raise LogitsNotFinite or MegakernelAborted."""
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
    """A launched position of a generation, and its results."""

    position: int
    token: torch.Tensor  # int32 [] on the host
    copied: torch.cuda.Event | None  # the end of the token's copy to the host; None if it has ended
    logits: torch.Tensor | None  # float32 [vocab] on the device, if requested


def _nothing() -> None:
    pass
