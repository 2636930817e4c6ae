"""Under what conditions a figure was measured."""

import subprocess

import torch
import triton

from host.devices import device_name

GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def conditions(device: torch.device) -> dict[str, str | int | dict[str, str] | None]:
    """Device, its SMs or CUs, its clocks as they are now, versions. None for what does not apply or is not known."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else None,
        "clocks": gpu_fields(device) if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def device_line(found: dict, num_programs: int) -> str:
    """For a list in Markdown: the device of `conditions`, its programs, the versions."""
    size = "" if found["multiprocessors"] is None else f", {found['multiprocessors']} multiprocessors"
    versions = f"torch {found['torch']}, triton {found['triton']}"
    return f"- {found['device']}{size}; programs: {num_programs}; {versions}"


def state_line(found: dict) -> str:
    """For a list in Markdown: the clocks of `conditions`; of a CPU that its times are no claim."""
    if is_cpu(found):
        return "- Triton's CPU interpreter: its times say nothing of a GPU. No claim."
    fields = found["clocks"]
    clocks = "clocks not known" if fields is None else ", ".join(f"{name} {value}" for name, value in fields.items())
    return f"- right after the runs: {clocks}"


def axis_label(text: str, found: dict) -> str:
    """A label for a plot's axis of times."""
    return f"{text} (CPU interpreter, no claim)" if is_cpu(found) else text


def is_cpu(found: dict) -> bool:
    """Whether these `conditions` are a CPU's."""
    return found["multiprocessors"] is None


def gpu_fields(device: torch.device) -> dict[str, str] | None:
    """GPU_FIELDS as nvidia-smi tells them, with their units; None if it does not."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", "-i", f"GPU-{uuid}"]
    try:
        reply = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_fields(reply)


def parse_gpu_fields(reply: str) -> dict[str, str] | None:
    """One line of nvidia-smi's CSV; None if it is not what was asked for."""
    values = [value.strip() for value in reply.strip().split(",")]
    return dict(zip(GPU_FIELDS, values)) if len(values) == len(GPU_FIELDS) else None
