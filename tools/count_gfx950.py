"""Count what a token costs on gfx950, phase by phase, from machine code that an emulator executes.

python tools/count_gfx950.py [--quant] [--config 120b] [--layers 2] [--programs 240] [--position 128] [--json FILE]

Feeds one token to a model with random weights and prints, for each phase of one launch: instructions by class, bytes by
kind, and the cycles that these take at the rates of RATES. docs/performance.md has the tables and what they mean.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")  # kernels are compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import host.start

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from checkpoints.checkpoint import RandomCheckpoint, WithoutStopIds
from checkpoints.config import PRESETS
from command_line.parser import ArgumentParser, positive_int
from command_line.run import run_main
from measure.report import markdown_table, write_file
from system.output_file import output_path
from tools.gfx950.emulator import Conditions, Program, Result
from tools.gfx950.layout import Access, Form, Space, Traffic
from tools.gfx950.model import EmulatedModel, Emulator

KERNEL_FILE = "gpt_oss_megakernel.py"
TOKEN = 7
SIMDS, WAVES_PER_SIMD = 4, 2  # of a CU; of a program of eight waves
CLOCK_HZ = 2.4e9
LDS_BYTES_PER_CYCLE = 128  # of a CU
MEMORY_BYTES_PER_SECOND = 8e12  # of the chip
VECTOR_CYCLES = 4  # of a SIMD, 16 lanes wide, for 64 lanes
SLOW_VECTOR_CYCLES = 16
SLOW = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_|v_mul_(lo|hi)_[ui]32|v_mad_[ui]64|v_(lshl|lshr|ashr)rev_[bi]64")
MACS_PER_CYCLE = {
    "f32": 32,
    "bf16": 512,
    "f16": 512,
    "f8f6f4": 1024,
    "fp8": 512,
    "bf8": 512,
}  # of a SIMD, from the peak rates
MATRIX_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)_?(\w+)")
CLASSES = ("vector", "matrix", "LDS", "memory", "scalar", "wait")


@dataclass(frozen=True)
class Cost:
    """What a phase of a launch takes. Cycles are a SIMD's or a CU's, of the busiest program."""

    phase: str
    instructions: dict[str, int]  # of all waves, by class
    weight_bytes: int  # that lanes loaded from tensors that nothing writes
    state_bytes: int  # that lanes loaded, stored or changed elsewhere
    lds_bytes: int
    vector_cycles: float
    matrix_cycles: float
    lds_cycles: float
    issue_cycles: float  # of a wave: four for each instruction of any class

    @property
    def microseconds(self) -> dict[str, float]:
        """What each resource would take by itself."""
        cycles = {"vector": self.vector_cycles, "matrix": self.matrix_cycles, "LDS": self.lds_cycles}
        times = {name: n / CLOCK_HZ * 1e6 for name, n in (cycles | {"issue": self.issue_cycles}).items()}
        return times | {"memory": self.weight_bytes / MEMORY_BYTES_PER_SECOND * 1e6}


class Counter(Emulator):
    """An emulator that keeps the last launch."""

    def keep(self, program: Program, result: Result) -> None:
        super().keep(program, result)
        self.last = program, result


def class_of(text: str, instruction) -> str:
    """Return one of CLASSES."""
    name = text.split()[0]
    if name.startswith(("s_waitcnt", "s_barrier", "s_nop", "s_sleep")):
        return "wait"
    if instruction.form == Form.MEMORY:
        if instruction.space == Space.SCALAR_CACHE:
            return "scalar"
        return "LDS" if instruction.space == Space.LDS or instruction.access == Access.PERMUTE else "memory"
    if name.startswith("v_mfma"):
        return "matrix"
    return "vector" if name.startswith("v_") else "scalar"


def cycles_of(text: str) -> float:
    """Return the cycles for which an instruction of a wave keeps its SIMD's vector or matrix unit."""
    name = text.split()[0]
    if name.startswith("v_mfma"):
        rows, columns, depth, kind = MATRIX_SHAPE.search(name).groups()
        return int(rows) * int(columns) * int(depth) / MACS_PER_CYCLE[kind]
    return SLOW_VECTOR_CYCLES if SLOW.match(name) else VECTOR_CYCLES


