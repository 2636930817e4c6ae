"""Compile the whole kernel ahead of time, with no GPU, and report what its compiler made of it.

    TRITON_INTERPRET=0 python tools/compile_report.py [--target gfx950|sm_90 ...] [--json] [--keep FOLDER]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gpt_oss_megakernel as mega
from host.config import GPT_OSS_120B, ModelConfig
from host.launch import GFX950, SM_90, Tuning, next_power_of_2
from host.weights import Weights, weight_shapes

TARGETS = {"gfx950": (GPUTarget("hip", "gfx950", 64), GFX950), "sm_90": (GPUTarget("cuda", 90, 32), SM_90)}
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def compile_megakernel(target: str, quant: bool, config: ModelConfig = GPT_OSS_120B, tuning: Tuning | None = None):
    """Triton's compiled kernel for "gfx950" or "sm_90", with the attributes that a launch would give it."""
    gpu, default_tuning = TARGETS[target]
    tuning = tuning or default_tuning
    n_programs = 132 * tuning.programs_per_unit
    weights = Weights(*(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in weight_shapes(config)))
    state = mega.new_state(config, tuning, quant, 4096, n_programs, "meta")
    names = mega.megakernel.arg_names
    constants = {"CONFIG": config, "TUNING": tuning, "QUANT": quant, "BLOCK_P": next_power_of_2(n_programs)}
    signature = {
        "w": Weights(*(TRITON_TYPES[t.dtype] for t in weights)),
        "s": mega.State(*(TRITON_TYPES[t.dtype] for t in state)),
        **{name: "constexpr" if name in constants else "i32" for name in names[2:]},
    }
    aligned = [["tt.divisibility", 16]]
    attrs = {(arg, field): aligned for arg, group in enumerate((weights, state)) for field in range(len(group))}
    attrs[(names.index("max_context"),)] = aligned
    source = ASTSource(
        fn=mega.megakernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    options = {"num_warps": tuning.num_warps}
    if gpu.backend == "cuda":
        options["launch_cooperative_grid"] = True
    return triton.compile(source, target=gpu, options=options)


def amd_report(kernel) -> dict:
    """Registers, spills, scratch, and the instructions that matter, from gfx950 assembly."""
    asm = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        return int(re.search(pattern, asm).group(1))

    return {
        "vgprs": number(r"\.vgpr_count:\s+(\d+)"),
        "sgprs": number(r"\.sgpr_count:\s+(\d+)"),
        "vgpr_spills": number(r"\.vgpr_spill_count:\s+(\d+)"),
        "sgpr_spills": number(r"\.sgpr_spill_count:\s+(\d+)"),
        "scratch_bytes": number(r"; ScratchSize: (\d+)"),
        "shared_bytes": kernel.metadata.shared,
        "scaled_mfma": asm.count("v_mfma_scale_f32_16x16x128_f8f6f4"),
        "loads_16_bytes": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
    }


def nvidia_report(kernel) -> dict:
    """Registers, stack and load widths, from sm_90 machine code."""
    sass = cuobjdump(kernel, "--dump-sass")
    usage = cuobjdump(kernel, "--dump-resource-usage")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "local_loads": len(re.findall(r"\bLDL\b", sass)),
        "shared_bytes": kernel.metadata.shared,
        "loads_16_bytes": len(re.findall(r"LDG\.E(?:\.\w+)*\.128", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
    }


def cuobjdump(kernel, option: str) -> str:
    """Output of the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def report(target: str, quant: bool, keep: Path | None = None) -> dict:
    kernel = compile_megakernel(target, quant)
    figures = amd_report(kernel) if target == "gfx950" else nvidia_report(kernel)
    if keep:
        name = f"{target}{'-quant' if quant else ''}"
        text = kernel.asm["amdgcn"] if target == "gfx950" else cuobjdump(kernel, "--dump-sass")
        (keep / f"{name}.s").write_text(text)
        (keep / f"{name}.ttgir").write_text(kernel.asm["ttgir"])
    return {"target": target, "path": "quant" if quant else "default", **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    parser.add_argument("--keep", type=Path, help="also write the assembly into this folder")
    args = parser.parse_args()
    reports = [report(target, quant, args.keep) for target in args.target for quant in (False, True)]
    if args.json:
        print(json.dumps(reports))
        return
    for figures in reports:
        print(", ".join(f"{key} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
