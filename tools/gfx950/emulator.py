"""Run gfx950 machine code on a CPU, from the assembly text that Triton leaves in `kernel.asm["amdgcn"]`.

    program = Program(asm)
    result = program.launch(n_workgroups, n_warps, shared_bytes, [tensors and integers as the kernel takes them])

core.c executes it: waves of 64 lanes, all workgroups side by side, so that grid barriers work. docs/gfx950.md says what
is modelled, and what not.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from system.errors import InputError
from tools.gfx950.decode import UnknownInstruction, decode
from tools.gfx950.layout import PROBLEM_TEXT, Instruction, Launch, Mode, Outcome, Problem, Region, Traffic, c_files

HERE = Path(__file__).resolve().parent
SOURCES = ("core.c", "memory.h", "races.h", "hazards.h", "matrix.h", "numbers.h")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")
LANES = 64
KERNARG_ALIGNMENT = 64
POISON = 0x7FC0DEAD  # a NaN, in registers and LDS until they are written


@functools.cache
def core() -> ctypes.CDLL:
    """Compile core.c, or take what was compiled before. Raise InputError if there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise InputError("the emulator's core needs a C compiler: no cc, gcc or clang; CC=... names one")
    texts = c_files() | {name: (HERE / name).read_text() for name in SOURCES}
    key = hashlib.sha256(repr((sorted(texts.items()), FLAGS, compiler)).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"gfx950-{os.getuid()}" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            for name, text in texts.items():
                Path(folder, name).write_text(text)
            built = Path(folder, "core.so")
            command = [compiler, *FLAGS, f"-I{folder}", "-o", str(built), str(Path(folder, "core.c")), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"{compiler} cannot compile core.c: {done.stderr.strip().splitlines()[-1]}")
            built.rename(library)
    loaded = ctypes.CDLL(str(library))
    sizes = (loaded.launch_bytes(), loaded.instruction_bytes())
    if sizes != (ctypes.sizeof(Launch), ctypes.sizeof(Instruction)):
        raise RuntimeError("core.c and layout.py disagree about sizes")
    return loaded


@dataclass(frozen=True)
class Finding:
    """A report: what, where in the code, and how often."""

    problem: Problem
    instruction: int
    text: str
    place: str  # file and line of the Triton source
    workgroup: int
    wave: int
    detail: int  # a register (a scalar one from 1000 on), a lane, or the earlier instruction of a hazard
    address: int
    count: int

    def __str__(self) -> str:
        return (
            f"{PROBLEM_TEXT[self.problem]} [{self.detail}] x{self.count}: {self.text!r} (instruction "
            f"{self.instruction}, {self.place}, workgroup {self.workgroup}, wave {self.wave}, {self.address:#x})"
        )


@dataclass(frozen=True)
class Result:
    """How a launch went."""

    outcome: Outcome
    executed: int  # instructions, of all waves
    findings: tuple[Finding, ...]
    counts_of_workgroups: np.ndarray  # uint64 [workgroups, instructions]: how often each was executed
    traffic: np.ndarray  # uint64 [instructions, Traffic]

    @property
    def counts(self) -> np.ndarray:
        """How often each instruction was executed, uint64 [instructions]."""
        return self.counts_of_workgroups.sum(0)

    @property
    def is_clean(self) -> bool:
        return self.outcome == Outcome.ENDED and not self.findings


@dataclass(frozen=True)
class Conditions:
    """How strictly memory is modelled, and in which order waves run.

    late: memory is read and written as late as the waits allow.
    caches: workgroups see each other's stores only after buffer_wbl2 sc1 and buffer_inv sc1.
    stall: with a seed, a wave may fall far behind the others.
    check_races: report what no barrier orders, whatever the order of waves was; up to 64 waves.
    check_hazards: report instructions that follow each other too closely.
    seed: 0 lets waves run in turn, another number at random, up to `quantum` instructions at a time.
    """

    late: bool = False
    caches: bool = False
    stall: bool = False
    check_lds: bool = True
    check_races: bool = False
    check_hazards: bool = False
    seed: int = 0
    quantum: int = 1000
    poison: int = POISON
    max_instructions: int = 2_000_000_000

    @property
    def mode(self) -> int:
        flags = {
            Mode.LATE: self.late,
            Mode.CACHES: self.caches,
            Mode.STALL: self.stall,
            Mode.CHECK_LDS: self.check_lds,
            Mode.CHECK_RACES: self.check_races,
            Mode.CHECK_HAZARDS: self.check_hazards,
        }
        return sum(flag for flag, is_set in flags.items() if is_set)


STRICT = Conditions(late=True, caches=True, stall=True, check_races=True, check_hazards=True, seed=1, quantum=100)


class Program:
    """A kernel's instructions, and how it takes its arguments."""

    def __init__(self, asm: str):
        """Decode a kernel's assembly. Raise UnknownInstruction, naming all that have no meaning here."""
        self.texts: list[str] = []
        self.frames: list[tuple[str, ...]] = []  # file and line of the Triton source, then of the calls that led there
        labels = self._read(asm)
        self.code = (Instruction * len(self.texts))()
        unknown = dict.fromkeys(filter(None, (self._decode(n, labels) for n in range(len(self.texts)))))
        if unknown:
            raise UnknownInstruction("; ".join(unknown))
        self._n_user_registers = _directive(asm, "user_sgpr_count")
        self._n_preload = _directive(asm, "user_sgpr_kernarg_preload_length")
        self._kernarg_bytes = _directive(asm, "kernarg_size")
        metadata = asm[asm.index("amdhsa.kernels:") :]
        described = metadata[metadata.index(".args:") : metadata.index(".group_segment_fixed_size")]
        pattern = r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)"
        self._arguments = [(int(offset), int(size), kind) for offset, size, kind in re.findall(pattern, described)]

    def _read(self, asm: str) -> dict[str, int]:
        """Collect the instructions, and the source lines that they come from. Return label -> instruction."""
        labels, frames = {}, ("",)
        for line in asm.splitlines():
            code = re.split(r";|//", line)[0].strip()
            if code.startswith(".loc"):
                frames = tuple(re.findall(r"([\w.]+:\d+):\d+", line.partition(";")[2])) or frames
            elif match := re.match(r"([\w.$]+):$", code):
                labels[match[1]] = len(self.texts)
            elif re.match(r"[a-z]+_\w+(\s|$)", code):
                self.texts.append(re.sub(r"\s+", " ", code))
                self.frames.append(frames)
        return labels

    def _decode(self, n: int, labels: dict[str, int]) -> str | None:
        """Decode an instruction. Return what is unknown about it."""
        try:
            self.code[n] = decode(self.texts[n], n, labels)
        except UnknownInstruction as error:
            return str(error)
        return None

    def launch(
        self,
        n_workgroups: int,
        n_warps: int,
        shared_bytes: int,
        arguments: Sequence[torch.Tensor | int],
        conditions: Conditions = STRICT,
        read_only: Sequence[int] = (),
    ) -> Result:
        """Execute the kernel. Tensors lie on the CPU and are contiguous; the kernel writes into them.

        arguments: as the kernel takes them; those that Triton adds at the end are 0. read_only: numbers of tensors that
        must not be written. Memory outside the tensors is not accessible.
        """
        kernarg = _aligned(max(self._kernarg_bytes, KERNARG_ALIGNMENT))
        regions, kept = [], []

        def add_region(base: int, size: int, is_writable: bool) -> None:
            written = np.zeros(max(size, 1), np.uint8)
            kept.append(written)
            regions.append(Region(base, size, is_writable, written.ctypes.data))

        values: dict[int, int] = {}
        for n, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                values[n] = argument.data_ptr()
                add_region(values[n], argument.numel() * argument.element_size(), n not in read_only)
            else:
                values[n] = argument
        hidden = {"hidden_block_count_x": n_workgroups, "hidden_group_size_x": LANES * n_warps}
        for n, (offset, size, kind) in enumerate(self._arguments):
            is_grid = kind.startswith(("hidden_block_count", "hidden_group_size"))
            value = hidden.get(kind, 1) if is_grid else values.get(n, 0)
            kernarg[offset : offset + size] = list((value & (1 << 8 * size) - 1).to_bytes(size, "little"))
        add_region(kernarg.ctypes.data, kernarg.nbytes, False)
        counts = np.zeros((n_workgroups, len(self.texts)), np.uint64)
        traffic = np.zeros((len(self.texts), len(Traffic)), np.uint64)
        region_array = (Region * len(regions))(*regions)
        launch = Launch(
            code=ctypes.addressof(self.code),
            regions=ctypes.addressof(region_array),
            counts=counts.ctypes.data,
            traffic=traffic.ctypes.data,
            preload=kernarg.ctypes.data,
            kernarg=kernarg.ctypes.data,
            seed=conditions.seed,
            max_instructions=conditions.max_instructions,
            n_instructions=len(self.texts),
            n_regions=len(regions),
            n_workgroups=n_workgroups,
            waves_per_workgroup=n_warps,
            lds_bytes=shared_bytes,
            mode=conditions.mode,
            quantum=conditions.quantum,
            n_preload=self._n_preload,
            n_user_registers=self._n_user_registers,
            poison=ctypes.c_int32(conditions.poison).value,
        )
        outcome = Outcome(core().run(ctypes.byref(launch)))
        findings = tuple(self._finding(report) for report in launch.reports[: launch.n_reports])
        return Result(outcome, launch.executed, findings, counts, traffic)

    def _finding(self, report) -> Finding:
        n, text = report.number, self.texts[report.number]
        if report.problem == Problem.HAZARD:
            needed, left = divmod(report.address, 256)
            text = f"{self.texts[report.detail]} -> {text}: {left} of {needed}"
        place = (text, self.frames[n][0], report.workgroup, report.wave, report.detail, report.address)
        return Finding(Problem(report.problem), n, *place, report.count)

    @contextlib.contextmanager
    def without(self, number: int) -> Iterator[None]:
        """Leave an instruction out in the body: s_nop stands in its place."""
        whole = Instruction.from_buffer_copy(self.code[number])
        self.code[number] = decode("s_nop 0", number, {})
        try:
            yield
        finally:
            self.code[number] = whole

    def mnemonics(self, result: Result) -> Counter:
        """Return name -> how often instructions of that name were executed."""
        found = Counter()
        for text, count in zip(self.texts, result.counts.tolist(), strict=True):
            if count:
                found[text.split()[0]] += count
        return found


def _directive(asm: str, key: str) -> int:
    match = re.search(rf"\.amdhsa_{key} (\d+)", asm)
    return int(match[1]) if match else 0


def _aligned(n_bytes: int) -> np.ndarray:
    """Return zeros, uint8 [n_bytes], as aligned as a kernel's arguments are."""
    data = np.zeros(n_bytes + KERNARG_ALIGNMENT, np.uint8)
    first = -data.ctypes.data % KERNARG_ALIGNMENT
    return data[first : first + n_bytes]
