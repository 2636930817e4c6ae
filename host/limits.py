"""What a device can hold, checked before anything is allocated."""

import os

import torch

from host.buffers import buffer_bytes
from host.config import ModelConfig
from host.errors import InputError
from host.weights import weight_bytes

DEFAULT_CONTEXT = 4096  # positions
WORKSPACE_BYTES = 256 << 20  # a token's activations, logits, rotary tables and the compiled kernels: generous


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
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
