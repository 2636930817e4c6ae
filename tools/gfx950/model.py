"""A model whose kernels run in the emulator: compiled for gfx950, executed on a CPU.

The process must define its kernels for a compiler: set TRITON_INTERPRET=0 before anything is imported.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gpt_oss_megakernel import MegaModel
from host.launch import LAUNCH_TABLE
from host.tuning import Tuning
from prefill import Launch, Prefill
from system.errors import MegakernelAborted
from tools.compile_report import compile_kernel
from tools.gfx950.emulator import STRICT, Conditions, Finding, Program, Result

TARGET = "gfx950"
ROW = LAUNCH_TABLE[TARGET]
SIXTEEN_DIVIDES = "max_context"  # of the megakernel's numbers, which Triton's launch tells the compiler


@dataclass
class Log:
    """What the launches of a model have executed and reported."""

    launches: int = 0
    executed: int = 0
    mnemonics: Counter = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)


class Emulator:
    """Compiles kernels once for each set of constants and types, and executes their launches."""

    def __init__(self, conditions: Conditions = STRICT):
        self.conditions, self.log = conditions, Log()
        self.counts: dict[Program, np.ndarray] = {}  # how often each instruction was executed, in all launches
        self.traffic: dict[Program, np.ndarray] = {}  # [instructions, Traffic], likewise
        self._programs: dict[str, tuple[Program, int, int]] = {}

    @property
    def programs(self) -> tuple[Program, ...]:
        """The kernels that were launched."""
        return tuple(self.counts)

    def launch(self, launch: Launch, read_only: Sequence[torch.Tensor] = ()) -> None:
        """Execute a launch. Raise RuntimeError if it does not end; the log gets what was reported."""
        kernel, grid, arguments, options = launch
        if len(grid) > 1 and any(size > 1 for size in grid[1:]):
            raise NotImplementedError(f"{kernel.__name__}: the emulator launches grids of one dimension, not {grid}")
        names = [name for n, name in enumerate(kernel.arg_names) if not kernel.params[n].is_constexpr]
        named = dict(zip(names, arguments))
        program, n_warps, shared_bytes = self._program_of(kernel, named, options)
        flat = [leaf for name in names for leaf in leaves(named.get(name, ()))]
        protected = {tensor.data_ptr() for tensor in read_only}
        places = [n for n, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor) and leaf.data_ptr() in protected]
        result = program.launch(grid[0], n_warps, shared_bytes, flat, self.conditions, places)
        self.keep(program, result)
        if result.outcome:
            raise RuntimeError(f"{kernel.__name__}: {result.outcome.name.lower()} after {result.executed} instructions")

    def keep(self, program: Program, result: Result) -> None:
        """Log what a launch has executed and reported."""
        self.counts[program] = self.counts.get(program, 0) + result.counts
        self.traffic[program] = self.traffic.get(program, 0) + result.traffic
        self.log.launches += 1
        self.log.executed += result.executed
        self.log.mnemonics += program.mnemonics(result)
        self.log.findings += result.findings

    def _program_of(self, kernel, named: dict, options: dict) -> tuple[Program, int, int]:
        types = [leaf.dtype if isinstance(leaf, torch.Tensor) else int for leaf in leaves(tuple(named.values()))]
        key = repr((kernel.__module__, kernel.__name__, types, sorted(options.items(), key=lambda item: item[0])))
        if key not in self._programs:
            missing = {name: () for name in kernel.arg_names if name not in named and name not in options}
            aligned = (SIXTEEN_DIVIDES,) if named.get(SIXTEEN_DIVIDES, 1) % 16 == 0 else ()
            compiled = compile_kernel(TARGET, kernel, named | missing, options, aligned)
            program = Program(compiled.asm["amdgcn"])
            self._programs[key] = program, compiled.metadata.num_warps, compiled.metadata.shared
        return self._programs[key]


def leaves(value) -> Iterator:
    """Yield the tensors and numbers of an argument, which may be a tuple of tuples, in order."""
    if isinstance(value, tuple):
        for element in value:
            yield from leaves(element)
    else:
        yield value


class EmulatedPrefill(Prefill):
    """Feeds prompts in blocks whose launches are emulated."""

    emulator: Emulator

    def _feed_block(self, position: int, n: int) -> None:
        for launch in self.launches(position, n):
            self.emulator.launch(launch, self.weights)


class EmulatedModel(MegaModel):
    """Decodes by emulated launches, with the weights laid out and the launches tuned as for gfx950."""

    def __init__(
        self,
        checkpoint,
        *arguments,
        num_programs: int,
        tuning: Tuning | None = None,
        conditions: Conditions = STRICT,
        **options,
    ):
        """Load a checkpoint. See Decoder for the other arguments; num_programs may be any number."""
        self.emulator = Emulator(conditions)
        tuning = tuning or ROW.tuning(checkpoint.config)
        super().__init__(
            checkpoint, *arguments, device="cpu", num_programs=num_programs, tuning=tuning, blocks=ROW.blocks, **options
        )

    @staticmethod
    def _usable_device(device) -> torch.device:
        return torch.device("cpu")

    def _new_prefill(self) -> EmulatedPrefill:
        prefill = EmulatedPrefill(self.config, self.build, self.blocks, self.weights, self.state)
        prefill.emulator = self.emulator
        return prefill

    def _launch(self, position: int, token: bool = False, logits: bool = False, n_layers: int | None = None) -> None:
        read_only = (*self.weights, self.state.cos, self.state.sin)
        try:
            self.emulator.launch(self._launch_of(position, token, logits, n_layers), read_only)
        except RuntimeError as error:
            raise MegakernelAborted(str(error)) from None
