"""host.limits: memory that limits of a container or a process forbid, and the message of a script that runs out."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import assert_rejected

from command_line.run import run_main
from host import limits

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes files of a host with 64 GiB available.

    Its argument is {path below /proc or /sys/fs/cgroup: content}.
    """
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def make(files: dict[str, str]) -> int:
        for name, content in ({"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:  67108864 kB\n"} | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        proc = tmp_path / "proc"
        monkeypatch.setattr(limits, "PROC", proc)
        monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
        return limits.available_bytes(CPU)

    return make


def group_v2(path: str, most: object, used: int = 0, cache: int = 0) -> dict[str, str]:
    """Return the files of a group with `cache` bytes of inactive files among the used ones."""
    stat = f"anon 5\nfile 77\ninactive_anon 4096\ninactive_file {cache}\nactive_file 12\n"
    files = {"memory.max": f"{most}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"cgroup/{path}/{name}": content for name, content in files.items()}


def group_v1(path: str, most: int, used: int = 0, cache: int = 0) -> dict[str, str]:
    stat = f"cache 99\ninactive_file 1\ntotal_cache 99\ntotal_inactive_file {cache}\n"
    files = {"memory.limit_in_bytes": f"{most}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}
    return {f"cgroup/memory/{path}/{name}": content for name, content in files.items()}


V2, V1 = {"proc/self/cgroup": "0::/a/b\n"}, {"proc/self/cgroup": "5:cpuset:/\n4:memory:/a/b\n0::/\n"}
CASES = {
    "no limit": ({}, 64 << 30),
    "version 2": (V2 | group_v2("a/b", 8 * GB, 3 * GB), 5 * GB),
    "version 2, cached files make room": (V2 | group_v2("a/b", 8 * GB, 7 * GB, 6 * GB), 7 * GB),
    "version 2, unlimited": (V2 | group_v2("a/b", "max", 3 * GB), 64 << 30),
    "version 2, a group around it": (V2 | group_v2("a/b", "max") | group_v2("a", 4 * GB, GB), 3 * GB),
    "version 2, the least counts": (V2 | group_v2("a/b", 9 * GB) | group_v2("a", 4 * GB), 4 * GB),
    "version 2, the mount is the group": ({"proc/self/cgroup": "0::/\n"} | group_v2("", 2 * GB, GB), GB),
    "version 2, outside the namespace": ({"proc/self/cgroup": "0::/../../x\n"} | group_v2("", 2 * GB), 2 * GB),
    "version 2, more used than allowed": (V2 | group_v2("a/b", GB, 2 * GB), 0),
    "version 2, beside version 1": (V1 | group_v2("unified", 3 * GB), 3 * GB),
    "another's group": (V2 | group_v2("a/c", GB), 64 << 30),
    "version 1": (V1 | group_v1("a/b", 8 * GB, 3 * GB), 5 * GB),
    "version 1, cached files make room": (V1 | group_v1("a/b", 8 * GB, 7 * GB, 6 * GB), 7 * GB),
    "version 1, unlimited": (V1 | group_v1("a/b", 9223372036854771712, GB), 64 << 30),
    "version 1, a group around it": (V1 | group_v1("a", 2 * GB), 2 * GB),
    "version 1, named by the host's path": (V1 | group_v1("", 2 * GB, GB), GB),
    "controllers together": ({"proc/self/cgroup": "4:cpu,memory:/a\n"} | group_v1("a", GB), GB),
    "more than the host has": (V2 | group_v2("a/b", 999 * GB), 64 << 30),
    "empty files": (V2 | group_v2("a/b", "", 0), 64 << 30),
    "malformed": ({"proc/self/cgroup": "junk\n::\n\n0::/a\n"} | group_v2("a", "-1") | group_v2("", "1e9"), 64 << 30),
    "not a stat": (
        V2 | group_v2("a/b", GB) | {"cgroup/a/b/memory.stat": "\xff\x00inactive_file\ninactive_file x\n"},
        GB,
    ),
}


@pytest.mark.parametrize("files, expected", CASES.values(), ids=CASES)
def test_control_groups(files, expected, machine):
    assert machine(files) == expected


def test_what_cannot_be_read_is_ignored(machine, tmp_path):
    (tmp_path / "cgroup" / "a" / "memory.max").mkdir(parents=True)
    assert machine(V2) == 64 << 30
    (tmp_path / "proc" / "meminfo").unlink()
    assert limits.available_bytes(CPU) > 0


@pytest.mark.parametrize("limit, used", [(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")])
def test_limits_of_the_process(limit, used, machine, monkeypatch):
    status = {"proc/self/status": "Name:\tpython\nVmPeak:\t 9000000 kB\nVmSize:\t 3000000 kB\nVmData:\t 1000000 kB\n"}
    assert machine(status) == 64 << 30
    limited = {limit: (5 * GB, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limited.get(kind, (resource.RLIM_INFINITY,) * 2))
    assert machine(status) == 5 * GB - ({"VmSize": 3000000, "VmData": 1000000}[used] << 10)


@pytest.mark.parametrize("flag", ["-v", "-d"])
def test_a_script_under_a_limit_of_its_own(flag):
    """3 GB hold a process with PyTorch, but not 20b."""
    script = "gpt_oss_megakernel.py --random-weights 20b --max-new-tokens 1"
    command = f"ulimit {flag} 3000000 && exec {sys.executable} {script}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert_rejected((done.returncode, done.stdout, done.stderr), "not enough memory on cpu", "GB free")


def interpreted(error: Exception) -> RuntimeError:
    """Wrap an exception as Triton's interpreter passes on what a kernel raised."""
    wrapped = RuntimeError("an error in a kernel")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 9\n"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        interpreted(MemoryError()),
    ],
    ids=["Python", "torch", "a CPU", "pinned memory", "threads", "the system", "in a kernel"],
)
def test_running_out_of_memory_is_one_line(error, capsys):
    def main() -> None:
        raise error

    assert_rejected((run_main(main), *capsys.readouterr()), "memory" if "thread" not in str(error) else "thread")


def test_the_real_allocator_runs_out(capsys):
    def main() -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert_rejected((run_main(main), *capsys.readouterr()), "not enough memory")


def test_other_errors_stay_what_they_are():
    def main() -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_main(main)
