"""Weights as the kernel reads them: one tensor a kind, all layers stacked, on the device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm

from host.config import ModelConfig
from host.fragments import block_words, pack_blocks, pack_scales, scale_words, tile_count
from host.launch import Tuning


class Weights(NamedTuple):
    """Device tensors; L layers, E experts, H hidden, I intermediate. bfloat16 unless said."""

    embed: torch.Tensor  # [vocab, H]
    attn_norm: torch.Tensor  # [L, H] float32
    qkv: torch.Tensor  # [L, q + k + v rows, H / 2] int32, two bfloat16 each, as all dense matrices that a GEMV reads
    qkv_bias: torch.Tensor  # [L, q + k + v rows]
    sinks: torch.Tensor  # [L, heads] float32
    o: torch.Tensor  # [L, H, q rows / 2] int32
    o_bias: torch.Tensor  # [L, H]
    mlp_norm: torch.Tensor  # [L, H] float32
    router: torch.Tensor  # [L, E, H / 2] int32
    router_bias: torch.Tensor  # [L, E]
    gate_up: torch.Tensor  # [L, E, 2I, H / 8] int32, eight E2M1 each; or fragments, see weight_shapes
    gate_up_scales: torch.Tensor  # [L, E, 2I, H / 32] uint8, E8M0
    gate_up_bias: torch.Tensor  # [L, E, 2I]
    down: torch.Tensor  # [L, E, H, I / 8] int32, eight E2M1 each
    down_scales: torch.Tensor  # [L, E, H, I / 32] uint8, E8M0
    down_bias: torch.Tensor  # [L, E, H]
    final_norm: torch.Tensor  # [H] float32
    lm_head: torch.Tensor  # [vocab, H / 2] int32


def weight_shapes(config: ModelConfig, tuning: Tuning | None = None) -> Weights:
    """(shape, dtype) of each field. Experts as fragments, if `tuning` asks for them, are int32 [L, E, tiles, words]."""
    n, e, h, i = config.n_layers, config.n_experts, config.hidden_size, config.intermediate_size
    bf16, f32, u8, i32 = torch.bfloat16, torch.float32, torch.uint8, torch.int32
    experts = {}
    for name, rows, k in (("gate_up", 2 * i, h), ("down", h, i)):
        if tuning and tuning.fragments:
            tiles = (n, e, tile_count(rows))
            experts[name] = ((*tiles, block_words(k)), i32)
            experts[f"{name}_scales"] = ((*tiles, scale_words(k, tuning.num_warps)), i32)
        else:
            experts[name] = ((n, e, rows, k // 8), i32)
            experts[f"{name}_scales"] = ((n, e, rows, k // 32), u8)
    return Weights(
        embed=((config.vocab_size, h), bf16),
        attn_norm=((n, h), f32),
        qkv=((n, config.qkv_size, h // 2), i32),
        qkv_bias=((n, config.qkv_size), bf16),
        sinks=((n, config.n_heads), f32),
        o=((n, h, config.q_size // 2), i32),
        o_bias=((n, h), bf16),
        mlp_norm=((n, h), f32),
        router=((n, e, h // 2), i32),
        router_bias=((n, e), bf16),
        gate_up_bias=((n, e, 2 * i), bf16),
        down_bias=((n, e, h), bf16),
        final_norm=((h,), f32),
        lm_head=((config.vocab_size, h // 2), i32),
        **experts,
    )


def weight_bytes(config: ModelConfig, tuning: Tuning | None = None) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in weight_shapes(config, tuning))


def load_weights(checkpoint, device: torch.device, tuning: Tuning, show_progress: bool = False) -> Weights:
    """Copy a checkpoint (`.config`, `.tensors()`) to the device, one tensor at a time, as `tuning` wants it."""
    config = checkpoint.config
    shapes = weight_shapes(config, tuning)
    weights = Weights(*(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes))
    places = dict(_places(config, weights))
    total = weight_bytes(config, tuning)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not show_progress) as bar:
        for name, tensor in checkpoint.tensors():
            place = places.pop(name)
            _fill(place, name, tensor, tuning)
            bar.update(place.numel() * place.element_size())
    if places:
        raise ValueError(f"the checkpoint gave no {next(iter(places))}")
    return weights


def _fill(place: torch.Tensor, name: str, tensor: torch.Tensor, tuning: Tuning) -> None:
    if tuning.fragments and name.endswith(("_blocks", "_scales")):
        for expert in range(len(tensor)):  # one at a time, as packing takes several times its bytes
            matrix = tensor[expert].to(place.device)
            packed = pack_blocks(matrix) if name.endswith("_blocks") else pack_scales(matrix, tuning.num_warps)
            place[expert].copy_(packed)
    else:
        target = place.view(tensor.dtype) if place.dtype == torch.int32 else place
        target.copy_(tensor.reshape(target.shape))


def _places(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, the part of the stacked tensor that it fills)."""
    q, kv = config.q_size, config.kv_size
    yield "model.embed_tokens.weight", weights.embed
    yield "model.norm.weight", weights.final_norm
    yield "lm_head.weight", weights.lm_head
    for n in range(config.n_layers):
        layer = f"model.layers.{n}"
        yield f"{layer}.input_layernorm.weight", weights.attn_norm[n]
        yield f"{layer}.post_attention_layernorm.weight", weights.mlp_norm[n]
        for proj, rows in (("q", slice(0, q)), ("k", slice(q, q + kv)), ("v", slice(q + kv, q + 2 * kv))):
            yield f"{layer}.self_attn.{proj}_proj.weight", weights.qkv[n, rows]
            yield f"{layer}.self_attn.{proj}_proj.bias", weights.qkv_bias[n, rows]
        yield f"{layer}.self_attn.sinks", weights.sinks[n]
        yield f"{layer}.self_attn.o_proj.weight", weights.o[n]
        yield f"{layer}.self_attn.o_proj.bias", weights.o_bias[n]
        yield f"{layer}.mlp.router.weight", weights.router[n]
        yield f"{layer}.mlp.router.bias", weights.router_bias[n]
        experts = f"{layer}.mlp.experts"
        yield f"{experts}.gate_up_proj_blocks", weights.gate_up[n]
        yield f"{experts}.gate_up_proj_scales", weights.gate_up_scales[n]
        yield f"{experts}.gate_up_proj_bias", weights.gate_up_bias[n]
        yield f"{experts}.down_proj_blocks", weights.down[n]
        yield f"{experts}.down_proj_scales", weights.down_scales[n]
        yield f"{experts}.down_proj_bias", weights.down_bias[n]
