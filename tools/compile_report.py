"""Compile the whole kernel ahead of time, with no GPU, and report what its compiler made of it.

TRITON_INTERPRET=0 python tools/compile_report.py [--target gfx950|sm_90 ...] [--path default|quant ...]
    [--fp8 fp8-row|fp8-32] [--json] [--keep FOLDER]
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import host.start

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import gpt_oss_megakernel as mega
from checkpoints.config import BF16, FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats, ModelConfig
from command_line.parser import ArgumentParser
from command_line.run import run_main
from common.build import Build, Matrix, Operand
from common.gemv_fp4 import gemv_fp4, gemv_fp4_fp8
from host.cli import path_name
from host.launch import GFX950, LAUNCH_TABLE, programs_on
from host.state import State, new_state
from host.tuning import Tuning
from host.weights import Weights, weight_shapes
from measure.report import check_output_file, write_file

TARGETS = {"gfx950": GPUTarget("hip", "gfx950", 64), "sm_90": GPUTarget("cuda", 90, 32)}  # rows of LAUNCH_TABLE
PATHS = {"default": False, "quant": True}
UNITS = {"gfx950": 256, "sm_90": 132}  # CUs of an MI355X, SMs of an H200
SIMDS, SIMD_REGISTERS, CU_SHARED_BYTES = 4, 512, 160 << 10  # of a CU; registers a lane
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


ALIGNED, SMALL = [["tt.divisibility", 16]], [["tt.pointer_range", 32]]
SCALED_MFMA = "v_mfma_scale_f32_16x16x128_f8f6f4"
PRODUCT = r"v_(?:pk_)?(?:fma|fmac)_f32"
# The source lines that load weights and scales.
DENSE = re.compile(r"tl\.load\(w_ptr ")
WEIGHTS = re.compile(r"tl\.load\((?:w_ptr|blocks_ptr|bytes_ptr|matrix\.ptr) ")
SCALES = re.compile(r"tl\.load\(scales?_ptr \+ rows")


def compile_megakernel(
    target: str,
    quant: bool,
    config: ModelConfig = GPT_OSS_120B,
    tuning: Tuning | None = None,
    kv_dtype: torch.dtype = torch.bfloat16,
    trace: bool = False,
) -> CompiledKernel:
    """Return Triton's compiled kernel for "gfx950" or "sm_90", with the attributes that a launch would give it."""
    tuning = tuning or LAUNCH_TABLE[target].tuning(config)
    n_programs = programs_on(UNITS[target], tuning)
    weights, state = meta_tensors(config, tuning, quant, n_programs, kv_dtype)
    build = Build(config.compiled(), tuning, quant, trace)
    numbers = dict(position=0, want_token=1, want_logits=0, n_layers=config.n_layers, n_programs=n_programs)
    arguments = dict(w=weights, s=state, **numbers, max_context=4096, peers=())
    constants = {"BUILD": build, "BLOCK_P": triton.next_power_of_2(n_programs)}
    return compile_kernel(target, mega.megakernel, arguments, constants | tuning.options(), aligned=("max_context",))


def compile_kernel(target: str, kernel, arguments: dict, options: dict, aligned: tuple[str, ...] = ()):
    """Return Triton's compiled kernel, with the attributes that a launch would give it.

    arguments: by name, tensors without data among them. options: constexprs by name, and those of the launch.
    aligned: integers that 16 divides, of which Triton's launch tells the compiler.
    """
    names, signature, constants, attrs = kernel.arg_names, {}, {}, {}
    for at, name in enumerate(names):
        if kernel.params[at].is_constexpr:
            signature[name] = "constexpr"
            constants[(at,)] = options[name]
            continue
        signature[name] = type_of(arguments[name])
        for path, pointer in pointers(arguments[name], (at,)):
            attrs[path] = pointer_attributes(target, pointer)
        if name in aligned:
            attrs[(at,)] = ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    rest = {name: value for name, value in options.items() if name not in names}
    return triton.compile(source, target=TARGETS[target], options=rest)


