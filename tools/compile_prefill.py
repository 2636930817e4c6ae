"""Compile the launches of prefill.py ahead of time, with no GPU, and report what the compiler made of each.

TRITON_INTERPRET=0 python -m tools.compile_prefill [--target gfx950|sm_90 ...] [--path default|quant ...]
    [--tokens N ...]
"""

import argparse
import os
import re
import sys

os.environ.setdefault("TRITON_INTERPRET", "0")

import torch
import triton
from triton.compiler import ASTSource

import prefill
from host.config import GPT_OSS_120B, ModelConfig
from host.launch import BLOCKS_GFX950, BLOCKS_SM_90
from host.state import new_state
from host.weights import Weights, weight_shapes
from tools.compile_report import PATHS, SCALED_MFMA, TARGETS, TRITON_TYPES, UNITS, pointer_attributes

BLOCKS = {"gfx950": BLOCKS_GFX950, "sm_90": BLOCKS_SM_90}
KERNELS = [name for name in vars(prefill) if name.endswith("_kernel")]


class Recorder:
    """In a kernel's place: notes what it would be launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def recorded_launches(target: str, quant: bool, n_tokens: int, config: ModelConfig = GPT_OSS_120B) -> list:
    """(kernel, arguments, options) of each kernel in a layer that is not the last, tensors without data."""
    config = config.cut(2)
    tuning = TARGETS[target][1]
    weights = Weights(*(torch.empty(s, dtype=d, device="meta") for s, d in weight_shapes(config, tuning)))
    state = new_state(config, tuning, quant, 4096, UNITS[target], "meta")
    launches: list = []
    kernels = {name: getattr(prefill, name) for name in KERNELS}
    try:
        for name, kernel in kernels.items():
            setattr(prefill, name, Recorder(kernel, launches))
        prefill.Prefill(config, tuning, BLOCKS[target], quant, weights, state).feed(0, n_tokens)
    finally:
        for name, kernel in kernels.items():
            setattr(prefill, name, kernel)
    return launches


def compile_launch(target: str, kernel, args: tuple, options: dict):
    """Triton's compiled kernel, with the attributes that a launch would give it."""
    names = kernel.arg_names
    given = dict(zip(names, args)) | {name: value for name, value in options.items() if name in names}
    signature, constants, attrs = {}, {}, {}
    for at, name in enumerate(names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TRITON_TYPES[value.dtype]
            attrs[(at,)] = pointer_attributes(target, value)
        elif name in args_not_constant(kernel):
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[(at,)] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    rest = {name: value for name, value in options.items() if name not in names}
    return triton.compile(source, target=TARGETS[target][0], options=rest)


def args_not_constant(kernel) -> set[str]:
    return {parameter.name for parameter in kernel.params if not parameter.is_constexpr}


def report(target: str, compiled) -> str:
    """Registers, spills and what matters of the machine code, in a line."""
    if target == "gfx950":
        assembly = compiled.asm["amdgcn"]
        found = {key: re.search(rf"\.{key}:\s+(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count")}
        counts = ", ".join(f"{key} {match.group(1)}" for key, match in found.items() if match)
        products = len(re.findall(r"v_mfma_\w+", assembly))
        return f"{counts}, shared {compiled.metadata.shared}, MFMA {products}, scaled {assembly.count(SCALED_MFMA)}"
    ptx = compiled.asm["ptx"]
    return (
        f"shared {compiled.metadata.shared}, wgmma {ptx.count('wgmma.mma_async')}, mma {ptx.count('mma.sync')}, "
        f"16-byte copies {len(re.findall(r'cp.async.cg.shared', ptx))}, smaller {len(re.findall(r'cp.async.ca', ptx))}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What the compilers make of prefill.py.")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--path", nargs="*", choices=PATHS, default=[*PATHS])
    parser.add_argument("--tokens", nargs="*", type=int, default=[128, 2048])
    args = parser.parse_args()
    for target in args.target:
        for path in args.path:
            for n_tokens in args.tokens:
                seen = set()
                for kernel, values, options in recorded_launches(target, PATHS[path], n_tokens):
                    key = (kernel.__name__, str(options), *(getattr(v, "dtype", None) for v in values))
                    if key not in seen:
                        seen.add(key)
                        compiled = compile_launch(target, kernel, values, options)
                        print(f"{target} {path} {n_tokens} {kernel.__name__}: {report(target, compiled)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
