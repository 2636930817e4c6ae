"""Choose a device and its row of the launch table without importing Triton or loading anything.

NVIDIA GPUs before compute capability 9.0 have no bulk copies to shared memory. Triton 3.6 compiles the kernels for the
later capabilities listed here, but nothing was run on one; its assembler does not know 11.0. Among AMD's GPUs only
gfx950 has the scaled matrix products that --quant needs.
"""

import functools
import sys

import torch

from system.arguments import instance
from system.errors import InputError, first_line

# Architecture, by the vendor's number -> key of the launch table (host/launch.py).
NVIDIA_ROWS = {"9.0": "sm_90", "10.0": "sm_90", "10.3": "sm_90", "12.0": "sm_90", "12.1": "sm_90"}
AMD_ROWS = {"gfx950": "gfx950"}
SUPPORTED = f"NVIDIA {', '.join(NVIDIA_ROWS)} and AMD {', '.join(AMD_ROWS)}"


def launch_row(device: torch.device) -> str:
    """Return the launch table's key for a device.

    Raise InputError if the table has no row for it, RuntimeError if there is no such device.
    """
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        rows, architecture = AMD_ROWS, torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        gpu = f"AMD {architecture}"
    else:
        rows, architecture = NVIDIA_ROWS, "{}.{}".format(*torch.cuda.get_device_capability(device))
        gpu = f"NVIDIA compute capability {architecture}"
    if architecture not in rows:
        raise InputError(f"{gpu} is not supported, {SUPPORTED} are")
    return rows[architecture]


def why_unsupported(device: torch.device) -> str | None:
    """Return why the kernels cannot be compiled for a GPU, or None if they can. Raise RuntimeError if it is absent."""
    try:
        launch_row(device)
    except InputError as error:
        return str(error)
    return None


def check_supported(device: torch.device) -> None:
    """Raise InputError if the kernels cannot be compiled for a GPU."""
    if reason := why_unsupported(device):
        raise InputError(f"device {device}: {reason}; with TRITON_INTERPRET=1 the kernels run on the CPU")


def why_not_the_gpu() -> str | None:
    """Return why the kernels cannot use the current GPU, or None if they can or there is no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        return why_unsupported(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        return first_line(error)


def gpu_runs_kernels() -> bool:
    """Return whether there is a GPU that can run the kernels. Without one Triton's interpreter runs them."""
    return torch.cuda.is_available() and not why_not_the_gpu()


@functools.cache
def notice_unused_gpu() -> None:
    """Print one line on stderr, once per process, if there is a GPU that the kernels cannot use."""
    if reason := why_not_the_gpu():
        others = [n for n in range(torch.cuda.device_count()) if not why_unsupported(torch.device("cuda", n))]
        choice = f"; cuda:{others[0]} can be chosen with CUDA_VISIBLE_DEVICES" if others else ""
        print(f"notice: running on the CPU: {reason}{choice}", file=sys.stderr, flush=True)


def torch_device(device: torch.device | str | None, for_kernels: bool = False) -> torch.device:
    """Return the given device or, for None, the GPU if there is one and else the CPU.

    Raise InputError if a tensor on it cannot be written and read or, with for_kernels, if it is a GPU that the kernels
    cannot be compiled for; TypeError if `device` is not a device.
    """
    instance(device, torch.device | str, "device")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if for_kernels and torch.device(device).type == "cuda":
            check_supported(torch.device(device))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: {first_line(error)}") from None
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """Return the GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
