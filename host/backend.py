"""Choose the device that runs the kernels: a GPU that they are compiled for, or the CPU, which interprets them."""

import torch
from triton.runtime.interpreter import InterpretedFunction

import interpreter
from common.barrier import leave_grid
from host.devices import notice_unused_gpu, torch_device
from system.errors import InputError


def usable_device(device: torch.device | str | None) -> torch.device:
    """Return the given device or, for None, the one that Triton was set up for when it defined its first kernel.

    Raise InputError if the kernels cannot run on it: an unsupported or absent GPU, one that is not the current one, or
    a device that does not match TRITON_INTERPRET.
    """
    interpreted = isinstance(leave_grid, InterpretedFunction)
    if interpreted and device is None:
        notice_unused_gpu()
    device = torch_device(("cpu" if interpreted else "cuda") if device is None else device, for_kernels=True)
    if (device.type == "cpu") != interpreted:
        raise InputError(f"device {device}: set TRITON_INTERPRET=1 for the CPU, unset it for a GPU")
    if interpreted:
        interpreter.install()
    elif device.index not in (None, torch.cuda.current_device()):
        raise InputError(f"device {device}: not the current one; choose it with CUDA_VISIBLE_DEVICES")
    return device
