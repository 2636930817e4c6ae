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

os.environ.setdefault("TRITON_INTERPRET", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gpt_oss_megakernel as mega
from host.config import GPT_OSS_120B, ModelConfig
from host.launch import GFX950, SM_90, Tuning, next_power_of_2
from host.state import State, new_state
from host.weights import Weights, weight_shapes

TARGETS = {"gfx950": (GPUTarget("hip", "gfx950", 64), GFX950), "sm_90": (GPUTarget("cuda", 90, 32), SM_90)}
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def compile_megakernel(target: str, quant: bool, config: ModelConfig = GPT_OSS_120B, tuning: Tuning | None = None):
    """Triton's compiled kernel for "gfx950" or "sm_90", with the attributes that a launch would give it."""
    gpu, default_tuning = TARGETS[target]
    tuning = tuning or default_tuning
    n_programs = 132 * tuning.programs_per_unit
    weights = Weights(
        *(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in weight_shapes(config, tuning))
    )
    state = new_state(config, tuning, quant, 4096, n_programs, "meta")
    names = mega.megakernel.arg_names
    constants = {
        "CONFIG": config,
        "TUNING": tuning,
        "QUANT": quant,
        "BLOCK_P": next_power_of_2(n_programs),
        "TRACE": False,
    }
    signature = {
        "w": Weights(*(TRITON_TYPES[t.dtype] for t in weights)),
        "s": State(*(TRITON_TYPES[t.dtype] for t in state)),
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
    return triton.compile(source, target=gpu, options=tuning.options())


def amd_report(kernel) -> dict:
    """Registers, spills, scratch, barriers and the instructions that matter, from gfx950 assembly."""
    asm = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        return int(re.search(pattern, asm).group(1))

    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spilled_registers": number(r"\.vgpr_spill_count:\s+(\d+)"),
        "spilled_scalars": number(r"\.sgpr_spill_count:\s+(\d+)"),
        "stack_bytes": number(r"; ScratchSize: (\d+)"),
        "shared_bytes": kernel.metadata.shared,
        "loads_16_bytes": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
        "scaled_mfma": asm.count("v_mfma_scale_f32_16x16x128_f8f6f4"),
        **amd_barriers(Program.from_amdgcn(asm)),
    }


def amd_barriers(program: "Program") -> dict:
    """How the arrivals, acquires and polls of the grid barriers came out on gfx950.

    An arrival writes the cache back at device scope and waits for that, then adds; an acquire invalidates.
    """
    adds = program.find(r"global_atomic_add ")
    polls = [i for i in program.find(r"global_load_dword .* sc1") if not program.within(i, 4, "buffer_inv sc1")]
    return {
        "arrivals": sum(amd_written_back(program, i) for i in adds),
        "arrivals_drained": sum(amd_drained(program, i) for i in adds),
        "acquires": len(program.find(r"buffer_inv sc1")) - len(program.find(r"global_atomic_cmpswap")),
        "polls_in_loops": sum(program.repeats(i, r"buffer_wbl2") for i in polls),
    }


def amd_written_back(program: "Program", arrival: int) -> bool:
    """Whether the cache is written back, and that waited for, after the last store before an arrival."""
    write_back = program.last_before(arrival, r"buffer_wbl2 sc1")
    store = program.last_before(arrival, r"(?:global|buffer|flat)_store")
    return store < write_back and program.within(write_back + 1, 0, r"s_waitcnt vmcnt\(0\)")


def amd_drained(program: "Program", arrival: int) -> bool:
    """Whether every wave waits for its own stores before the workgroup barrier that precedes an arrival."""
    barrier = program.last_before(arrival, r"s_barrier")
    drain = program.last_before(barrier, r"s_waitcnt vmcnt\(0\) lgkmcnt\(0\)")
    store = program.last_before(arrival, r"(?:global|buffer|flat)_store")
    return store < drain < barrier


def nvidia_report(kernel) -> dict:
    """Registers, stack, load widths and barriers, from sm_90 machine code."""
    sass = cuobjdump(kernel, "--dump-sass")
    usage = cuobjdump(kernel, "--dump-resource-usage")
    program = Program.from_sass(sass)
    arrivals = program.find(r"MEMBAR\.ALL\.GPU", r"ERRBAR", r"CGAERRBAR", r"(?:REDG|ATOMG)\.E\.ADD\.STRONG\.GPU")
    polls = [i for i in program.find(r"LDG\.E\.STRONG\.GPU") if not program.within(i, 2, r"CCTL\.IVALL")]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "reloads": len(program.find(r"\bLDL")),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared_bytes": kernel.metadata.shared,
        "loads_16_bytes": len(program.find(r"LDG\.E(?:\.\w+)*\.128")),
        "arrivals": len(arrivals),
        "acquires": len(program.find(r"CCTL\.IVALL")),
        "polls_in_loops": sum(program.repeats(i, r"MEMBAR") for i in polls),
    }


class Program:
    """A kernel's instructions in order, and which may follow which."""

    def __init__(self, instructions: list[str], targets: dict[int, int], ends: set[int]):
        """targets: branch -> where it goes; ends: instructions that do not fall through to the next."""
        self.instructions, self._targets, self._ends = instructions, targets, ends

    @classmethod
    def from_amdgcn(cls, asm: str) -> "Program":
        instructions, labels = [], {}
        for line in asm.splitlines():
            code = line.split(";")[0].strip()
            if label := re.match(r"(\.LBB\w+):", code):
                labels[label.group(1)] = len(instructions)
            elif re.match(r"[a-z]+_", code):
                instructions.append(code)
        targets, ends = {}, set()
        for i, code in enumerate(instructions):
            if branch := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", code):
                targets[i] = labels[branch.group(1)]
            if code.startswith(("s_branch", "s_endpgm")):
                ends.add(i)
        return cls(instructions, targets, ends)

    @classmethod
    def from_sass(cls, sass: str) -> "Program":
        instructions, places = [], {}
        for address, code in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE):
            places[int(address, 16)] = len(instructions)
            instructions.append(code)
        targets, ends = {}, set()
        for i, code in enumerate(instructions):
            if branch := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", code):
                targets[i] = places[int(branch.group(1), 16)]
            if code.startswith(("BRA", "EXIT")):
                ends.add(i)
        return cls(instructions, targets, ends)

    def find(self, *patterns: str) -> list[int]:
        """Where consecutive instructions match the patterns; the position of the last one."""
        n = len(patterns)
        runs = zip(*(self.instructions[k:] for k in range(n)), strict=False)
        return [i + n - 1 for i, run in enumerate(runs) if all(map(re.search, patterns, run))]

    def within(self, i: int, n: int, pattern: str) -> bool:
        return any(re.search(pattern, code) for code in self.instructions[i : i + n + 1])

    def last_before(self, i: int, pattern: str) -> int:
        """The nearest earlier match, -1 if there is none."""
        return next((k for k in range(i - 1, -1, -1) if re.search(pattern, self.instructions[k])), -1)

    def repeats(self, i: int, without: str) -> bool:
        """Whether instruction i can run again with none that matches `without` in between."""
        seen, todo = set(), self._next(i)
        while todo:
            k = todo.pop()
            if k == i:
                return True
            if k not in seen and not re.search(without, self.instructions[k]):
                seen.add(k)
                todo += self._next(k)
        return False

    def _next(self, i: int) -> list[int]:
        following = [] if i in self._ends or i + 1 == len(self.instructions) else [i + 1]
        return following + ([self._targets[i]] if i in self._targets else [])


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