def type_of(value) -> str | tuple:
    """Return the type of an argument, or the types of a tuple's elements, as Triton names them."""
    if isinstance(value, tuple):
        types = [type_of(element) for element in value]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    return "i32" if isinstance(value, int) else TRITON_TYPES[value.dtype]


def pointers(value, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield the place of each tensor in an argument, which may be a tuple of tuples, and the tensor."""
    if isinstance(value, tuple):
        for n, element in enumerate(value):
            yield from pointers(element, (*path, n))
    elif hasattr(value, "data_ptr"):
        yield path, value


def meta_tensors(
    config: ModelConfig, tuning: Tuning, quant: bool, n_programs: int, kv_dtype: torch.dtype = torch.bfloat16
) -> tuple[Weights, State]:
    """Return the weights and the state of a context of 4,096 positions, without data."""
    shapes = weight_shapes(config, tuning)
    weights = Weights(*(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes))
    return weights, new_state(config, tuning, quant, 4096, n_programs, "meta", kv_dtype)


def pointer_attributes(target: str, tensor) -> list:
    """Return what a launch tells the compiler about a tensor, or about a pointer into another GPU's memory.

    On AMD, buffer instructions read tensors below 2 GiB.
    """
    small = isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.element_size() < 1 << 31
    return ALIGNED + (SMALL if target == "gfx950" and small else [])


@triton.jit
def expert_tile(
    out, blocks, scales, x, x_scale, row0, MATRIX: tl.constexpr, QUANT: tl.constexpr, MACHINE: tl.constexpr
):
    """Multiply one tile of an expert's matrix, so that its instructions can be counted."""
    EXPERTS: tl.constexpr = MACHINE.experts
    matrix = Operand(blocks, scales)
    if QUANT:
        y = gemv_fp4_fp8(matrix, Operand(x, x_scale), row0, MATRIX, EXPERTS, True)
    else:
        y = gemv_fp4(matrix, x, row0, MATRIX, EXPERTS)
    tl.store(out + tl.arange(0, MATRIX.tile_rows), y)


def compile_expert_tile(quant: bool, m: int, block_k: int, k: int):
    """Compile a tile of m rows of k elements for gfx950, with its tuning."""
    small, large = 1 << 10, 1 << 31
    sizes = {
        "out": (small, torch.float32),
        "blocks": (large, torch.int32),
        "scales": (large, torch.uint8),
        "x": (small, torch.float8_e4m3fn if quant else torch.float32),
        "x_scale": (small, torch.uint8),
    }
    tensors = {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}
    matrix = Matrix("", GPT_OSS_120B.hidden_size, k, "mxfp4", m, block_k)
    constants = {"MATRIX": matrix, "QUANT": quant, "MACHINE": GFX950.machine}
    arguments, options = tensors | {"row0": 0}, constants | GFX950.options()
    return compile_kernel("gfx950", expert_tile, arguments, options, aligned=("row0",))


def amd_tile_report(quant: bool) -> dict:
    """Count the scaled MFMAs of a wave for a block over K of each expert tile, and check its loops' pipelining.

    Loads are ahead if products stand between them and the wait for them, in front if they stand before all products.
    """
    k = GPT_OSS_120B.hidden_size
    figures = {}
    for name, m, block_k in (
        (
            "gate_up",
            max(GFX950.experts.gate_up_rows, 64) if quant else GFX950.experts.gate_up_rows,
            GFX950.experts.gate_up_k,
        ),
        ("down", GFX950.experts.down_rows, GFX950.experts.down_k),
    ):
        one_block = compile_expert_tile(quant, m, block_k, block_k).asm["amdgcn"]
        figures[f"{name}_mfma_per_block"] = one_block.count(SCALED_MFMA)
        figures[f"{name}_first_loads"] = len(expert_loads(Program.from_amdgcn(one_block)))
        program = Program.from_amdgcn(compile_expert_tile(quant, m, block_k, k).asm["amdgcn"])
        product = SCALED_MFMA if quant else PRODUCT
        loads, first_product = expert_loads(program), program.find(product)[0]
        ahead = [i for i in loads if product_before_wait(program, i, product)]
        figures[f"{name}_loads"] = len(loads)
        figures[f"{name}_loads_in_front"] = sum(i < first_product for i in loads)
        figures[f"{name}_loads_ahead"] = len(ahead)
    return figures


def expert_loads(program: "Program") -> list[int]:
    """Find loads of FP4 blocks in a tile's program; loads of activations, a small tensor, are buffer instructions."""
    return program.find(r"global_load_dwordx4")


def product_before_wait(program: "Program", load: int, product: str) -> bool:
    """Return whether products follow a load before its wait: vmcnt(n) waits for all loads but the last n."""
    later = 0
    for code in program.instructions[load + 1 :]:
        if re.search(product, code):
            return True
        later += bool(re.match(r"(?:global|buffer|flat)_(?:load|store)", code))
        if (wait := re.search(r"vmcnt\((\d+)\)", code)) and int(wait.group(1)) <= later:
            return False
    return False


def amd_report(kernel) -> dict:
    """Report registers, spills, scratch, barriers and important instructions, from gfx950 assembly."""
    asm = kernel.asm["amdgcn"]
    program = Program.from_amdgcn(asm)

    def number(pattern: str) -> int:
        return int(re.search(pattern, asm).group(1))

    registers = number(r"\.vgpr_count:\s+(\d+)")
    waves = SIMDS * (SIMD_REGISTERS // (-(-registers // 8) * 8))
    return {
        "registers": registers,
        "programs_resident": min(waves // kernel.metadata.num_warps, CU_SHARED_BYTES // max(1, kernel.metadata.shared)),
        "spilled_registers": number(r"\.vgpr_spill_count:\s+(\d+)"),
        "spilled_scalars": number(r"\.sgpr_spill_count:\s+(\d+)"),
        "stack_bytes": number(r"; ScratchSize: (\d+)"),
        "shared_bytes": kernel.metadata.shared,
        "loads_16_bytes": len(program.find(r"_load_dwordx4")),
        "weight_loads": load_widths(program, WEIGHTS),
        "scale_loads": load_widths(program, SCALES),
        "dense_loads_ahead": sum(product_before_wait(program, i, PRODUCT) for i in program.loads_of(DENSE, "dwordx4")),
        "scaled_mfma": asm.count(SCALED_MFMA),
        **amd_barriers(program),
    }


def load_widths(program: "Program", source: re.Pattern) -> dict[str, int]:
    """Count the loads of each width that come from source lines which match."""
    loads = (program.instructions[i] for i in program.loads_of(source))
    return dict(Counter(re.search(r"_load_(\w+)", code).group(1) for code in loads))


def amd_barriers(program: "Program") -> dict:
    """Count arrivals, acquires and polls of the grid barriers on gfx950.

    An arrival writes the cache back at device scope, waits for that, then adds; an acquire invalidates.
    """
    adds = program.find(r"global_atomic_add ")
    aborts = len(program.find(r"global_atomic_cmpswap"))  # with a write-back and an invalidation of their own
    polls = [i for i in program.find(r"global_load_dword .* sc1") if not program.within(i, 4, "buffer_inv sc1")]
    return {
        "arrivals": sum(amd_written_back(program, i) for i in adds),
        "arrivals_drained": sum(amd_drained(program, i) for i in adds),
        "arrival_waits": sorted(amd_arrival_waits(program, i) for i in adds),
        "write_backs": len(program.find(r"buffer_wbl2")) - aborts,
        "acquires": len(program.find(r"sc[01]$", r"s_waitcnt vmcnt\(0\)", r"buffer_inv sc1")),
        "invalidations": len(program.find(r"buffer_inv")) - aborts,
        "polls_in_loops": sum(program.repeats(i, r"buffer_wbl2|buffer_inv") for i in polls),
    }


def amd_arrival_waits(program: "Program", arrival: int) -> int:
    """Count how many times an arrival waits for memory, from the drain of its wave's stores on."""
    barrier = program.last_before(arrival, r"s_barrier")
    drain = program.last_before(barrier, r"s_waitcnt vmcnt\(0\) lgkmcnt\(0\)")
    return sum("vmcnt" in code for code in program.instructions[drain:arrival])


def amd_written_back(program: "Program", arrival: int) -> bool:
    """Return whether the cache is written back, and waited for, after the last store before an arrival."""
    write_back = program.last_before(arrival, r"buffer_wbl2 sc1")
    store = program.last_before(arrival, r"(?:global|buffer|flat)_store")
    return store < write_back and program.within(write_back + 1, 0, r"s_waitcnt vmcnt\(0\)")


def amd_drained(program: "Program", arrival: int) -> bool:
    """Return whether every wave waits for its own stores before the workgroup barrier that precedes an arrival."""
    barrier = program.last_before(arrival, r"s_barrier")
    drain = program.last_before(barrier, r"s_waitcnt vmcnt\(0\) lgkmcnt\(0\)")
    store = program.last_before(arrival, r"(?:global|buffer|flat)_store")
    return store < drain < barrier


def nvidia_report(kernel) -> dict:
    """Report registers, stack, copies, load widths and barriers, from sm_90 machine code."""
    sass = cuobjdump(kernel, "--dump-sass")
    usage = cuobjdump(kernel, "--dump-resource-usage")
    program = Program.from_sass(sass)
    arrivals = program.find(r"MEMBAR\.ALL\.GPU", r"ERRBAR", r"CGAERRBAR", r"(?:REDG|ATOMG)\.E\.ADD\.STRONG\.GPU")
    polls = [i for i in program.find(r"LDG\.E\.STRONG\.GPU") if program.within(i, 2, r"CCTL\.IVALL")]  # acquiring ones
    spills = program.find(r"\b(?:LDL|STL)")
    # Loops over tiles, batches of tiles, and keys; the loop over layers is left out because it holds barriers.
    loops = [loop for loop in program.loops() if not program.within(loop.start, len(loop) - 1, "MEMBAR")]
    evict_first = [program.instructions[i] for i in program.find(r"LDG\.E\.EF")]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(spills),  # to the stack and back
        "spills_in_a_loop": max(sum(i in loop for i in spills) for loop in loops),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared_bytes": kernel.metadata.shared,
        "bulk_copies": len(program.find(r"UBLKCP")),
        "loads_16_bytes": len(program.find(r"LDG\.E(?:\.\w+)*\.128")),
        "shared_loads_16_bytes": len(program.find(r"LDS\.128")),
        "weight_loads": dict(Counter(re.search(r"LDG\.E\.EF\.?(\w*)", code).group(1) for code in evict_first)),
        "arrivals": len(arrivals),
        "acquires": len(program.find(r"CCTL\.IVALL")),
        "polls_in_loops": sum(program.repeats(i, r"MEMBAR") for i in polls),
    }


class Program:
    """A kernel's instructions in order, and which may follow which."""

    def __init__(
        self, instructions: list[str], targets: dict[int, int], ends: set[int], sources: list[str] | None = None
    ):
        """Keep the instructions and their order.

        targets: branch -> where it goes; ends: instructions that do not fall through; sources: lines of Python.
        """
        self.instructions, self._targets, self._ends, self.sources = instructions, targets, ends, sources or []

    @classmethod
    def from_amdgcn(cls, asm: str) -> "Program":
        instructions, labels, sources = [], {}, []
        files, source = {}, ""
        for line in asm.splitlines():
            code = line.split(";")[0].strip()
            if file := re.match(r'\.file\s+(\d+) "(.*?)" "(.*?)"', code):
                files[file.group(1)] = source_lines(file.group(2), file.group(3))
            elif place := re.match(r"\.loc\s+(\d+) (\d+)", code):
                if place.group(2) != "0":
                    lines = files[place.group(1)]
                    source = lines[int(place.group(2)) - 1] if lines else ""
            elif label := re.match(r"(\.LBB\w+):", code):
                labels[label.group(1)] = len(instructions)
            elif re.match(r"[a-z]+_", code):
                instructions.append(code)
                sources.append(source)
        targets, ends = {}, set()
        for i, code in enumerate(instructions):
            if branch := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", code):
                targets[i] = labels[branch.group(1)]
            if code.startswith(("s_branch", "s_endpgm")):
                ends.add(i)
        return cls(instructions, targets, ends, sources)

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
        """Return where consecutive instructions match the patterns, by the position of the last one."""
        n = len(patterns)
        runs = zip(*(self.instructions[k:] for k in range(n)), strict=False)
        return [i + n - 1 for i, run in enumerate(runs) if all(map(re.search, patterns, run))]

    def loads_of(self, source: re.Pattern, width: str = "") -> list[int]:
        """Return where memory is loaded in pieces of `width`, from source lines that match."""
        return [i for i in self.find(f"^(?:global|buffer|flat)_load_{width}") if source.search(self.sources[i])]

    def within(self, i: int, n: int, pattern: str) -> bool:
        return any(re.search(pattern, code) for code in self.instructions[i : i + n + 1])

    def last_before(self, i: int, pattern: str) -> int:
        """Return the nearest earlier match, -1 if there is none."""
        return next((k for k in range(i - 1, -1, -1) if re.search(pattern, self.instructions[k])), -1)

    def loops(self) -> list[range]:
        """Return the loops, as runs of consecutive instructions, which they are in machine code."""
        return [range(start, end + 1) for end, start in self._targets.items() if start <= end]

    def repeats(self, i: int, without: str) -> bool:
        """Return whether instruction i can run again without one that matches `without` in between."""
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


@functools.cache
def source_lines(folder: str, name: str) -> list[str]:
    """Return the lines of a file of this checkout; none for a file of Triton's.

    Triton keeps compiled kernels for all checkouts. The paths in one may belong to another checkout, which had equal
    lines and may no longer exist. So `folder` is looked for here by its last two names, then its last, then none.
    """
    root = Path(__file__).resolve().parent.parent
    *_, outer, inner = ("", *folder.strip("/").split("/"))
    found = [path for at in (Path(outer, inner), Path(inner), Path()) if (path := root / at / name).is_file()]
    return found[0].read_text().splitlines() if found else []


def cuobjdump(kernel, *options: str) -> str:
    """Return the output of the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def report(target: str, quant: bool, dense: DenseFormats, keep: Path | None = None) -> dict:
    kernel = compile_megakernel(target, quant, replace(GPT_OSS_120B, dense=dense))
    figures = amd_report(kernel) | amd_tile_report(quant) if target == "gfx950" else nvidia_report(kernel)
    if keep:
        name = f"{target}{'-quant' if quant else ''}{f'-{dense.qkv}' if dense.qkv != BF16 else ''}"
        text = kernel.asm["amdgcn"] if target == "gfx950" else cuobjdump(kernel, "--dump-sass")
        write_file("--keep", keep / f"{name}.s", text.encode())
        write_file("--keep", keep / f"{name}.ttgir", kernel.asm["ttgir"].encode())
    return {"target": target, "path": path_name(quant, dense), **figures}


def print_reports(reports: list[dict], as_json: bool) -> None:
    """Print a line for each report, or all as one JSON list."""
    if as_json:
        print(json.dumps(reports))
        return
    for figures in reports:
        print(", ".join(f"{key} {value}" for key, value in figures.items()))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--path", nargs="*", choices=PATHS, default=list(PATHS))
    parser.add_argument("--fp8", choices=(FP8_ROWS, FP8_GROUPS), help="QKV, O and the LM head in this format")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    parser.add_argument("--keep", type=Path, help="also write the assembly into this folder")
    args = parser.parse_args()
    if args.keep:
        check_output_file("--keep", args.keep / "x.s")
    dense = DenseFormats(qkv=args.fp8, o=args.fp8, head=args.fp8) if args.fp8 else DenseFormats()
    reports = [report(target, PATHS[path], dense, args.keep) for target in args.target for path in args.path]
    print_reports(reports, args.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
