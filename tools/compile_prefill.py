"""Compile the launches of prefill.py ahead of time, with no GPU, and report what the compiler made of each.

TRITON_INTERPRET=0 python -m tools.compile_prefill [--target gfx950|sm_90 ...] [--path default|quant ...]
    [--tokens N ...] [--fp8 fp8-row|fp8-32] [--json]
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a file
import host.start

import torch
from triton.compiler import CompiledKernel

import prefill
from checkpoints.config import FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats, ModelConfig
from command_line.parser import ArgumentParser, positive_int
from command_line.run import run_main
from common.build import Build
from host.cli import path_name
from host.launch import LAUNCH_TABLE
from tools.compile_report import (
    PATHS,
    TARGETS,
    UNITS,
    WEIGHTS,
    Program,
    compile_kernel,
    cuobjdump,
    load_widths,
    meta_tensors,
    print_reports,
)

SEEN: dict[str, dict] = {}  # reports by the kernel's hash


def launches_of_block(
    target: str,
    quant: bool,
    n_tokens: int,
    config: ModelConfig = GPT_OSS_120B,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> Iterator[prefill.Launch]:
    """Yield the launches of a layer before the last and of the last; tensors have no data."""
    config = config.cut(2)
    row = LAUNCH_TABLE[target]
    build = Build(config.compiled(), row.tuning(config), quant)
    weights, state = meta_tensors(config, build.tuning, quant, UNITS[target], kv_dtype)
    return prefill.Prefill(config, build, row.blocks, weights, state).launches(0, n_tokens)


def compile_launch(target: str, kernel, arguments: tuple, options: dict) -> CompiledKernel:
    """Return Triton's compiled kernel of a launch of prefill.py."""
    return compile_kernel(target, kernel, dict(zip(kernel.arg_names, arguments)) | options, options)


def amd_report(compiled) -> dict:
    """Report registers, spills, products and loads of weights, from gfx950 assembly."""
    assembly = compiled.asm["amdgcn"]
    program = Program.from_amdgcn(assembly)

    def number(pattern: str) -> int:
        return int(re.search(pattern, assembly).group(1))

    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spills": number(r"\.vgpr_spill_count:\s+(\d+)"),
        "stack_bytes": number(r"; ScratchSize: (\d+)"),
        "products": len(program.find(r"^v_mfma_f32")),
        "scaled_products": len(program.find(r"^v_mfma_scale_f32_\w+_f8f6f4")),
        "weight_loads": load_widths(program, WEIGHTS),
    }


def nvidia_report(compiled) -> dict:
    """Report registers, spills, products and copies to shared memory, from sm_90 machine code.

    Copies in a loop are a thread's by their bits, in the loop that has most of them.
    """
    text = cuobjdump(compiled, "--dump-sass", "--dump-resource-usage")
    program = Program.from_sass(text)
    loops = [program.instructions[loop.start : loop.stop] for loop in program.loops()]
    widths = [re.findall(r"LDGSTS\.E(?:\.BYPASS)?\.?(\d*)", " ".join(loop)) for loop in loops]
    copies = [Counter(width or "32" for width in widths_in_loop) for widths_in_loop in widths]
    return {
        "registers": int(re.search(r"REG:(\d+)", text).group(1)),
        "spills": len(program.find(r"\b(?:LDL|STL)")),
        "stack_bytes": int(re.search(r"STACK:(\d+)", text).group(1)),
        "products": len(program.find(r"HGMMA")),
        "small_products": len(program.find(r"\bHMMA")),  # of single warps
        "copies_in_a_loop": dict(max(copies, key=Counter.total, default={})),
    }


def machine_code_report(target: str, compiled) -> dict:
    """Report on a kernel, from memory if it was reported before, as most kernels serve both paths."""
    if compiled.hash not in SEEN:
        SEEN[compiled.hash] = (amd_report if target == "gfx950" else nvidia_report)(compiled)
    return SEEN[compiled.hash]


def reports(target: str, quant: bool, token_counts: list[int], dense: DenseFormats) -> list[dict]:
    """Report on each kernel compiled for any of these numbers of tokens: figures, constants and launch options."""
    config = replace(GPT_OSS_120B, dense=dense)
    found = {}
    for n_tokens in token_counts:
        for kernel, _, values, options in launches_of_block(target, quant, n_tokens, config):
            constants = {name: v for name, v in options.items() if isinstance(v, int | str)}
            if "TILE" in options:
                constants["TILE"] = asdict(options["TILE"])
            key = (kernel.__name__, str(options), *(getattr(v, "dtype", None) for v in values))
            if key not in found:
                compiled = compile_launch(target, kernel, values, options)
                found[key] = {
                    "target": target,
                    "path": path_name(quant, dense),
                    "tokens": n_tokens,
                    "kernel": kernel.__name__,
                    "shared_bytes": compiled.metadata.shared,
                    **machine_code_report(target, compiled),
                    "options": constants,
                }
    return list(found.values())


def main() -> None:
    parser = ArgumentParser(description="What the compilers make of prefill.py.")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--path", nargs="*", choices=PATHS, default=[*PATHS])
    parser.add_argument("--tokens", nargs="*", type=positive_int, default=[128, 2048])
    parser.add_argument("--fp8", choices=(FP8_ROWS, FP8_GROUPS), help="QKV, O and the router in this format")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    args = parser.parse_args()
    dense = DenseFormats(qkv=args.fp8, o=args.fp8, router=args.fp8) if args.fp8 else DenseFormats()
    cases = [(target, PATHS[path]) for target in args.target for path in args.path]
    found = [figures for target, quant in cases for figures in reports(target, quant, args.tokens, dense)]
    print_reports(found, args.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
