"""host.devices: which GPUs are refused before anything is loaded, with stand-ins for their properties."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpt_oss_megakernel
from command_line.options import DEFAULT_MODEL
from gpt_oss_megakernel import MegaModel
from host import backend, devices
from host.compilers import compile_errors, quiet_compilers
from system.errors import InputError

ROOT = Path(__file__).parents[2]
NVIDIA = {
    "A100": (8, 0),
    "L4": (8, 9),
    "V100": (7, 0),
    "H200": (9, 0),
    "B200": (10, 0),
    "RTX 5090": (12, 0),
    "Thor": (11, 0),
}
# Runs command lines one after another beside a GPU of this compute capability, which holds no tensors.
BESIDE_A_GPU = """
import json, runpy, sys, torch
from types import SimpleNamespace
gpu = SimpleNamespace(name="GPU", major={major}, minor={minor})
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device=None: gpu
sys.path.insert(0, ".")
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(end.code, file=sys.stderr)
"""


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that gives this process GPUs of these properties, the first one current."""

    def install(*properties: SimpleNamespace, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        find = lambda device=None: properties[torch.device(device).index or 0]  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", find)
        monkeypatch.setattr(torch.version, "hip", hip)
        devices.notice_unused_gpu.cache_clear()

    yield install
    devices.notice_unused_gpu.cache_clear()


def nvidia(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=NVIDIA[name][0], minor=NVIDIA[name][1])


def amd(architecture: str) -> SimpleNamespace:
    return SimpleNamespace(name="Instinct", major=9, minor=5, gcnArchName=architecture)


@pytest.mark.parametrize("name", NVIDIA)
def test_of_nvidia_gpus_those_that_triton_can_compile_for(name, gpus):
    gpus(nvidia(name))
    assert devices.gpu_runs_kernels() == (name in ("H200", "B200", "RTX 5090"))


@pytest.mark.parametrize(
    "architecture, runs",
    [
        ("gfx950:sramecc+:xnack-", True),
        ("gfx950", True),
        ("gfx942:sramecc+:xnack-", False),
        ("gfx90a:sramecc+:xnack-", False),
        ("gfx1100", False),
        ("gfx9500", False),
    ],
)
def test_of_amd_gpus_gfx950_alone(architecture, runs, gpus):
    """ROCm gives AMD GPUs a compute capability too, 9.x among them."""
    gpus(amd(architecture), hip="7.1")
    assert devices.gpu_runs_kernels() == runs
    if not runs:
        with pytest.raises(InputError, match=f"AMD {architecture.split(':')[0]} is not supported.*gfx950"):
            devices.check_supported(torch.device("cuda"))


def test_the_gpu_that_is_asked_for_is_the_one_that_is_checked(gpus):
    gpus(nvidia("H200"), nvidia("A100"))
    devices.check_supported(torch.device("cuda"))
    devices.check_supported(torch.device("cuda:0"))
    with pytest.raises(
        InputError, match=r"device cuda:1: NVIDIA compute capability 8\.0 is not supported, NVIDIA 9\.0.* are"
    ):
        devices.check_supported(torch.device("cuda:1"))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_nothing_is_loaded_for_a_gpu_that_is_refused(device, gpus, monkeypatch):
    def opened(*arguments):
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr(gpt_oss_megakernel, "open_checkpoint", opened)
    gpus(nvidia("A100"))
    with pytest.raises(InputError, match=r"compute capability 8\.0") as error:
        MegaModel.from_pretrained(DEFAULT_MODEL, device=device)
    assert len(str(error.value).splitlines()) == 1


def test_the_cpu_is_used_with_one_notice(gpus, capsys):
    gpus(nvidia("A100"), nvidia("H200"))
    for _ in range(2):
        assert backend.usable_device(None) == torch.device("cpu")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("notice: running on the CPU: NVIDIA compute capability 8.0 is not supported")
    assert "cuda:1 can be chosen with CUDA_VISIBLE_DEVICES" in err


def test_no_notice_without_a_gpu_nor_where_the_cpu_is_asked_for(gpus, capsys, monkeypatch):
    gpus(nvidia("A100"))
    assert backend.usable_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.usable_device(None) == torch.device("cpu")
    assert capsys.readouterr() == ("", "")


def test_a_gpu_whose_driver_fails_is_not_used(gpus, monkeypatch, capsys):
    def fail(device=None):
        raise RuntimeError("CUDA driver error\nmore of it")

    gpus(nvidia("H200"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert not devices.gpu_runs_kernels()


def run_scripts(*commands: list[str], capability: tuple[int, int], **environment) -> subprocess.CompletedProcess:
    major, minor = capability
    program = [sys.executable, "-c", BESIDE_A_GPU.format(major=major, minor=minor), json.dumps(commands)]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(program, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120)


def test_a_script_recites_on_the_cpu_beside_an_old_gpu():
    done = run_scripts(["gpt_oss_megakernel.py", "--quant", "--max-new-tokens", "2"], capability=(8, 6))
    assert done.stdout
    notice, summary, _cut, code = done.stderr.splitlines()
    assert notice.startswith("notice: running on the CPU: NVIDIA compute capability 8.6")
    assert summary.endswith("cpu, quant]")
    assert code == "0"


def test_scripts_told_to_compile_for_an_old_gpu_end_before_they_load():
    random = ["--random-weights", "120b"]
    scripts = ["bench_tpot.py", "bench_islosl.py", "acc_eval.py", "run_triton_phased.py"]
    commands = [["gpt_oss_megakernel.py", "--model", "no/such-model"], *([script, *random] for script in scripts)]
    done = run_scripts(*commands, capability=(8, 0), TRITON_INTERPRET="0")
    errors, codes = done.stderr.splitlines()[0::2], done.stderr.splitlines()[1::2]
    assert (done.stdout, codes) == ("", ["2"] * len(commands))
    for error in errors:
        assert error.startswith("error: device cuda")
        assert all(said in error for said in ("8.0 is not supported", "NVIDIA 9.0", "gfx950"))


def test_compile_errors_are_one_line():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    log = (
        "Internal error\n`ptxas` stderr:\nptxas /tmp/a.ptx, line 417; error   : Feature 'x' requires .target sm_90\n"
        * 99
    )
    failures = {PTXASError(log): "requires .target sm_90", OutOfResources(3, 2, "shared memory"): "shared memory"}
    failures |= {RuntimeError(text): text for text in ("PassManager::run failed", "LLD failed to link hsaco source")}
    caller = CompilationError(None, None, None)
    caller.message, caller.__cause__ = "at 45:15:\n    ^", PTXASError("at 22:16:\n    ^\nFIRST is already defined")
    failures[caller] = "FIRST is already defined"
    for failure, said in failures.items():
        with pytest.raises(InputError, match=f"device cuda: .*{said}") as found, compile_errors(torch.device("cuda")):
            raise failure
        assert len(str(found.value).splitlines()) == 1
    with pytest.raises(RuntimeError, match="a mistake of ours"), compile_errors(torch.device("cuda")):
        raise RuntimeError("a mistake of ours")


def test_triton_does_not_print_ptx(capsys):
    from triton.backends.nvidia import compiler

    quiet_compilers()
    compiler.print("// PTX\n" * 1000 + "please share the reproducer above with Triton project.")
    compiler.print("asked for")
    assert capsys.readouterr().out == "asked for\n"
