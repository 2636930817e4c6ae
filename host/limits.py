"""What a device can hold, checked before anything is allocated."""

import os

import torch

from host.config import ModelConfig
from host.errors import InputError
from host.weights import weight_bytes

WORKSPACE_BYTES = 256 << 20  # activations, logits, rotary tables and the compiled kernel: generous


def check_context(config: ModelConfig, max_context: int) -> None:
    """InputError unless 1 <= max_context <= the model's max_position_embeddings."""
    if not 1 <= max_context <= config.max_position_embeddings:
        raise InputError(
            f"--max-context {max_context}: the model takes 1 to {config.max_position_embeddings} positions"
        )


def required_bytes(config: ModelConfig, max_context: int, kv_dtype: torch.dtype) -> int:
    """Device memory for the weights, the KV cache and the workspace."""
    kv_cache = 2 * kv_dtype.itemsize * config.n_layers * config.kv_size * max_context
    return weight_bytes(config) + kv_cache + WORKSPACE_BYTES


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(config: ModelConfig, max_context: int, kv_dtype: torch.dtype, device: torch.device) -> None:
    """InputError that says how much is needed if weights, KV cache and workspace do not fit."""
    needed, available = required_bytes(config, max_context, kv_dtype), available_bytes(device)
    if needed > available:
        raise InputError(
            f"not enough memory on {device}: {needed / 1e9:.1f} GB needed for the weights and a context of "
            f"{max_context} tokens, {available / 1e9:.1f} GB free"
        )
