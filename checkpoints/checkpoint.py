"""The interface of checkpoints, one of random values, and a writer of the published layout.

A checkpoint is any object with the methods of `Checkpoint`. The readers of files and the random checkpoint here share
them, so that code that packs or runs a model does not depend on where its values come from.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from checkpoints.config import CONFIG_NAME, ModelConfig, expected_tensors
from system.errors import InputError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 << 20  # the published models' tokenizer has 28 MB

# Root mean square of the 16 E2M1 codes with equal weight: sqrt((0 + .25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8).
E2M1_RMS = math.sqrt(68.5 / 8)
E8M0_BIAS = 127
# Random exponents are a centre plus one of these, equally often, which multiplies the mean square by EXPONENT_POWER.
EXPONENT_OFFSETS = (-2, -1, 0, 1)
EXPONENT_POWER = sum(4.0**offset for offset in EXPONENT_OFFSETS) / len(EXPONENT_OFFSETS)


class Checkpoint(Protocol):
    """Named tensors of one model, in the published layout (`checkpoints.config.expected_tensors`)."""

    config: ModelConfig
    name: str

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of this published name, in its published shape and dtype (bfloat16 or uint8).

        Norms and sinks may be float32. A dense matrix that is FP8 according to `config.dense` is float8_e4m3fn, and its
        scales have the name checkpoints.config.scale_name and are float32 or uint8.
        """

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each (name, tensor), in the order that is cheapest to read."""

    def document(self, name: str) -> bytes | None:
        """Return the content of a file beside the weights, such as TOKENIZER_NAME, or None if it does not exist.

        Raise InputError if it cannot be read.
        """


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise InputError if a file that the checkpoint reads has changed since it was opened, if it reads any."""
    check = getattr(checkpoint, "check_unchanged", None)
    if check is not None:
        check()


class RandomCheckpoint:
    """A checkpoint of the given sizes whose values are drawn on `device` on request, and not kept.

    A tensor's values depend only on `seed`, its name and the type of device (CPUs and GPUs draw differently), whatever
    the order of the requests. With all scales at 1 activations stay of order 1:

    weight_scale: multiplies the attention, router and LM head matrices
    expert_scale: multiplies the expert matrices, rounded to a power of two (their block scales hold nothing else)
    bias_scale:   multiplies all biases, which are of order 0.1 at 1
    sink_scale:   multiplies the attention sinks, which are of order 1 at 1
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        device: torch.device | str = "cpu",
        name: str = "random",
        *,
        weight_scale: float = 1.0,
        expert_scale: float = 1.0,
        bias_scale: float = 1.0,
        sink_scale: float = 1.0,
    ):
        self.config = config
        self.name = name
        self._seed = seed
        self._device = torch.device(device)
        self._weight_scale = weight_scale
        self._expert_exponent = round(math.log2(expert_scale))
        self._bias_std = 0.1 * bias_scale
        self._sink_std = sink_scale
        self._expected = expected_tensors(config)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of this published name, drawn in no more memory than it takes itself."""
        shape, _ = self._expected[name]
        generator = torch.Generator(self._device).manual_seed(_seed_of(self._seed, name))
        if name.endswith("_blocks"):
            return _random_bytes(shape, generator)
        if name.endswith("_scales"):
            return self._expert_scales(shape, generator)
        mean, std = self._distribution(name, shape)
        values = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return values.normal_(mean, std, generator=generator)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each (name, tensor), drawn one at a time."""
        for name in self._expected:
            yield name, self.tensor(name)

    def document(self, name: str) -> None:
        """Return None, as random weights have no documents."""

    def _distribution(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Return the mean and standard deviation of a bfloat16 tensor's values."""
        if name.endswith("norm.weight"):
            return 1.0, 0.1
        if name.endswith("bias"):
            return 0.0, self._bias_std
        if name.endswith("sinks"):
            return 0.0, self._sink_std
        if name == "model.embed_tokens.weight":
            return 0.0, 1.0
        return 0.0, self._weight_scale / math.sqrt(shape[-1])

    def _expert_scales(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw E8M0 bytes with which random blocks map inputs of rms 1 to outputs of about rms `expert_scale`."""
        fan_in = shape[-1] * 32
        row_power = fan_in * E2M1_RMS**2 * EXPONENT_POWER
        centre = E8M0_BIAS - round(0.5 * math.log2(row_power)) + self._expert_exponent
        low, high = centre + min(EXPONENT_OFFSETS), centre + max(EXPONENT_OFFSETS)
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.uint8, device=self._device)


class WithoutStopIds:
    """A checkpoint whose model has no stop ids, so that it generates as many tokens as requested."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.config = dataclasses.replace(checkpoint.config, stop_ids=())

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)


def _seed_of(seed: int, name: str) -> int:
    """Return a hash of 63 bits of both; Python's own hash() differs from run to run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _random_bytes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw uniform uint8 values, eight at a time, as the CPU's generator takes as long for a byte as for 64 bits."""
    words = torch.empty((*shape[:-1], shape[-1] // 8), dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)


def config_to_dict(config: ModelConfig) -> dict:
    """Return a `config.json` as a dict from which `checkpoints.config` and transformers read this configuration."""
    yarn = config.yarn
    rope = {
        "rope_type": "yarn",
        "rope_theta": yarn.theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
    }
    if yarn.attention_factor is not None:
        rope["attention_factor"] = yarn.attention_factor
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": list(config.stop_ids) or None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in config.layer_is_sliding],
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.n_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "num_local_experts": config.n_experts,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }


def write_checkpoint(checkpoint: Checkpoint, folder: str | Path, shards: int = 1) -> Path:
    """Write a checkpoint as a folder in the published layout (config.json and the weights), and return the folder.

    With more than one shard the tensors are distributed in turn, so that a layer spans several shards, and an index is
    written. One shard is held in host memory at a time. Raise InputError if the folder already holds weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: already holds safetensors files")
    (folder / CONFIG_NAME).write_text(json.dumps(config_to_dict(checkpoint.config), indent=2) + "\n")
    names = list(expected_tensors(checkpoint.config))
    if shards == 1:
        _write_shard(checkpoint, names, folder / WEIGHTS_NAME)
        return folder
    weight_map, total_size = {}, 0
    for shard in range(shards):
        file_name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        shard_names = names[shard::shards]
        total_size += _write_shard(checkpoint, shard_names, folder / file_name)
        weight_map |= dict.fromkeys(shard_names, file_name)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _write_shard(checkpoint: Checkpoint, names: list[str], path: Path) -> int:
    """Write the tensors to a file, and return their bytes without the header."""
    tensors = {name: checkpoint.tensor(name).cpu().contiguous() for name in names}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
