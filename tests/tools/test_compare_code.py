"""Comparing machine code of two checkouts: what must not matter, what must, and what the tool answers."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from checkpoints.config import PRESETS
from command_line.run import run_main
from tools import compare_code, launches
from tools.compile_report import PATHS, TARGETS
from tools.machine_code import amd_code, amd_figures, nvidia_code, nvidia_figures, ttir_key

AMD = """
	.text
	.globl	down_kernel                     ; -- Begin function down_kernel
down_kernel:                            ; @down_kernel
.Lfunc_begin0:
	.cfi_startproc
	.file	1 "/one/folder" "prefill.py"
	.loc	1 86 0 prologue_end             ; prefill.py:86:0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.Ltmp0:
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 90 7 is_stmt 0
	v_add_u32_e32 v1, 64, v2
	s_cbranch_vccnz .LBB0_3
	s_branch .LBB0_7
.LBB0_7:                                ; %Flow
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel down_kernel
		.amdhsa_next_free_vgpr 3
	.end_amdhsa_kernel
	.section	.debug_str,"MS",@progbits,1
	.asciz	"prefill.py"
	.amdgpu_metadata
    .name:           down_kernel
    .private_segment_fixed_size: 0
    .sgpr_count:     4
    .sgpr_spill_count: 2
    .symbol:         down_kernel.kd
    .vgpr_count:     3
    .vgpr_spill_count: 0
	.end_amdgpu_metadata
	.section	.debug_line,"",@progbits
	.long	7
"""
AMD_SAME = [
    ("down_kernel", "another_name"),
    ("/one/folder", "/two"),
    ("prefill.py", "down.py"),
    (".loc	1 90 7 is_stmt 0", ".loc	2 12 1\n.Ltmp9:"),
    ("LBB0_3", "LBB0_30"),
    ("; %Flow", "; %Flow123"),
    (".long	7", ".long	8\n	.long	9"),
]
AMD_OTHER = [
    ("v_add_u32_e32 v1, 64, v2", "v_add_u32_e32 v1, 64, v3"),
    ("v_add_u32_e32 v1, 64, v2", "v_add_u32_e32 v1, 32, v2"),
    ("s_branch .LBB0_7", "s_branch .LBB0_3"),
    ("	s_endpgm", "	s_nop 0\n	s_endpgm"),
    (".amdhsa_next_free_vgpr 3", ".amdhsa_next_free_vgpr 4"),
    (".vgpr_spill_count: 0", ".vgpr_spill_count: 1"),
]

NVIDIA = """
	.headerflags	@"EF_CUDA_SM90"
//--------------------- .debug_line               --------------------------
	.section	.debug_line,"",@progbits
        /*0000*/ 	.byte	0x72
//--------------------- .text.down_kernel          --------------------------
	.section	.text.down_kernel,"ax",@progbits
        .type           down_kernel,@function
        .size           down_kernel,(.L_x_9 - down_kernel)
down_kernel:
        /*0000*/                   LOP3.LUT R2, R20, 0x7f, RZ, 0xc0, !PT ;    /* 0x0000007f14027812 */
                                                                             /* 0x004fca00078ec0ff */
