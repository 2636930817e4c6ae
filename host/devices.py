"""Tell which row of the launch table a device has: known before Triton is imported, and before anything is loaded.

NVIDIA before compute capability 9.0 has no bulk copies to shared memory. For those listed beyond it Triton 3.6 compiles
the kernels, but nothing was run on one; 11.0 is unknown to its assembler. Of AMD's GPUs gfx950 alone has the scaled
matrix products of --quant.
"""

import functools
import sys

import torch

from system.arguments import instance
from system.errors import InputError

# Architecture, as its vendor numbers it, -> key of the launch table (host/launch.py).
NVIDIA_ROWS = {"9.0": "sm_90", "10.0": "sm_90", "10.3": "sm_90", "12.0": "sm_90", "12.1": "sm_90"}
AMD_ROWS = {"gfx950": "gfx950"}
SUPPORTED = f"NVIDIA {', '.join(NVIDIA_ROWS)} and AMD {', '.join(AMD_ROWS)}"


def launch_row(device: torch.device) -> str:
    """The launch table's key for a device. InputError if it has none, RuntimeError if there is no such device."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        rows, architecture = AMD_ROWS, torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        shown = f"AMD {architecture}"
    else:
        rows, architecture = NVIDIA_ROWS, "{}.{}".format(*torch.cuda.get_device_capability(device))
        shown = f"NVIDIA compute capability {architecture}"
    if architecture not in rows:
        raise InputError(f"{shown} is not supported, {SUPPORTED} are")
    return rows[architecture]


def why_unsupported(device: torch.device) -> str | None:
    """What keeps the kernels from being compiled for a GPU; None if nothing does. RuntimeError if there is none."""
    try:
        launch_row(device)
    except InputError as error:
        return str(error)
    return None


def check_supported(device: torch.device) -> None:
    """InputError if the kernels cannot be compiled for a GPU."""
    if reason := why_unsupported(device):
        raise InputError(f"device {device}: {reason}; with TRITON_INTERPRET=1 the kernels run on the CPU")


def why_not_the_gpu() -> str | None:
    """What is wrong with the current GPU, if there is one but the kernels cannot use it."""
    if not torch.cuda.is_available():
        return None
    try:
        return why_unsupported(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        return str(error).splitlines()[0]


def gpu_runs_kernels() -> bool:
    """Whether the current GPU, if there is one, can run the kernels; else Triton's interpreter does."""
    return torch.cuda.is_available() and not why_not_the_gpu()


@functools.cache
def notice_unused_gpu() -> None:
    """One line on stderr, once, if a GPU is there that the kernels cannot use."""
    if reason := why_not_the_gpu():
        others = [n for n in range(torch.cuda.device_count()) if not why_unsupported(torch.device("cuda", n))]
        choice = f"; cuda:{others[0]} can be chosen with CUDA_VISIBLE_DEVICES" if others else ""
        print(f"notice: running on the CPU: {reason}{choice}", file=sys.stderr, flush=True)


def torch_device(device: torch.device | str | None, for_kernels: bool = False) -> torch.device:
    """The device asked for, or the GPU if there is one. InputError unless it can hold numbers and give them back.

    for_kernels: a GPU must also be one that the kernels can be compiled for.
    """
    instance(device, torch.device | str, "device")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if for_kernels and torch.device(device).type == "cuda":
            check_supported(torch.device(device))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """What a person calls it: the GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
