"""Mutate checkpoints: one mutation for each convention of the model.

A right implementation computes from a mutated checkpoint what an implementation with that mistake computes from the
original. So a test of any implementation (reference or kernel) can show that its comparison would notice the mistake.
"""

import math
from collections.abc import Callable

import torch
from made_up_models import MemoryCheckpoint
from torch import Tensor


def _without(ending: str) -> Callable[[MemoryCheckpoint], MemoryCheckpoint]:
    return lambda ckpt: ckpt.with_tensors(lambda n, t: torch.zeros_like(t) if n.endswith(ending) else t)


def _permute_rows(ckpt: MemoryCheckpoint, endings: tuple[str, ...], order: Tensor, dim: int) -> MemoryCheckpoint:
    return ckpt.with_tensors(lambda n, t: t.index_select(dim, order) if n.endswith(endings) else t)


def _permute_gate_up(ckpt: MemoryCheckpoint, order: Tensor) -> MemoryCheckpoint:
    return _permute_rows(ckpt, ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias"), order, dim=1)


def gate_and_up_swapped(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    return _permute_gate_up(ckpt, torch.arange(2 * ckpt.config.intermediate_size) ^ 1)


def gate_up_in_halves(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """Put gate in the first half of the rows and up in the second."""
    return _permute_gate_up(ckpt, torch.arange(2 * ckpt.config.intermediate_size).view(2, -1).T.flatten())


def up_without_one(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """Subtract one from the bias of up, so that up + 1 becomes up within the clamp's limits."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith("gate_up_proj_bias"):
            return tensor
        shift = torch.zeros_like(tensor)
        shift[:, 1::2] = 1
        return tensor - shift

    return ckpt.with_tensors(change)


def interleaved_rope(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """Pair element 2i with 2i + 1, by a permutation of each head's rows of q and k."""
    head = torch.arange(ckpt.config.head_dim).view(-1, 2).T.flatten()

    def change(name: str, tensor: Tensor) -> Tensor:
        if not any(f"{p}_proj." in name for p in "qk"):
            return tensor
        return tensor.unflatten(0, (-1, len(head))).index_select(1, head).flatten(0, 1)

    return ckpt.with_tensors(change)


def kv_heads_interleaved(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """Let query head h read KV head h % n_kv_heads instead of h // (n_heads / n_kv_heads)."""
    config = ckpt.config
    heads = torch.arange(config.n_heads).view(-1, config.n_kv_heads).T.flatten()
    rows = (heads[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()
    ckpt = _permute_rows(ckpt, ("q_proj.weight", "q_proj.bias"), rows, dim=0)
    ckpt = _permute_rows(ckpt, ("o_proj.weight",), rows, dim=1)
    return _permute_rows(ckpt, ("sinks",), heads, dim=0)


def nibbles_swapped(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    return ckpt.with_tensors(lambda n, t: (t >> 4) | (t << 4) if n.endswith("_blocks") else t)


CHECKPOINT_MUTATIONS: dict[str, Callable[[MemoryCheckpoint], MemoryCheckpoint]] = {
    "sinks dropped": lambda ckpt: ckpt.with_tensors(
        lambda n, t: torch.full_like(t, -math.inf) if n.endswith("sinks") else t
    ),
    "sinks scaled like the other logits": lambda ckpt: ckpt.with_tensors(
        lambda n, t: t * ckpt.config.sm_scale if n.endswith("sinks") else t
    ),
    "window one too small": lambda ckpt: ckpt.with_config(sliding_window=ckpt.config.sliding_window - 1),
    "window one too large": lambda ckpt: ckpt.with_config(sliding_window=ckpt.config.sliding_window + 1),
    "window on the wrong layers": lambda ckpt: ckpt.with_config(
        layer_is_sliding=tuple(not sliding for sliding in ckpt.config.layer_is_sliding)
    ),
    "q bias dropped": _without("q_proj.bias"),
    "k bias dropped": _without("k_proj.bias"),
    "v bias dropped": _without("v_proj.bias"),
    "o bias dropped": _without("o_proj.bias"),
    "router bias dropped": _without("router.bias"),
    "gate_up bias dropped": _without("gate_up_proj_bias"),
    "down bias dropped": _without("down_proj_bias"),
    "one expert too few": lambda ckpt: ckpt.with_config(experts_per_token=ckpt.config.experts_per_token - 1),
    "alpha 1": lambda ckpt: ckpt.with_config(swiglu_alpha=1.0),
    "clamp dropped": lambda ckpt: ckpt.with_config(swiglu_limit=1e30),
    "up without one": up_without_one,
    "gate and up swapped": gate_and_up_swapped,
    "gate_up in halves": gate_up_in_halves,
    "interleaved RoPE": interleaved_rope,
    "YaRN truncated": lambda ckpt: ckpt.with_yarn(truncate=True),
    "YaRN without concentration": lambda ckpt: ckpt.with_yarn(attention_factor=1.0),
    "eps 1e-6": lambda ckpt: ckpt.with_config(rms_norm_eps=1e-6),
    "nibbles swapped": nibbles_swapped,
    "KV heads interleaved": kv_heads_interleaved,
}
