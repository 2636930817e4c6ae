"""Compile the kernels of several GPUs ahead of time, with no GPU, and report what the compiler made of them.

TRITON_INTERPRET=0 python tools/compile_ranks.py [--target gfx950|sm_90 ...] [--layout roles|tp ...] [--quant] [--json]
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import host.start

import torch

from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import GPT_OSS_120B
from command_line.options import LAYOUTS
from command_line.parser import ArgumentParser
from command_line.run import run_main
from host.cli import path_name
from host.launch import LAUNCH_TABLE, programs_on
from host.weights import Weights, held_fields, weight_shapes
from multi_gpu.checkpoint import ShareCheckpoint
from multi_gpu.heap import Buffer, PeerPointer
from multi_gpu.prompts import prefill_of
from multi_gpu.protocol import FIRST_EPOCH, shares_of
from multi_gpu.ranks import Rank, RankModel
from prefill import Launch
from tools.compile_report import TARGETS, UNITS, amd_report, compile_kernel, nvidia_report, print_reports

COMPILED = {"tp": ((2, 0), (8, 3)), "roles": ((3, 0), (3, 1))}  # (ranks, the one whose kernels are compiled)
PROMPT_TOKENS = 300
META = torch.device("meta")


class MetaHeap:
    """A heap of which this process is one rank, without data."""

    def __init__(self, rank: int, n_ranks: int):
        self.rank, self.n_ranks = rank, n_ranks

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Buffer, ...]:
        own, other = torch.empty(shape, dtype=dtype, device=META), PeerPointer(0, dtype)
        return tuple(own if rank == self.rank else other for rank in range(self.n_ranks))


class MetaModel(RankModel):
    """One rank of 120b, whose tensors have no data."""

    def __init__(self, target: str, layout: str, n_ranks: int, rank: int, quant: bool):
        row = LAUNCH_TABLE[target]
        self.config, self.layout, self.quant = GPT_OSS_120B.cut(2), layout, quant
        self.shares = shares_of(self.config, layout, n_ranks)
        self.tuning, self.blocks = row.tuning(self.config), row.blocks
        self.num_programs = programs_on(UNITS[target], self.tuning)
        self.grid, self.device, self.kv_dtype, self.max_context = (self.num_programs,), META, torch.bfloat16, 4096
        self.epoch, self.heap = FIRST_EPOCH, None
        self._open_heap = lambda n_bytes: MetaHeap(rank, n_ranks)
        part = ShareCheckpoint(RandomCheckpoint(self.config), self.shares[rank])
        tuning = row.tuning(part.config)
        shapes = weight_shapes(part.config, tuning, held_fields(part))
        weights = Weights(*(torch.empty(shape, dtype=dtype, device=META) for shape, dtype in shapes))
        self.ranks = [Rank(self.shares[rank], part.config, tuning, weights)]
        self.state = self._new_state()
        self._build()

    def launches(self) -> Iterator[Launch]:
        """Yield this rank's launches of a token, and of a prompt's layer before the last and of the last."""
        rank = self.ranks[0]
        yield self._launch_of(rank, 0, True, False, self.config.n_layers)
        yield from prefill_of(self, rank).launches(0, PROMPT_TOKENS)


def exchanging(launch: Launch) -> bool:
    """Return whether a kernel is one of several GPUs only, or decodes."""
    return launch[0].fn.__module__ != "prefill"


def reports(target: str, layout: str, quant: bool) -> Iterator[dict]:
    """Report on each kernel of each role: registers, spills, and synchronization with other GPUs."""
    for n_ranks, rank in COMPILED[layout]:
        seen = set()
        model = MetaModel(target, layout, n_ranks, rank, quant)
        for kernel, _, arguments, options in filter(exchanging, model.launches()):
            if kernel.__name__ in seen:
                continue
            seen.add(kernel.__name__)
            named = dict(zip(kernel.arg_names, arguments)) | options
            compiled = compile_kernel(target, kernel, named, named, aligned=("max_context",))
            figures = amd_report(compiled) if target == "gfx950" else nvidia_report(compiled)
            name = {"target": target, "path": path_name(quant, GPT_OSS_120B.dense), "layout": layout}
            name |= {"n_ranks": n_ranks, "rank": rank, "kernel": kernel.__name__}
            yield name | figures | system_scope(target, compiled)


# What makes values visible to other GPUs, by target: releases of flags and acquires of their polls, stores and loads of
# packets.
SYSTEM_SCOPE = {
    "gfx950": {
        "system_releases": "buffer_wbl2 sc0 sc1",
        "system_acquires": "buffer_inv sc0 sc1",
        "packet_stores": "global_store_dwordx2 .* sc0 sc1",
        "packet_loads": "global_load_dwordx2 .* sc0 sc1",
    },
    "sm_90": {
        "system_releases": r"atom\.global\.sys\.release",
        "system_acquires": r"ld\.acquire\.sys",
        "packet_stores": r"st\.global\.wt\.b64",
        "packet_loads": r"ld\.relaxed\.sys\.global\.b64",
    },
}


def system_scope(target: str, compiled) -> dict[str, int]:
    """Count the places of SYSTEM_SCOPE in a kernel's code."""
    code = compiled.asm["amdgcn" if target == "gfx950" else "ptx"]
    return {name: len(re.findall(pattern, code)) for name, pattern in SYSTEM_SCOPE[target].items()}


def main() -> None:
    parser = ArgumentParser(description="What the compilers make of the kernels of several GPUs.")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--layout", nargs="*", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--quant", action="store_true", help="the path with FP4 x FP8 experts")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    args = parser.parse_args()
    cases = [(target, layout) for target in args.target for layout in args.layout]
    found = [figures for case in cases for figures in reports(*case, args.quant)]
    print_reports(found, args.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
