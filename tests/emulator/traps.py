"""Plant known mistakes in the Triton source of the grid barrier, and say what the emulator makes of each.

TRITON_INTERPRET=0 python tests/emulator/traps.py

Prints a JSON object: the name of a mistake -> an outcome of tools/mutate_gfx950.py. Each changes the functions of
common/gfx950 by which programs see each other's stores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import host.start

import dataclasses
import json

import triton
import triton.language as tl

from command_line.run import run_main
from common import gfx950
from common.gfx950.asm import DRAIN, WRITE_BACK
from common.machine import Machine
from system.errors import MegakernelAborted
from tools.mutate_gfx950 import HUNG, Bench

LIMIT = 20_000_000  # instructions of a launch; a whole one takes 0.2 million


@triton.jit
def barrier_alone():
    """Wait for the program's threads, but not for their stores."""
    tl.debug_barrier()


@triton.jit
def write_back_without_drain():
    """Write back what has arrived, as a release of the compiler does behind a bare barrier."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(WRITE_BACK, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def drain_without_barrier():
    """Wait for this wave's stores alone."""
    tl.inline_asm_elementwise(DRAIN, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(WRITE_BACK, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def drain_without_write_back():
    """Leave the stores in this XCD's cache."""
    tl.inline_asm_elementwise(DRAIN, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def poll_by_load(counter_ptr, target):
    """Load the counter, which the compiler may do once and for all."""
    return tl.load(counter_ptr)


@triton.jit
def acquire_nothing(counter_ptr, seen):
    """Return what was polled, without giving up what the cache holds."""
    return seen


@triton.jit
def acquire_relaxed(counter_ptr, seen):
    """Read the counter again, without giving up what the cache holds."""
    return tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu")


MISTAKES = {
    "the writer neither drains nor writes back": dict(publish=barrier_alone),
    "stores are not drained before the write-back": dict(publish=write_back_without_drain),
    "waves do not wait for each other before the write-back": dict(publish=drain_without_barrier),
    "nothing is written back": dict(publish=drain_without_write_back),
    "a release of the compiler behind a bare barrier": dict(publish=barrier_alone, release="release"),
    "the poll is a load": dict(poll=poll_by_load),
    "nothing is acquired": dict(acquire=acquire_nothing),
    "the acquire is relaxed": dict(acquire=acquire_relaxed),
    "whoever comes last acquires nothing": dict(acquire_release="relaxed"),
}


def outcome_of(machine: Machine, expected: dict) -> str:
    """Return what comes of a machine's code. A model's first launch, when it is made, feeds a token already."""
    try:
        return Bench(False, machine, LIMIT).outcome(expected)
    except MegakernelAborted:
        return HUNG


def main() -> None:
    expected = Bench(quant=False).expected()
    found = {}
    for name, changes in MISTAKES.items():
        machine = dataclasses.replace(gfx950.GFX950, name=f"gfx950, where {name}", sync=gfx950.SYNC._replace(**changes))
        found[name] = outcome_of(machine, expected)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    sys.exit(run_main(main))
