"""What prefill.py keeps on the device from launch to launch."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from checkpoints.config import MXFP4_GROUP, ModelConfig
from common.sm90.prompt_tiles import vector_stride
from host.tuning import MOST_BLOCK_TOKENS

LEAST_WIDTH = 16  # of an expert's blocks, the least of a matrix product


class Buffers(NamedTuple):
    """What a block of at most `tokens` tokens leaves from launch to launch."""

    x: torch.Tensor  # float32 [tokens, hidden], the residual stream, but for expert_out
    high: torch.Tensor  # bfloat16 [tokens, hidden or q rows], a dense product's vectors, see common/parts.py
    low: torch.Tensor
    qkv: torch.Tensor  # float32 [tokens, q + k + v rows]
    expert_in: torch.Tensor  # float16 [tokens, vector_stride] or, for scaled products, float8_e4m3fn [tokens, hidden]
    expert_in_scale: torch.Tensor  # float32 [tokens], or uint8 [tokens, hidden / 32]
    chosen: torch.Tensor  # int32 [tokens, top_k]
    weights: torch.Tensor  # float32 [tokens, top_k]
    order: torch.Tensor  # int32 [tokens * top_k], pairs in the order of their experts
    starts: torch.Tensor  # int32 [experts + 1], where each expert's pairs begin
    blocks: torch.Tensor  # int32 [2, .., 4], the places that gate-up's and down's programs multiply, see cut_blocks
    act: torch.Tensor  # like expert_in, [tokens * top_k, intermediate], in that order
    act_scale: torch.Tensor  # uint8 [tokens * top_k, intermediate / 32], for scaled products
    expert_out: torch.Tensor  # float32 [tokens, top_k, hidden]


def buffer_shapes(config: ModelConfig, tokens: int, scaled: bool, stride: Callable[[int], int]) -> Buffers:
    """(shape, dtype) of each. stride: elements from one vector's to the next one's, see PromptLayout."""
    h, i, top_k = config.hidden_size, config.intermediate_size, config.experts_per_token
    f32, f16, u8, i32 = torch.float32, torch.float16, torch.uint8, torch.int32
    operand = torch.float8_e4m3fn if scaled else f16
    return Buffers(
        x=((tokens, h), f32),
        high=((tokens, max(h, config.q_size)), torch.bfloat16),
        low=((tokens, max(h, config.q_size)), torch.bfloat16),
        qkv=((tokens, config.qkv_size), f32),
        expert_in=((tokens, stride(h)), operand),
        expert_in_scale=((tokens, h // MXFP4_GROUP), u8) if scaled else ((tokens,), f32),
        chosen=((tokens, top_k), i32),
        weights=((tokens, top_k), f32),
        order=((tokens * top_k,), i32),
        starts=((config.n_experts + 1,), i32),
        blocks=((2, tokens * top_k // LEAST_WIDTH + config.n_experts, 4), i32),
        act=((tokens * top_k, stride(i)), operand),
        act_scale=((tokens * top_k if scaled else 0, i // MXFP4_GROUP), u8),
        expert_out=((tokens, top_k, h), f32),
    )


def most_tokens(config: ModelConfig) -> int:
    """Of a block, as kernels count the elements of all experts' vectors in 32 bits."""
    widest = vector_stride(max(config.hidden_size, config.intermediate_size))
    return min(MOST_BLOCK_TOKENS, (2**31 - 1) // (config.experts_per_token * widest))


def buffer_bytes(config: ModelConfig, max_context: int) -> int:
    """Device memory for the buffers of any device's blocks, at most."""
    shapes = buffer_shapes(config, min(most_tokens(config), max_context), scaled=False, stride=vector_stride)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)