def phases_of(program: Program) -> list[str]:
    """Return each instruction's phase: the function that the kernel's body calls there, barriers taken together.

    An instruction without a place of its own belongs to the phase of the one before it.
    """
    source = (Path(__file__).resolve().parent.parent / KERNEL_FILE).read_text().splitlines()
    phases, phase = [], "open_context"
    for frames in program.frames:
        file, _, line = frames[-1].partition(":")
        if file == KERNEL_FILE and int(line):
            called = re.search(r"(\w+)\(", source[int(line) - 1])
            if called and called[1].endswith(("_phase", "_at", "_context", "_ranks")):
                phase = "barrier" if called[1].endswith("_at") else called[1]
        phases.append(phase)
    return phases


def costs(program: Program, result: Result) -> Iterator[Cost]:
    """Yield what each phase of a launch takes, in the order of the code."""
    classes = np.array([class_of(text, code) for text, code in zip(program.texts, program.code, strict=True)])
    cycles = np.array([cycles_of(text) for text in program.texts])
    phases = np.array(phases_of(program))
    for phase in dict.fromkeys(phases):
        here = phases == phase
        yield _cost(phase, classes[here], cycles[here], result.counts_of_workgroups[:, here], result.traffic[here])


def _cost(phase: str, classes: np.ndarray, cycles: np.ndarray, counts: np.ndarray, traffic: np.ndarray) -> Cost:
    """Return what a phase's instructions take. counts: [workgroups, instructions]; traffic: [instructions, Traffic]."""
    memory = traffic[np.isin(classes, ("memory", "scalar"))].sum(0)
    weight_bytes = int(memory[Traffic.WEIGHT_BYTES])
    lds_bytes = traffic[:, Traffic.BYTES] * (classes == "LDS")
    bytes_each = lds_bytes / np.maximum(1, counts.sum(0))
    return Cost(
        phase,
        {name: int(counts[:, classes == name].sum()) for name in CLASSES},
        weight_bytes,
        int(memory[Traffic.BYTES]) - weight_bytes,
        int(lds_bytes.sum()),
        _busiest(counts, cycles * (classes == "vector")) / SIMDS,
        _busiest(counts, cycles * (classes == "matrix")) / SIMDS,
        _busiest(counts, bytes_each) / LDS_BYTES_PER_CYCLE,
        _busiest(counts, VECTOR_CYCLES) / (SIMDS * WAVES_PER_SIMD),
    )


def _busiest(counts: np.ndarray, weights: np.ndarray | float) -> float:
    """Return the largest sum over a workgroup's instructions of their counts times weights."""
    return float((counts * weights).sum(1).max())


def table(found: list[Cost]) -> str:
    """Return two tables: what is executed, and how long that takes."""
    executed = [
        (
            cost.phase,
            *(f"{cost.instructions[name] / 1e3:,.0f}" for name in CLASSES),
            *(f"{n / 1e6:,.2f}" for n in (cost.weight_bytes, cost.state_bytes, cost.lds_bytes)),
        )
        for cost in found
    ]
    times = [(cost.phase, *(f"{time:.2f}" for time in cost.microseconds.values())) for cost in found]
    heads = ("phase", *CLASSES, "MB of weights", "MB of state", "MB through LDS")
    return "\n".join(
        ["Thousands of instructions, and megabytes, of all programs:", "", *markdown_table(heads, executed), ""]
        + ["Microseconds of the busiest program:", "", *markdown_table(("phase", *found[0].microseconds), times)]
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", action="store_true", help="the path with FP4 x FP8 experts")
    parser.add_argument("--config", choices=PRESETS, default="120b")
    parser.add_argument("--layers", metavar="N", type=positive_int, default=2)
    parser.add_argument("--programs", metavar="N", type=positive_int, default=240)
    parser.add_argument("--position", metavar="N", type=positive_int, default=128)
    parser.add_argument("--json", metavar="FILE", type=output_path, help="write all costs as JSON")
    args = parser.parse_args()
    checkpoint = WithoutStopIds(RandomCheckpoint(PRESETS[args.config].cut(args.layers)))
    model = EmulatedModel(
        checkpoint, args.quant, 2 * args.position, num_programs=args.programs, conditions=Conditions()
    )
    model.emulator = Counter(model.emulator.conditions)
    model.logits(TOKEN, args.position)
    found = list(costs(*model.emulator.last))
    print(table(found))
    if args.json:
        data = json.dumps([dataclasses.asdict(cost) for cost in found], indent=2) + "\n"
        write_file("--json", args.json, data.encode())


if __name__ == "__main__":
    sys.exit(run_main(main))
