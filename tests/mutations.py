"""Random checkpoints in which every convention of the model matters, and one mutation per convention.

A mutated checkpoint makes a right implementation compute what one with that mistake computes from the original. So
whatever runs a checkpoint (reference, kernel) can show that its comparison would have noticed the mistake. Mistakes
that no checkpoint stands for are put into the reference's code instead.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from checkpoints.config import MXFP4_GROUP, ModelConfig, YarnConfig, expected_tensors
from common.gfx950 import GFX950
from common.sm90 import SM_90
from host.launch import tuning_for, with_small_tiles
from host.tuning import RingTuning, Tuning
from reference import combine_experts, rms_norm

E2M1_RMS = 2.93  # of the sixteen E2M1 values
# With small_config() and 64 random_token_ids(), the fourth and fifth expert's router logits are never closer than 5e-3:
# no token changes its experts through rounding alone, be it that of bfloat16 keys, which would look like a mistake.
CLEAR_SEED = 16


class MemoryCheckpoint:
    """A checkpoint that is a dictionary: published name -> tensor."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], name: str = "memory"):
        self.config, self.name, self._tensors = config, name, tensors

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def document(self, name: str) -> None:
        """There are none."""

    def with_config(self, **changes) -> "MemoryCheckpoint":
        return MemoryCheckpoint(dataclasses.replace(self.config, **changes), self._tensors, self.name)

    def with_yarn(self, **changes) -> "MemoryCheckpoint":
        return self.with_config(yarn=dataclasses.replace(self.config.yarn, **changes))

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> "MemoryCheckpoint":
        """`change(name, tensor)` is asked for each tensor."""
        return MemoryCheckpoint(self.config, {n: change(n, t) for n, t in self.tensors()}, self.name)


def small_config(**changes) -> ModelConfig:
    """Three layers with window 20, 8 query heads, 2 KV heads of 64, 8 experts of which 4 are used."""
    sizes = {
        "n_layers": 3,
        "n_experts": 8,
        "hidden_size": 96,
        "intermediate_size": 64,
        "n_heads": 8,
        "n_kv_heads": 2,
        "vocab_size": 160,
        "sliding_window": 20,
        "layer_is_sliding": (True, False, True),
        "stop_ids": (3,),
    }
    return ModelConfig(**(sizes | changes))


# Changes of small_config(): sizes that divide into no block, groups, or choices unlike the published ones.
ODD_SIZES = {
    "one head a group": dict(n_heads=4, n_kv_heads=4, head_dim=16),
    "three heads a group": dict(n_heads=6, n_kv_heads=2, head_dim=32),
    "seventeen heads a group": dict(n_heads=17, n_kv_heads=1, head_dim=16),
    "head_dim 128": dict(n_heads=4, n_kv_heads=2, head_dim=128),
    "top 1 of 3": dict(n_experts=3, experts_per_token=1),
    "top 3 of 5": dict(n_experts=5, experts_per_token=3),
    "all experts": dict(n_experts=4, experts_per_token=4),
    "hidden 32, intermediate 160": dict(hidden_size=32, intermediate_size=160),
    "hidden 416, intermediate 224": dict(hidden_size=416, intermediate_size=224),
    "vocabulary 1003": dict(vocab_size=1003),
    "vocabulary 7, one layer": dict(vocab_size=7, n_layers=1, layer_is_sliding=(False,), stop_ids=()),
    "window 1": dict(sliding_window=1),
    "no YaRN stretch": dict(yarn=YarnConfig(theta=10000.0, factor=1.0)),
}


def changed(tuning: Tuning, **subjects) -> Tuning:
    """A tuning with other values: changed(tuning, num_warps=2, attention=dict(split_t=16))."""
    values = {
        name: dataclasses.replace(getattr(tuning, name), **value) if isinstance(value, dict) else value
        for name, value in subjects.items()
    }
    return dataclasses.replace(tuning, **values)


def small_tiles(config: ModelConfig, **changes) -> Tuning:
    """Of the CPU, but every phase of a small model has several tiles. Changes: see `changed`."""
    return changed(with_small_tiles(tuning_for(torch.device("cpu"), config)), **changes)


def ahead_tiles(config: ModelConfig, **changes) -> Tuning:
    """Small tiles of dense matrices loaded one ahead, as on gfx950."""
    return small_tiles(config, **({"machine": GFX950} | changes))


def ring_tiles(config: ModelConfig, **changes) -> Tuning:
    """Small tiles through a ring, experts packed for the tensor cores of two warps: as on sm_90."""
    streamed = small_tiles(
        config,
        machine=SM_90,
        num_warps=2,
        dense=dict(qkv_rows=16, o_rows=4, head_rows=16, threads_per_row=32, step_tiles=4),
        experts=dict(gate_up_rows=16, down_rows=16, step_tiles=4, dot_scaled=False),
        ring=RingTuning(stages=3, stage_bytes=1 << 15, prefetch_distance=2, prefetch_qkv=0),
    )
    return changed(streamed, **changes)


