"""Compile the launches of a checkout ahead of time, with no GPU, and keep their machine code in a comparable form.

    python tools/machine_code.py CHECKOUT --store FOLDER --index FILE.json [--only PATTERN] [--jobs N] [--label TEXT]

tools/compare_code.py runs this in a process of its own for each checkout, whose tools/launches.py says what there is to
compile. The index maps each launch's name to a key: FOLDER/KEY.s is its machine code without names, FOLDER/KEY.json its
figures. Launches that the index has already are not compiled again. The key is that of Triton's first stage, TTIR
without names and places in the source: what agrees in it is compiled once, in whichever checkout it comes first.
"""

import argparse
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import triton
from tqdm import tqdm
from triton.compiler import CompiledKernel

VERSION = f"{triton.__version__} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
ERROR = "error: "  # in a key's place
QUIET_SECONDS = 10  # between two lines of progress where there is no terminal

# Sections of a listing that no GPU executes or reads: they hold names, files and lines, or repeat what the code says.
LEFT_OUT = re.compile(r"\.(?:nv_)?debug|\.nv\.(?:info|callgraph)|\.note")
SECTION = re.compile(r'\.section\s+"?([\w.$-]+)|\.(text|amdgpu_metadata)$')
PLACES = re.compile(r"\.(?:loc|file|ident|cfi_\w+)\b|\.L(?:tmp|func_begin|func_end)\d+:$")
ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")


class Kept(Exception):
    """Raised to end a compilation whose machine code is already in the store."""


def amd_code(assembly: str, kernel_name: str) -> list[str]:
    """Return the instructions, data and numbers of gfx950 assembly, one per line."""
    return _without_names((line.split(";")[0] for line in assembly.splitlines()), kernel_name)


def nvidia_code(listing: str, kernel_name: str) -> list[str]:
    """Return the instructions and data that `nvdisasm -hex` prints, one per line, instructions with their encoding.

    The encoding's second half, on a line of its own there, holds what an instruction waits for.
    """
    lines: list[str] = []
    for line in listing.splitlines():
        line = ENCODING.sub(r"\1", line)
        line = re.sub(r"/\*[0-9a-f]{4,}\*/|//.*", "", line)
        if line.lstrip().startswith("0x") and lines:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return _without_names(lines, kernel_name)


def _without_names(lines: Iterable[str], kernel_name: str) -> list[str]:
    """Keep what GPUs execute or read: the kernel is called "kernel", and labels are numbered in order."""
    name = re.compile(rf"\b{re.escape(kernel_name)}\b")
    code, labels, left_out = [], {}, False
    for line in lines:
        line = name.sub("kernel", " ".join(line.split()))
        if section := SECTION.match(line):
            left_out = bool(LEFT_OUT.match(section.group(1) or f".{section.group(2)}"))
        if line and not left_out and not PLACES.match(line):
            code.append(line)
            if label := re.match(r"(\.L\w+):", line):
                labels[label.group(1)] = f".L{len(labels)}"
    return [re.sub(r"\.L\w+", lambda label: labels.get(label.group(), label.group()), line) for line in code]


