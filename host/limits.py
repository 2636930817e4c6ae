"""Memory limits of devices and of this process, checked before anything is allocated."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoints.config import ModelConfig
from command_line.options import DEFAULT_CONTEXT
from host.buffers import buffer_bytes
from host.weights import weight_bytes
from system.errors import InputError

WORKSPACE_BYTES = 256 << 20  # generous for a token's activations, logits, rotary tables and the compiled kernels

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def context_length(config: ModelConfig, requested: int | None) -> int:
    """Return the requested number of positions, or the smaller of DEFAULT_CONTEXT and max_position_embeddings if None.

    Raise InputError unless it lies between 1 and the model's max_position_embeddings.
    """
    limit = config.max_position_embeddings
    if requested is None:
        return min(DEFAULT_CONTEXT, limit)
    if not 1 <= requested <= limit:
        raise InputError(f"--max-context {requested}: the model takes 1 to {limit} positions")
    return requested


def required_bytes(
    config: ModelConfig, max_context: int, kv_dtype: torch.dtype = torch.bfloat16, weights: int | None = None
) -> int:
    """Return the bytes of device memory for the weights, the KV cache, a prompt's blocks and the workspace.

    weights: bytes of the weights; None means all that the decoding kernel reads.
    """
    kv_cache = 2 * kv_dtype.itemsize * config.n_layers * config.kv_size * max_context
    weights = weight_bytes(config) if weights is None else weights
    return weights + kv_cache + buffer_bytes(config, max_context) + WORKSPACE_BYTES


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated now: a GPU's free memory, or the tightest of the host's limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_machine_bytes(), *_cgroup_bytes(), *_process_bytes()]))


def _machine_bytes() -> int:
    """Return the bytes that the host has available without swapping."""
    available = _fields(PROC / "meminfo").get("MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if available is None else available << 10


def _process_bytes() -> Iterator[int]:
    """Yield the bytes left under `ulimit -v` (address space) and `ulimit -d` (data) for this process."""
    status = _fields(PROC / "self" / "status")
    for resource_type, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(resource_type)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - (status.get(used, 0) << 10)


# For each version of control groups: the files that hold the limit and the usage, and the field of memory.stat that
# counts the reclaimable file cache.
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")


def _cgroup_bytes() -> Iterator[int]:
    """Yield the bytes left under each readable memory limit of this process's control groups and their ancestors.

    A container may name its group by a path on the host that it cannot see. Its own group is then the mount itself.
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


def _group_bytes(group: Path, limit_file: str, usage_file: str, cache_field: str) -> Iterator[int]:
    limit, usage = (_text(group / name).strip() for name in (limit_file, usage_file))
    if limit.isdecimal() and usage.isdecimal():  # otherwise the limit is "max", or the file cannot be read
        yield int(limit) - max(0, int(usage) - _fields(group / "memory.stat").get(cache_field, 0))


def _fields(path: Path) -> dict[str, int]:
    """Return name -> number for each line of a file in /proc or /sys that has both."""
    fields = {}
    for line in _text(path).splitlines():
        name, *values = line.replace(":", " ").split() or [""]
        if values and values[0].isdecimal():
            fields[name] = int(values[0])
    return fields


def _text(path: Path) -> str:
    """Return a file's text, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def check_memory(
    config: ModelConfig, max_context: int, kv_dtype: torch.dtype, device: torch.device, weights: int | None = None
) -> None:
    """Raise InputError, saying how much memory is needed, if the device has less than `required_bytes` available."""
    needed, available = required_bytes(config, max_context, kv_dtype, weights), available_bytes(device)
    if needed > available:
        raise InputError(
            f"not enough memory on {device}: {needed / 1e9:.1f} GB needed for the weights and a context of "
            f"{max_context} tokens, {available / 1e9:.1f} GB free"
        )
