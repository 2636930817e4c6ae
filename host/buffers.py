"""Device buffers that prefill.py keeps between its launches."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from checkpoints.config import MXFP4_GROUP, ModelConfig
from common.sm90.prompt_tiles import vector_stride
from host.tuning import MAX_BLOCK_TOKENS

MIN_BLOCK_TOKENS = 16  # of an expert: the narrowest tile of a matrix product


class Buffers(NamedTuple):
    """Device buffers for a block of at most `tokens` tokens."""

    x: torch.Tensor  # float32 [tokens, hidden], the residual stream without expert_out
    high: torch.Tensor  # bfloat16 [tokens, hidden or q rows], a dense product's vectors, see common/operands.py
    low: torch.Tensor  # shaped like high
    qkv: torch.Tensor  # float32 [tokens, q + k + v rows]
    expert_in: torch.Tensor  # float16 [tokens, vector_stride] or, for scaled products, float8_e4m3fn [tokens, hidden]
    expert_in_scale: torch.Tensor  # float32 [tokens], or uint8 [tokens, hidden / 32]
    chosen: torch.Tensor  # int32 [tokens, top_k]
    weights: torch.Tensor  # float32 [tokens, top_k]
    order: torch.Tensor  # int32 [tokens * top_k], (token, expert) pairs sorted by expert
    starts: torch.Tensor  # int32 [experts + 1], where each expert's pairs begin in `order`
    blocks: torch.Tensor  # int32 [2, .., 4], the pairs that each program of gate-up and down multiplies, see cut_blocks
    act: torch.Tensor  # [tokens * top_k, intermediate] in the order of `order`, of the dtype of expert_in
    act_scale: torch.Tensor  # uint8 [tokens * top_k, intermediate / 32], for scaled products
    expert_out: torch.Tensor  # float32 [tokens, top_k, hidden]


def buffer_shapes(config: ModelConfig, tokens: int, scaled: bool, stride: Callable[[int], int]) -> Buffers:
    """Return (shape, dtype) of each buffer.

    scaled: whether products take MXFP8 vectors. stride: elements from one vector's start to the next, see PromptLayout.
    """
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
        blocks=((2, tokens * top_k // MIN_BLOCK_TOKENS + config.n_experts, 4), i32),
        act=((tokens * top_k, stride(i)), operand),
        act_scale=((tokens * top_k if scaled else 0, i // MXFP4_GROUP), u8),
        expert_out=((tokens, top_k, h), f32),
    )


def max_block_tokens(config: ModelConfig) -> int:
    """Return the most tokens in a block, as kernels count the elements of all experts' vectors in 32 bits."""
    stride = vector_stride(max(config.hidden_size, config.intermediate_size))
    return min(MAX_BLOCK_TOKENS, (2**31 - 1) // (config.experts_per_token * stride))


def buffer_bytes(config: ModelConfig, max_context: int) -> int:
    """Return the bytes of device memory that the buffers take at most, on any device."""
    shapes = buffer_shapes(config, min(max_block_tokens(config), max_context), scaled=False, stride=vector_stride)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)
