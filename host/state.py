"""Device tensors of the decoding kernel besides the weights."""

from typing import NamedTuple

import torch
import triton

from checkpoints.config import MXFP4_GROUP, ModelConfig
from common.barrier import SYNC_WORDS
from common.sm90.tile_product import tile_vector_size
from host.rope import rope_tables
from host.tuning import Tuning


class State(NamedTuple):
    """Device tensors that a step reads and writes besides the weights; float32 unless a comment says otherwise."""

    tokens: torch.Tensor  # [context + 1] int32: a step reads its position's token and writes the next, or NOT_FINITE
    k_cache: torch.Tensor  # [layers, kv heads, context, head_dim], of the requested kv_dtype
    v_cache: torch.Tensor  # shaped like k_cache
    cos: torch.Tensor  # [context, head_dim / 2]
    sin: torch.Tensor  # [context, head_dim / 2]
    windows: torch.Tensor  # [layers] int32, 0 for full attention
    x: torch.Tensor  # [hidden] the residual stream
    qkv: torch.Tensor  # [q + k + v rows]
    attention: torch.Tensor  # [heads, head_dim]
    split_m: torch.Tensor  # [kv heads, splits, group] states of the split softmax
    split_l: torch.Tensor  # shaped like split_m
    split_acc: torch.Tensor  # [kv heads, splits, group, head_dim]
    split_arrivals: torch.Tensor  # [kv heads] int32
    router_logits: torch.Tensor  # [experts]
    expert_in: torch.Tensor  # [hidden] float32; float8e4nv with --quant; float16 for packed matrices, see tile_product
    expert_in_scale: torch.Tensor  # [hidden / 32] uint8 with --quant; [1] float32 without it and for packed matrices
    expert_act: torch.Tensor  # [top k, intermediate], of the dtype of expert_in
    expert_act_scale: torch.Tensor  # [top k, intermediate / 32] uint8, used with --quant unless matrices are packed
    expert_out: torch.Tensor  # [top k, hidden], weighted; the residual stream is x plus all of these
    head_value: torch.Tensor  # [programs] each program's largest logit
    head_index: torch.Tensor  # [programs] int32: its token id, or NOT_FINITE if any of the program's logits is not
    logits: torch.Tensor  # [vocab]
    inverse_temperature: torch.Tensor  # [1] 1 / temperature of sampling; 0: the largest logit
    seed: torch.Tensor  # [1] int64
    sync: torch.Tensor  # [SYNC_WORDS] int32
    trace: torch.Tensor  # [events, programs] int64, see common/trace.py; events is 0 unless a token is to be traced


def new_state(
    config: ModelConfig,
    tuning: Tuning,
    quant: bool,
    max_context: int,
    num_programs: int,
    device: torch.device | str,
    kv_dtype: torch.dtype = torch.bfloat16,
    trace_events: int = 0,
) -> State:
    """Allocate the zeroed state for one sequence of up to max_context tokens."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    hidden, top_k, inter = config.hidden_size, config.experts_per_token, config.intermediate_size
    cache = (config.n_layers, config.n_kv_heads, max_context, config.head_dim)
    group = max(tuning.attention.min_query_rows, triton.next_power_of_2(config.n_heads // config.n_kv_heads))
    splits = (config.n_kv_heads, tuning.attention.max_splits, group)
    expert_in, expert_act = _expert_buffers(config, tuning, quant)
    in_mxfp8 = quant and not tuning.machine.experts.is_packed
    cos, sin = rope_tables(config, max_context, device)
    windows = [config.window(n) for n in range(config.n_layers)]
    return State(
        tokens=zeros(max_context + 1, dtype=torch.int32),
        k_cache=zeros(*cache, dtype=kv_dtype),
        v_cache=zeros(*cache, dtype=kv_dtype),
        cos=cos,
        sin=sin,
        windows=torch.tensor(windows, dtype=torch.int32, device=device),
        x=zeros(hidden),
        qkv=zeros(config.qkv_size),
        attention=zeros(config.q_size),
        split_m=zeros(*splits),
        split_l=zeros(*splits),
        split_acc=zeros(*splits, config.head_dim),
        split_arrivals=zeros(config.n_kv_heads, dtype=torch.int32),
        router_logits=zeros(config.n_experts),
        expert_in=zeros(*expert_in[0], dtype=expert_in[1]),
        expert_in_scale=zeros(hidden // MXFP4_GROUP, dtype=torch.uint8) if in_mxfp8 else zeros(1),
        expert_act=zeros(*expert_act[0], dtype=expert_act[1]),
        expert_act_scale=zeros(top_k, inter // MXFP4_GROUP, dtype=torch.uint8),
        expert_out=zeros(top_k, hidden),
        head_value=zeros(num_programs),
        head_index=zeros(num_programs, dtype=torch.int32),
        logits=zeros(config.vocab_size),
        inverse_temperature=zeros(1),
        seed=zeros(1, dtype=torch.int64),
        sync=zeros(SYNC_WORDS, dtype=torch.int32),
        trace=zeros(trace_events, num_programs, dtype=torch.int64),
    )


def _expert_buffers(config: ModelConfig, tuning: Tuning, quant: bool):
    """Return (shape, dtype) of expert_in and of expert_act."""
    shape_in, shape_act = (config.hidden_size,), (config.experts_per_token, config.intermediate_size)
    if not tuning.machine.experts.is_packed:
        dtype = torch.float8_e4m3fn if quant else torch.float32
        return (shape_in, dtype), (shape_act, dtype)
    act_shape = (config.experts_per_token, tile_vector_size(config.intermediate_size))
    return ((tile_vector_size(config.hidden_size),), torch.float16), (act_shape, torch.float16)
