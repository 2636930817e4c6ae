"""Describe the conditions of a measurement: device, clocks and versions."""

import subprocess

import torch
import triton

from host.devices import device_name

GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def conditions(device: torch.device) -> dict[str, str | int | dict[str, str] | None]:
    """Return the device, its number of SMs or CUs, its current clocks, and versions; None for what is not known."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else None,
        "clocks": gpu_fields(device) if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def device_line(conditions: dict, num_programs: int) -> str:
    """Return an item of a Markdown list: the device of some `conditions`, its programs, the versions."""
    size = "" if is_cpu(conditions) else f", {conditions['multiprocessors']} multiprocessors"
    versions = f"torch {conditions['torch']}, triton {conditions['triton']}"
    return f"- {conditions['device']}{size}; programs: {num_programs}; {versions}"


def state_line(conditions: dict) -> str:
    """Return an item of a Markdown list: the clocks of some `conditions`, or that a CPU's times are no claim."""
    if is_cpu(conditions):
        return "- Triton's CPU interpreter: its times say nothing of a GPU. No claim."
    fields = conditions["clocks"]
    clocks = "clocks not known" if fields is None else ", ".join(f"{name} {value}" for name, value in fields.items())
    return f"- right after the runs: {clocks}"


def axis_label(text: str, conditions: dict) -> str:
    """Return the label of a plot's time axis, which says if the times are a CPU's."""
    return f"{text} (CPU interpreter, no claim)" if is_cpu(conditions) else text


def is_cpu(conditions: dict) -> bool:
    """Return whether these `conditions` are a CPU's."""
    return conditions["multiprocessors"] is None


def gpu_fields(device: torch.device) -> dict[str, str] | None:
    """Return the GPU_FIELDS that nvidia-smi reports, with their units, or None if it fails."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", "-i", f"GPU-{uuid}"]
    try:
        reply = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_fields(reply)


def parse_gpu_fields(reply: str) -> dict[str, str] | None:
    """Return the GPU_FIELDS in a line of nvidia-smi's CSV, or None if their number is wrong."""
    values = [value.strip() for value in reply.strip().split(",")]
    return dict(zip(GPU_FIELDS, values)) if len(values) == len(GPU_FIELDS) else None