.L_x_4:
        /*0010*/              @!P0 STL [R1], R2 ;                             /* 0x0000000201007387 */
                                                                             /* 0x0001e20000100800 */
        /*0020*/               @P0 BRA `(.L_x_4) ;                            /* 0xfffffffc00fc7947 */
                                                                             /* 0x000fc0000383ffff */
        /*0030*/                   NOP;                                       /* 0x0000000000007918 */
                                                                             /* 0x000fc00000000000 */
.L_x_9:
//--------------------- .nv.global.init            --------------------------
	.section	.nv.global.init,"aw",@progbits
        /*0000*/ 	.byte	0x5f, 0x43
//--------------------- .nv.shared.down_kernel     --------------------------
	.section	.nv.shared.down_kernel,"aw",@nobits
	.zero		1024
"""
NVIDIA_SAME = [
    ("down_kernel", "another_name"),
    (".byte	0x72", ".byte	0x73, 0x74"),
    (".L_x_4", ".L_x_44"),
    ("        .type  ", "\t.type"),
]
NVIDIA_OTHER = [
    ("R2, R20, 0x7f", "R2, R21, 0x7f"),
    ("R2, R20, 0x7f", "R2, R20, 0x3f"),
    ("0x004fca00078ec0ff", "0x004fcc00078ec0ff"),  # waits longer
    ("0x5f, 0x43", "0x5f, 0x44"),
    (".zero		1024", ".zero		2048"),
]

# A checkout with one kernel.
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def {helper}(x, FACTOR: tl.constexpr):
    return x * FACTOR

@triton.jit
def {kernel}(x_ptr, FACTOR: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(x_ptr + i, {helper}(tl.load(x_ptr + i), FACTOR))
"""
LAUNCHES = """
from functools import partial
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import {kernel}

def launches():
    for name, factor in {factors}.items():
        for target in (GPUTarget("hip", "gfx950", 64), GPUTarget("cuda", 90, 32)):
            signature, constants = dict(x_ptr="*fp32", FACTOR="constexpr"), {{(1,): factor}}
            source = ASTSource(fn={kernel}, signature=signature, constexprs=constants)
            yield f"{{name}}/{{target.arch}}", partial(compile, source, target=target)
"""


def replaced(text: str, words: tuple[str, str]) -> str:
    assert words[0] in text
    return text.replace(*words)


@pytest.mark.parametrize("change", AMD_SAME)
def test_names_and_places_on_gfx950_do_not_matter(change):
    name = "another_name" if change[0] == "down_kernel" else "down_kernel"
    assert amd_code(replaced(AMD, change), name) == amd_code(AMD, "down_kernel")


@pytest.mark.parametrize("change", AMD_OTHER)
def test_what_gfx950_executes_matters(change):
    assert amd_code(replaced(AMD, change), "down_kernel") != amd_code(AMD, "down_kernel")


def test_figures_of_gfx950():
    figures = amd_figures(AMD, amd_code(AMD, "down_kernel"))
    assert figures["instructions"] == 5
    assert (figures["registers"], figures["scalar registers"]) == (3, 4)
    assert (figures["spills"], figures["scalar spills"], figures["stack bytes"]) == (0, 2, 0)


@pytest.mark.parametrize("change", NVIDIA_SAME)
def test_names_and_places_on_sm_90_do_not_matter(change):
    name = "another_name" if change[0] == "down_kernel" else "down_kernel"
    assert nvidia_code(replaced(NVIDIA, change), name) == nvidia_code(NVIDIA, "down_kernel")


@pytest.mark.parametrize("change", NVIDIA_OTHER)
def test_what_sm_90_executes_matters(change):
    assert nvidia_code(replaced(NVIDIA, change), "down_kernel") != nvidia_code(NVIDIA, "down_kernel")


def test_figures_of_sm_90():
    code = nvidia_code(NVIDIA, "down_kernel")
    assert "LOP3.LUT R2, R20, 0x7f, RZ, 0xc0, !PT ; 0x0000007f14027812 0x004fca00078ec0ff" in code
    figures = nvidia_figures("Function down_kernel:\n REG:255 STACK:16 SHARED:1024", code)
    assert figures == {"instructions": 3, "registers": 255, "spills": 1, "stack bytes": 16}


def test_keys_depend_on_what_matters_alone():
    """Names of functions do not change a key; constants, targets and options each do."""
    ttir = 'tt.func public @down_kernel(%arg0: i32) { tt.call @scale(%arg0) asm "@down_kernel" }\ntt.func @scale(%arg0)'
    key = ttir_key(ttir, "sm_90", "4 warps")
    renamed = ttir.replace("@down_kernel(", "@other(").replace("@scale(", "@a.b(")
    assert ttir_key(renamed, "sm_90", "4 warps") == key
    others = [
        ttir_key(ttir.replace("i32", "i64"), "sm_90", "4 warps"),
        ttir_key(ttir.replace('"@down_kernel"', '"@other"'), "sm_90", "4 warps"),
        ttir_key(ttir, "gfx950", "4 warps"),
        ttir_key(ttir, "sm_90", "8 warps"),
    ]
    assert len({key, *others}) == 5


def test_every_path_is_covered_by_names_of_its_own():
    names = [name for name, _ in launches.launches()]
    assert max(Counter(names).values()) == 1
    for target in TARGETS:
        for size in PRESETS:
            for path in PATHS:
                for dense in launches.FORMATS:
                    case = f"{target}/{size}/{path}/{dense}"
                    steps = {name.split("/")[5] for name in names if name.startswith(f"prompt/{case}/")}
                    assert f"decode/{case}" in names
                    assert steps - {"float32-cache"} == {*launches.BLOCK_STEPS}


@pytest.fixture
def write_code(tmp_path):
    """Write machine code of a key, as tools/machine_code.py does."""

    def write(key: str, lines: list[str], figures: dict) -> None:
        (tmp_path / f"{key}.s").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / f"{key}.json").write_text(json.dumps(figures))

    return write


def test_launches_are_matched_by_name(tmp_path, write_code):
    write_code("a", ["one", "two", "three"], {"registers": 8})
    write_code("b", ["one", "two", "three"], {"registers": 8})
    write_code("c", ["one", "four", "three", "five"], {"registers": 9})
    write_code("d", ["one", "two", "three"], {"registers": 9})
    old = {"same": "a", "equal": "a", "other": "a", "figures": "a", "gone": "a"}
    new = {"new": "a", "figures": "d", "other": "c", "equal": "b", "same": "a"}
    assert compare_code.compare(old, new, tmp_path) == {
        "other": "registers 8 -> 9, lines +2 -1",
        "figures": "registers 8 -> 9",
        "gone": "only in old",
        "new": "only in new",
    }


def write_checkout(folder: Path, helper: str, kernel: str, factors: dict[str, float]) -> None:
    (folder / "tools").mkdir(parents=True)
    (folder / "kernels.py").write_text(KERNELS.format(helper=helper, kernel=kernel))
    (folder / "tools" / "launches.py").write_text(LAUNCHES.format(kernel=kernel, factors=factors))


def run(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of the tool."""
    monkeypatch.setattr(sys, "argv", ["compare_code.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        sys.exit(run_main(compare_code.main))
    return ended.value.code, *capsys.readouterr()


def test_two_checkouts_are_compared(tmp_path, capsys, monkeypatch):
    """A kernel with other names, on other lines, is equal; one with another constant, or an error, is not."""
    old, new, cache = (tmp_path / name for name in ("old", "new", "cache"))
    write_checkout(old, "scale", "scale_kernel", {"twice": 2.0, "thrice": 3.0, "broken": 4.0})
    write_checkout(new, "multiply", "another_name", {"twice": 2.0, "thrice": 5.0, "broken": "four"})
    source = (new / "kernels.py").read_text()
    (new / "kernels.py").write_text(f"# A comment.\n\n{source}")
    code, out, _ = run(capsys, monkeypatch, old, new, "--cache", cache, "--jobs", 1)
    assert code == 1
    *differences, summary = out.splitlines()
    assert [line.split(":")[0] for line in differences] == ["thrice/gfx950", "thrice/90", "broken/gfx950", "broken/90"]
    assert summary == "6 launches, 2 the same"
    for line in differences[:2]:
        assert "spills 0, " in line
    for line in differences[2:]:
        assert ": new does not compile: " in line
    kept = sorted(path.name for path in cache.iterdir())
    assert len(kept) == 2 * 2 * 4  # listings and figures for two targets: twice, thrice, five and four times
    code, out, _ = run(capsys, monkeypatch, old, new, "--cache", cache, "--only", "twice/*", "--jobs", 1)
    assert (code, out) == (0, "2 launches, 2 the same\n")
    assert sorted(path.name for path in cache.iterdir()) == kept


def test_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_code, "keys_of_launches", lambda *_: {})
    (tmp_path / "file").write_text("")
    write_checkout(tmp_path / "old", "scale", "scale_kernel", {})
    for words, message in [
        (["no-such-revision"], "no-such-revision: neither a folder with tools/launches.py nor a git revision"),
        (["--", "--all"], "--all: neither a folder"),
        ([tmp_path], f"{tmp_path}: neither a folder"),
        ([], "OLD"),
        ([tmp_path / "old", "--jobs", "0"], "--jobs"),
        ([tmp_path / "old", "--only", "x*"], "--only x*: no launch has such a name"),
        ([tmp_path / "old", "--cache", tmp_path / "file"], f"--cache {tmp_path / 'file'}: File exists"),
    ]:
        code, out, err = run(capsys, monkeypatch, *words)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_a_checkout_that_cannot_be_described(tmp_path, capsys, monkeypatch):
    write_checkout(tmp_path / "old", "scale", "scale_kernel", {})
    (tmp_path / "old" / "kernels.py").write_text("")
    code, out, err = run(capsys, monkeypatch, tmp_path / "old")
    assert (code, out) == (2, "")
    assert err.endswith(f"error: {tmp_path / 'old'}: its launches cannot be compiled, see above\n")


def test_a_revision_is_read_without_touching_the_checkout(tmp_path, monkeypatch):
    repository, scratch = tmp_path / "repository", tmp_path / "scratch"
    write_checkout(repository, "scale", "scale_kernel", {})
    scratch.mkdir()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "x"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    (repository / "kernels.py").write_text("changed")
    monkeypatch.setattr(compare_code, "ROOT", repository)
    side = compare_code.find_side("HEAD", scratch)
    assert compare_code.find_side("HEAD", scratch).folder == side.folder
    assert "scale_kernel" in (side.folder / "kernels.py").read_text()
    assert side.folder.is_relative_to(scratch)
    assert side.tree == compare_code.git("rev-parse", "HEAD^{tree}").stdout.strip()
    assert compare_code.git("status", "--porcelain").stdout == " M kernels.py\n"
    assert (repository / "kernels.py").read_text() == "changed"


def test_an_interrupt_ends_all_processes(tmp_path):
    started = tmp_path / "started"
    script = (
        "import subprocess\n"
        "process = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(started)!r}, 'w').write(str(process.pid))\n"
        "process.wait()\n"
    )

    class Interrupt(Exception):
        pass

    def wait_and_interrupt(*_) -> None:
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        raise Interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "waitid", wait_and_interrupt)
        with pytest.raises(Interrupt):
            compare_code.run_group([sys.executable, "-c", script], tmp_path, dict(os.environ))
    pid, deadline = started.read_text(), time.monotonic() + 10  # a killed process may take a moment to end
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended(pid)


def has_ended(pid: str) -> bool:
    """Return whether a process is gone, or a zombie that nobody has waited for."""
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