def random_token_ids(n: int, config: ModelConfig, seed: int = 5) -> list[int]:
    return torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def loud_checkpoint(config: ModelConfig, seed: int = CLEAR_SEED) -> MemoryCheckpoint:
    """Random weights under which small mistakes show.

    The embeddings are small (eps matters), queries and keys point somewhere, sinks and biases are of the size of what
    they are added to, and gate and up exceed the clamp about once in eight.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=rng) * std + mean).to(torch.bfloat16)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        part = ".".join(name.split(".")[-2:])
        fan_in = config.q_size if part == "o_proj.weight" else config.hidden_size
        if part.endswith("_blocks"):
            return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
        if part.endswith("_scales"):
            gain = 4.5 if "gate_up" in part else 0.07
            exponent = round(math.log2(gain / (E2M1_RMS * math.sqrt(shape[-1] * MXFP4_GROUP))))
            return torch.randint(126 + exponent, 129 + exponent, shape, generator=rng, dtype=torch.uint8)
        if part.endswith("norm.weight"):
            return normal(shape, 0.3, mean=1.0)
        if part == "self_attn.sinks":
            return normal(shape, 1.5, mean=2.0)
        std = {
            "embed_tokens.weight": 0.02,
            "lm_head.weight": 4 / math.sqrt(fan_in),
            "q_proj.weight": 1.5 / math.sqrt(fan_in),
            "k_proj.weight": 1.5 / math.sqrt(fan_in),
            "experts.gate_up_proj_bias": 2.0,
        }
        return normal(shape, std.get(part, 0.5 if part.endswith("bias") else 1 / math.sqrt(fan_in)))

    tensors = {name: draw(name, shape) for name, (shape, _) in expected_tensors(config).items()}
    return MemoryCheckpoint(config, tensors, f"loud {seed}")


def _without(ending: str) -> Callable[[MemoryCheckpoint], MemoryCheckpoint]:
    return lambda ckpt: ckpt.with_tensors(lambda n, t: torch.zeros_like(t) if n.endswith(ending) else t)


def _permute_rows(ckpt: MemoryCheckpoint, endings: tuple[str, ...], order: Tensor, dim: int) -> MemoryCheckpoint:
    return ckpt.with_tensors(lambda n, t: t.index_select(dim, order) if n.endswith(endings) else t)


def _permute_gate_up(ckpt: MemoryCheckpoint, order: Tensor) -> MemoryCheckpoint:
    return _permute_rows(ckpt, ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias"), order, dim=1)


def gate_and_up_swapped(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    return _permute_gate_up(ckpt, torch.arange(2 * ckpt.config.intermediate_size) ^ 1)


def gate_up_in_halves(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """Gate in the first half of the rows, up in the second."""
    return _permute_gate_up(ckpt, torch.arange(2 * ckpt.config.intermediate_size).view(2, -1).T.flatten())


def up_without_one(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """One less in the bias of up, which equals up instead of up + 1 within the clamp's limits."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith("gate_up_proj_bias"):
            return tensor
        shift = torch.zeros_like(tensor)
        shift[:, 1::2] = 1
        return tensor - shift

    return ckpt.with_tensors(change)


def interleaved_rope(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """Element 2i paired with 2i + 1: a reordering of each head's rows of q and k."""
    head = torch.arange(ckpt.config.head_dim).view(-1, 2).T.flatten()

    def change(name: str, tensor: Tensor) -> Tensor:
        if not any(f"{p}_proj." in name for p in "qk"):
            return tensor
        return tensor.unflatten(0, (-1, len(head))).index_select(1, head).flatten(0, 1)

    return ckpt.with_tensors(change)


def kv_heads_interleaved(ckpt: MemoryCheckpoint) -> MemoryCheckpoint:
    """Query head h reads KV head h % n_kv_heads instead of h // (n_heads / n_kv_heads)."""
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


def softmax_before_top_k(router_logits, experts_per_token):
    weights, chosen = router_logits.softmax(-1).topk(experts_per_token)
    return chosen, weights


def interleaved_rope_in_code(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def swiglu_without_gate_clamp(gate, up, limit, alpha):
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def swiglu_without_up_clamp(gate, up, limit, alpha):
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def swiglu_with_up_clamped_above_only(gate, up, limit, alpha):
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(max=limit) + 1)


def swiglu_without_one(gate, up, limit, alpha):
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * up.clamp(-limit, limit)


def expert_biases_not_weighted(act, chosen, weights, down, bias):
    unweighted = combine_experts(act, chosen, weights, down, torch.zeros_like(bias))
    return unweighted + bias[chosen].sum(1)


def norm_weight_before_the_mean(x, weight, eps):
    return rms_norm(x * weight, torch.ones_like(weight), eps)


# Mistakes that no change of the checkpoint stands for, or only nearly: name -> (function of reference.py, replacement).
REFERENCE_MUTATIONS = {
    "softmax before top-k": ("route", softmax_before_top_k),
    "interleaved RoPE, in code": ("apply_rope", interleaved_rope_in_code),
    "gate not clamped": ("swiglu", swiglu_without_gate_clamp),
    "up not clamped": ("swiglu", swiglu_without_up_clamp),
    "up clamped above only": ("swiglu", swiglu_with_up_clamped_above_only),
    "up without one, in code": ("swiglu", swiglu_without_one),
    "expert biases not weighted": ("combine_experts", expert_biases_not_weighted),
    "norm weight before the mean": ("rms_norm", norm_weight_before_the_mean),
}
