"""Which GPUs the kernels can be compiled for: known before Triton is imported, and before anything is loaded.

NVIDIA before compute capability 9.0 has no bulk copies to shared memory. For those listed beyond it Triton 3.6 compiles
the kernels, but nothing was run on one; 11.0 is unknown to its assembler. Of AMD's GPUs gfx950 alone has the scaled
matrix products of --quant.
"""

import functools
import sys

import torch

from host.errors import InputError

CAPABILITIES = ((9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
AMD_ARCHITECTURE = "gfx950"
SUPPORTED = f"NVIDIA {', '.join(f'{major}.{minor}' for major, minor in CAPABILITIES)} and AMD {AMD_ARCHITECTURE}"


def why_unsupported(device: torch.device) -> str | None:
    """What keeps the kernels from being compiled for a GPU; None if nothing does. RuntimeError if there is none."""
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if architecture == AMD_ARCHITECTURE else f"AMD {architecture} is not supported, {SUPPORTED} are"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in CAPABILITIES:
        return None
    return f"NVIDIA compute capability {major}.{minor} is not supported, {SUPPORTED} are"


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