def amd_figures(assembly: str, code: list[str]) -> dict[str, int]:
    """Return instructions, registers and spills, from gfx950 assembly and its amd_code."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return {
        "instructions": sum(bool(re.match("[a-z]+_", line)) for line in code),
        "registers": number("vgpr_count"),
        "scalar registers": number("sgpr_count"),
        "spills": number("vgpr_spill_count"),
        "scalar spills": number("sgpr_spill_count"),
        "stack bytes": number("private_segment_fixed_size"),
    }


def nvidia_figures(usage: str, code: list[str]) -> dict[str, int]:
    """Return instructions, registers and spills, from nvidia_code and `cuobjdump --dump-resource-usage`."""
    instructions = [line for line in code if re.search(r"; 0x[0-9a-f]{16} 0x[0-9a-f]{16}$", line)]
    return {
        "instructions": sum(not line.startswith("NOP") for line in instructions),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": sum(bool(re.match(r"(?:@!?U?P\w+ )?(?:LDL|STL)\b", line)) for line in instructions),
        "stack bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
    }


def code_and_figures(kernel: CompiledKernel) -> tuple[list[str], dict[str, int]]:
    """Return a compiled kernel's machine code, one instruction per line, and its figures."""
    metadata = kernel.metadata
    if assembly := kernel.asm.get("amdgcn"):
        code = amd_code(assembly, metadata.name)
        figures = amd_figures(assembly, code)
    else:
        tools = triton.knobs.nvidia
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            code = nvidia_code(_output(tools.nvdisasm.path, "-hex", file.name), metadata.name)
            figures = nvidia_figures(_output(tools.cuobjdump.path, "--dump-resource-usage", file.name), code)
    launch = {"shared bytes": metadata.shared, "warps": metadata.num_warps}
    return code, {**figures, **launch, "cooperative": int(metadata.launch_cooperative_grid)}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ttir_key(ttir: str, target: object, options: object) -> str:
    """Hash what machine code depends on: TTIR with functions numbered instead of named, and its compiler options."""
    for number, name in enumerate(re.findall(r"tt\.func .*?@([\w.$]+)\(", ttir)):
        ttir = re.sub(rf"@{re.escape(name)}\(", f"@function{number}(", ttir)
    return hashlib.sha256(f"{VERSION}\n{target}\n{options}\n{ttir}".encode()).hexdigest()[:32]


def compile_into(store: Path, compile_launch: Callable[[], CompiledKernel]) -> str:
    """Compile a launch into the store and return its key; "error: ..." if it does not compile."""
    key = ""

    def after_ttir(backend, stages, options, language, capability) -> None:
        lower = stages["ttgir"]

        def lower_unless_kept(module, metadata):
            nonlocal key
            key = ttir_key(module.str_nodebug(), backend.target, options)
            if (store / f"{key}.json").exists():
                raise Kept
            return lower(module, metadata)

        stages["ttgir"] = lower_unless_kept

    triton.knobs.runtime.add_stages_inspection_hook = after_ttir
    try:
        code, figures = code_and_figures(compile_launch())
    except Kept:
        return key
    except (triton.TritonError, RuntimeError) as error:
        return ERROR + str(error).strip().split("\n")[-1]
    _write(store / f"{key}.s", "\n".join(code) + "\n")
    _write(store / f"{key}.json", json.dumps(figures))  # last, as it says that both are there
    return key


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


_launches: dict[str, Callable[[], CompiledKernel]] = {}  # of the checkout


def _read_launches() -> None:
    sys.stdout = sys.stderr  # Triton prints what an assembler refuses
    _launches.update(importlib.import_module("tools.launches").launches())


def _compile_named(store: Path, name: str) -> str:
    return compile_into(store, _launches[name])


def compile_all(names: list[str], store: Path, jobs: int, label: str) -> Iterator[tuple[str, str]]:
    """Yield each launch's name and key, with progress on stderr."""
    seconds = 0.1 if sys.stderr.isatty() else QUIET_SECONDS
    # Not forks, which inherit locks of threads that torch has started.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _read_launches) as pool:
        found = {pool.submit(_compile_named, store, name): name for name in names}
        for done in tqdm(as_completed(found), label, len(found), unit=" launches", mininterval=seconds):
            yield found[done], done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="launches whose names match, as a shell's files")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count())
    parser.add_argument("--label", default="compiling", help="what to call this on stderr")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # Triton's own cache would not say what a launch's TTIR is
    sys.path.insert(0, str(args.checkout.resolve()))
    _read_launches()
    index = json.loads(args.index.read_text()) if args.index.exists() else {}
    names = fnmatch.filter(_launches, args.only)
    missing = [name for name in names if index.get(name, ERROR).startswith(ERROR)]  # the machine may be to blame
    index |= compile_all(missing, args.store, args.jobs, args.label)
    _write(args.index, json.dumps(index, indent=0))


if __name__ == "__main__":
    main()
