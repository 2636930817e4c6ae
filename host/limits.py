"""What a device can hold, checked before anything is allocated."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoints.config import ModelConfig
from host.buffers import buffer_bytes
from host.weights import weight_bytes
from system.errors import InputError

DEFAULT_CONTEXT = 4096  # positions
WORKSPACE_BYTES = 256 << 20  # a token's activations, logits, rotary tables and the compiled kernels: generous

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# How PyTorch words it, for want of an exception of its own: on a CPU, for pinned memory, for files, for threads.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory", "can't start new thread")


def context_length(config: ModelConfig, asked: int | None) -> int:
    """The positions asked for; else DEFAULT_CONTEXT, or the model's max_position_embeddings where that is less.

    InputError unless the model takes so many.
    """
    limit = config.max_position_embeddings
    if asked is None:
        return min(DEFAULT_CONTEXT, limit)
    if not 1 <= asked <= limit:
        raise InputError(f"--max-context {asked}: the model takes 1 to {limit} positions")
    return asked


def required_bytes(
    config: ModelConfig, max_context: int, kv_dtype: torch.dtype = torch.bfloat16, weights: int | None = None
) -> int:
    """Device memory for the weights, the KV cache, a prompt's blocks and the workspace.

    weights: bytes, the kernel's unless said.
    """
    kv_cache = 2 * kv_dtype.itemsize * config.n_layers * config.kv_size * max_context
    weights = weight_bytes(config) if weights is None else weights
    return weights + kv_cache + buffer_bytes(config, max_context) + WORKSPACE_BYTES


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now: of a GPU, or the least that the host and this process's limits leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_machine_bytes(), *_cgroup_bytes(), *_process_bytes()]))


def _machine_bytes() -> int:
    """What the host has, without writing to its swap space."""
    available = _fields(PROC / "meminfo").get("MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if available is None else available << 10


def _process_bytes() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave of this process's address space and of its data."""
    status = _fields(PROC / "self" / "status")
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield most - (status.get(used, 0) << 10)


# Of a version of control groups: the files that hold the limit and the use, and the name in memory.stat of the cache
# of files that would make room.
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")


def _cgroup_bytes() -> Iterator[int]:
    """What the limits of this process's control groups and of the groups around them leave, of those that can be read.

    A container may name its group by a path of the host, which is not there: its own is then the mount itself.
    """
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "":
            roots, files = (CGROUPS, CGROUPS / "unified"), _CGROUP_V2
        elif "memory" in controllers.split(","):
            roots, files = (CGROUPS / "memory", CGROUPS / controllers), _CGROUP_V1
        else:
            continue
        names = [name for name in path.split("/") if name not in ("", "..")]
        for root in roots:
            for depth in range(len(names) + 1):
                yield from _group_bytes(root.joinpath(*names[:depth]), *files)


def _group_bytes(group: Path, limit: str, use: str, cache: str) -> Iterator[int]:
    most, used = (_text(group / name).strip() for name in (limit, use))
    if most.isdecimal() and used.isdecimal():  # else "max", or nothing to read
        yield int(most) - max(0, int(used) - _fields(group / "memory.stat").get(cache, 0))


def _fields(path: Path) -> dict[str, int]:
    """Name -> number of the lines of a file in /proc or /sys that have both."""
    found = {}
    for line in _text(path).splitlines():
        name, *values = line.replace(":", " ").split() or [""]
        if values and values[0].isdecimal():
            found[name] = int(values[0])
    return found


def _text(path: Path) -> str:
    """What a file holds; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, says that memory could not be had."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(said in str(error) for said in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def check_memory(
    config: ModelConfig, max_context: int, kv_dtype: torch.dtype, device: torch.device, weights: int | None = None
) -> None:
    """InputError that says how much is needed if `required_bytes` do not fit."""
    needed, available = required_bytes(config, max_context, kv_dtype, weights), available_bytes(device)
    if needed > available:
        raise InputError(
            f"not enough memory on {device}: {needed / 1e9:.1f} GB needed for the weights and a context of "
            f"{max_context} tokens, {available / 1e9:.1f} GB free"
        )
