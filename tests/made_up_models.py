"""Random checkpoints of small models, in memory, in which every convention of the model matters."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from checkpoints.config import MXFP4_GROUP, ModelConfig, YarnConfig, expected_tensors

E2M1_RMS = 2.93  # of the sixteen E2M1 values
# With small_config() and 64 random_token_ids(), the fourth and fifth expert's router logits are never closer than 5e-3:
# no token changes its experts through rounding alone, be it that of bfloat16 keys, which would look like a mistake.
CLEAR_SEED = 16


class MemoryCheckpoint:
    """A checkpoint in a dictionary: published name -> tensor."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], name: str = "memory"):
        self.config, self.name, self._tensors = config, name, tensors

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def document(self, name: str) -> None:
        """Return None: this checkpoint has no documents."""

    def with_config(self, **changes) -> "MemoryCheckpoint":
        return MemoryCheckpoint(dataclasses.replace(self.config, **changes), self._tensors, self.name)

    def with_yarn(self, **changes) -> "MemoryCheckpoint":
        return self.with_config(yarn=dataclasses.replace(self.config.yarn, **changes))

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> "MemoryCheckpoint":
        """Return a checkpoint with `change(name, tensor)` in the place of each tensor."""
        return MemoryCheckpoint(self.config, {n: change(n, t) for n, t in self.tensors()}, self.name)


def small_config(**changes) -> ModelConfig:
    """Return three layers with window 20, 8 query heads, 2 KV heads of 64, 8 experts of which 4 are used."""
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


def random_token_ids(n: int, config: ModelConfig, seed: int = 5) -> list[int]:
    return torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def loud_checkpoint(config: ModelConfig, seed: int = CLEAR_SEED) -> MemoryCheckpoint:
    """Make random weights under which small mistakes show.

    The embeddings are small (eps matters), queries and keys have a direction, sinks and biases are of the size of what
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
