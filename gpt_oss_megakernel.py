"""GPT-OSS in one kernel launch per token.

Persistent programs walk through the phases of every layer together, a grid barrier between two phases that depend on
each other:

    embedding | per layer: QKV | attention | O projection | router | gate-up | down | then: LM head | argmax

`megakernel` below is that walk; the functions above it are its phases, in order. `MegaModel` holds the weights and the
state and launches it; `main` is the command line.
"""

import argparse
import dataclasses
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# NumPy reads this when it is imported. Interpreted blocks are too small for threads: 65 against 270 ms per token.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit decorates

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

import common
from common import GROUP
from host import cpu_interpreter
from host.checkpoint import Checkpoint, RandomCheckpoint
from host.cli import (
    DEFAULT_MODEL,
    ArgumentParser,
    add_prompt_arguments,
    device_name,
    logits_writer,
    positive_int,
    prompt_ids_from,
    run_main,
    stream_generation,
    torch_device,
)
from host.config import MXFP4_GROUP, PRESETS, ModelConfig, check_token
from host.errors import InputError, MegakernelAborted
from host.launch import Tuning, check_program_count, next_power_of_2, program_count, tuning_for
from host.limits import check_memory, context_length
from host.rope import rope_tables
from host.weights import Weights, load_weights
from load_hf import open_checkpoint
from tokenizer_util import Tokenizer

PHASES = ("QKV", "attention", "O projection", "router", "gate-up", "down")  # each ends with a barrier


class State(NamedTuple):
    """What a step reads and writes on the device besides the weights. float32 unless said."""

    tokens: torch.Tensor  # [context + 1] int32: a step reads its position's and writes the next
    k_cache: torch.Tensor  # [layers, kv heads, context, head_dim] bfloat16, or what was asked for
    v_cache: torch.Tensor
    cos: torch.Tensor  # [context, head_dim / 2]
    sin: torch.Tensor
    windows: torch.Tensor  # [layers] int32, 0 for full attention
    x: torch.Tensor  # [hidden] the residual stream
    qkv: torch.Tensor  # [q + k + v rows]
    attention: torch.Tensor  # [heads, head_dim]
    split_m: torch.Tensor  # [kv heads, splits, group] states of the split softmax
    split_l: torch.Tensor
    split_acc: torch.Tensor  # [kv heads, splits, group, head_dim]
    split_arrivals: torch.Tensor  # [kv heads] int32
    router_logits: torch.Tensor  # [experts]
    expert_in: torch.Tensor  # [hidden], float8e4nv with --quant
    expert_in_scale: torch.Tensor  # [hidden / 32] uint8
    expert_act: torch.Tensor  # [top k, intermediate], float8e4nv with --quant
    expert_act_scale: torch.Tensor  # [top k, intermediate / 32] uint8
    head_value: torch.Tensor  # [programs] each program's largest logit
    head_index: torch.Tensor  # [programs] int32
    logits: torch.Tensor  # [vocab]
    sync: torch.Tensor  # [SYNC_WORDS] int32


@triton.jit
def embed_token(w, s, token, pid, CONFIG: tl.constexpr, BLOCK_H: tl.constexpr):
    """x = embedding row, written by one program."""
    if pid == 0:
        h = tl.arange(0, BLOCK_H)
        row = tl.load(w.embed + token.to(tl.int64) * CONFIG.hidden_size + h, mask=h < CONFIG.hidden_size, other=0.0)
        tl.store(s.x + h, row.to(tl.float32), mask=h < CONFIG.hidden_size)


@triton.jit
def qkv_phase(w, s, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, BLOCK_H: tl.constexpr):
    """qkv = W_qkv @ rmsnorm(x) + b."""
    H: tl.constexpr = CONFIG.hidden_size
    ROWS: tl.constexpr = CONFIG.qkv_size
    M: tl.constexpr = TUNING.qkv_m
    norm_ptr = w.attn_norm + layer * H
    rstd = common.rms_rstd(s.x, H, CONFIG.rms_norm_eps, BLOCK_H)
    for tile in range(pid, tl.cdiv(ROWS, M), n_programs):
        row = tile * M + tl.arange(0, M)
        y = common.gemv_bf16(w.qkv + layer * ROWS * H, s.x, tile * M, ROWS, H, M, TUNING.dense_k, norm_ptr, rstd)
        y += tl.load(w.qkv_bias + layer * ROWS + row, mask=row < ROWS, other=0.0).to(tl.float32)
        tl.store(s.qkv + row, y, mask=row < ROWS)


@triton.jit
def attention_phase(w, s, layer, position, max_context, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """RoPE, KV append, flash decode with sinks: attention = softmax(q k) v, over the window or all of the past."""
    D: tl.constexpr = CONFIG.head_dim
    G: tl.constexpr = CONFIG.n_heads // CONFIG.n_kv_heads
    BLOCK_G: tl.constexpr = CONFIG.padded_group
    SPLITS: tl.constexpr = TUNING.max_splits
    ARCH: tl.constexpr = TUNING.arch
    g = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, D)
    window = tl.load(s.windows + layer)
    start = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    past = position - start
    split_size = tl.maximum(tl.cdiv(tl.cdiv(past, SPLITS), TUNING.block_t) * TUNING.block_t, TUNING.split_t)
    n_splits = tl.maximum(tl.cdiv(past, split_size), 1)
    cos_ptr = s.cos + position * (D // 2)
    sin_ptr = s.sin + position * (D // 2)
    for unit in range(pid, CONFIG.n_kv_heads * n_splits, n_programs):
        kv_head = unit // n_splits
        split = unit % n_splits
        cache = (layer * CONFIG.n_kv_heads + kv_head) * max_context * D
        q = common.load_rotated(s.qkv, kv_head * G + g, g < G, cos_ptr, sin_ptr, D)
        first = start + split * split_size
        last = tl.minimum(first + split_size, position)
        m, l, acc = common.attend_cache(  # noqa: E741
            q, s.k_cache + cache, s.v_cache + cache, first, last, CONFIG.sm_scale, D, TUNING.block_t
        )
        if split == n_splits - 1:
            # The current key and value stay in registers: no program waits for the cache to be appended.
            one = kv_head + tl.arange(0, 1)
            k = common.load_rotated(s.qkv + CONFIG.q_size, one, one >= 0, cos_ptr, sin_ptr, D)
            k = tl.reshape(k, (D,)).to(s.k_cache.dtype.element_ty)
            v = tl.load(s.qkv + CONFIG.q_size + CONFIG.kv_size + kv_head * D + dim)
            v = v.to(s.v_cache.dtype.element_ty)
            tl.store(s.k_cache + cache + position.to(tl.int64) * D + dim, k)
            tl.store(s.v_cache + cache + position.to(tl.int64) * D + dim, v)
            m, l, acc = common.attend_one(m, l, acc, q, k.to(tl.float32), v.to(tl.float32), CONFIG.sm_scale)  # noqa: E741

        state = kv_head * SPLITS * BLOCK_G + g
        complete = n_splits == 1
        if n_splits > 1:
            mine = state + split * BLOCK_G
            tl.store(s.split_m + mine, m)
            tl.store(s.split_l + mine, l)
            tl.store(s.split_acc + mine[:, None] * D + dim[None, :], acc)
            complete = common.arrive_last(s.split_arrivals + kv_head, n_splits, ARCH)
            if complete:
                m = tl.load(s.split_m + state)
                l = tl.load(s.split_l + state)  # noqa: E741
                acc = tl.load(s.split_acc + state[:, None] * D + dim[None, :])
                for other in range(1, n_splits):
                    theirs = state + other * BLOCK_G
                    m, l, acc = common.merge_states(  # noqa: E741
                        m,
                        l,
                        acc,
                        tl.load(s.split_m + theirs),
                        tl.load(s.split_l + theirs),
                        tl.load(s.split_acc + theirs[:, None] * D + dim[None, :]),
                    )
        if complete:
            head = kv_head * G + g
            sink = tl.load(w.sinks + layer * CONFIG.n_heads + head, mask=g < G, other=0.0)
            out = common.finish_with_sink(m, l, acc, sink)
            tl.store(s.attention + head[:, None] * D + dim[None, :], out, mask=(g < G)[:, None])


@triton.jit
def o_phase(w, s, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """x += W_o @ attention + b."""
    H: tl.constexpr = CONFIG.hidden_size
    K: tl.constexpr = CONFIG.q_size
    M: tl.constexpr = TUNING.o_m
    for tile in range(pid, tl.cdiv(H, M), n_programs):
        row = tile * M + tl.arange(0, M)
        y = common.gemv_bf16(w.o + layer * H * K, s.attention, tile * M, H, K, M, TUNING.dense_k)
        y += tl.load(w.o_bias + layer * H + row, mask=row < H, other=0.0).to(tl.float32)
        tl.store(s.x + row, tl.load(s.x + row, mask=row < H, other=0.0) + y, mask=row < H)


@triton.jit
def router_phase(
    w, s, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr, BLOCK_H: tl.constexpr
):
    """router_logits = W_r @ rmsnorm(x) + b, and the experts' input: rmsnorm(x), in MXFP8 with --quant."""
    H: tl.constexpr = CONFIG.hidden_size
    E: tl.constexpr = CONFIG.n_experts
    M: tl.constexpr = TUNING.router_m
    norm_ptr = w.mlp_norm + layer * H
    rstd = common.rms_rstd(s.x, H, CONFIG.rms_norm_eps, BLOCK_H)
    for tile in range(pid, tl.cdiv(E, M), n_programs):
        row = tile * M + tl.arange(0, M)
        y = common.gemv_bf16(w.router + layer * E * H, s.x, tile * M, E, H, M, TUNING.head_k, norm_ptr, rstd)
        y += tl.load(w.router_bias + layer * E + row, mask=row < E, other=0.0).to(tl.float32)
        tl.store(s.router_logits + row, y, mask=row < E)
    if pid == n_programs - 1:  # the one with the fewest router rows
        write_expert_input(s, norm_ptr, rstd, H, QUANT, BLOCK_H)


@triton.jit
def write_expert_input(s, norm_ptr, rstd, H: tl.constexpr, QUANT: tl.constexpr, BLOCK_H: tl.constexpr):
    group = tl.arange(0, BLOCK_H // GROUP)
    h = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    normed = common.load_normed(s.x, norm_ptr, rstd, h, h < H)
    if QUANT:
        elements, scale = common.quantize_mxfp8(normed)
        tl.store(s.expert_in + h, elements, mask=h < H)
        tl.store(s.expert_in_scale + group, scale, mask=group < H // GROUP)
    else:
        tl.store(s.expert_in + h, normed, mask=h < H)


@triton.jit
def gate_up_phase(
    w, s, layer, experts, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr
):
    """expert_act = swiglu(W_gate_up @ expert_in + b) of every chosen expert; gate and up rows alternate."""
    K: tl.constexpr = CONFIG.hidden_size
    ROWS: tl.constexpr = 2 * CONFIG.intermediate_size
    # Whoever quantizes needs all 32 outputs of a scale, that is 64 rows.
    M: tl.constexpr = max(TUNING.gate_up_m, 2 * GROUP) if QUANT else TUNING.gate_up_m
    N_TILES: tl.constexpr = (ROWS + M - 1) // M
    for item in range(pid, N_TILES * CONFIG.experts_per_token, n_programs):
        slot = item // N_TILES
        row0 = (item % N_TILES) * M
        matrix = (layer * CONFIG.n_experts + common.pick(experts, slot)) * ROWS
        y = expert_gemv(
            w.gate_up, w.gate_up_scales, s.expert_in, s.expert_in_scale, matrix, row0, ROWS, K, M, TUNING, QUANT
        )
        row = row0 + tl.arange(0, M)
        y += tl.load(w.gate_up_bias + matrix + row, mask=row < ROWS, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(y, (M // 2, 2)))
        act = common.swiglu(gate, up, CONFIG.swiglu_limit, CONFIG.swiglu_alpha)
        write_expert_act(s, act, slot, row0 // 2, ROWS // 2, QUANT)


@triton.jit
def write_expert_act(s, act, slot, first, SIZE: tl.constexpr, QUANT: tl.constexpr):
    """Store act [N], elements first .. first + N of one expert's SIZE; in MXFP8 with --quant."""
    N: tl.constexpr = act.shape[0]
    i = first + tl.arange(0, N)
    if QUANT:
        elements, scale = common.quantize_mxfp8(tl.reshape(act, (N // GROUP, GROUP)))
        tl.store(s.expert_act + slot * SIZE + i, tl.reshape(elements, (N,)), mask=i < SIZE)
        group = tl.arange(0, N // GROUP) + first // GROUP
        tl.store(s.expert_act_scale + slot * (SIZE // GROUP) + group, scale, mask=group < SIZE // GROUP)
    else:
        tl.store(s.expert_act + slot * SIZE + i, act, mask=i < SIZE)


@triton.jit
def down_phase(
    w, s, layer, experts, weights, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr
):
    """x += sum over the chosen experts of weight * (W_down @ expert_act + b), in the router's order."""
    ROWS: tl.constexpr = CONFIG.hidden_size
    K: tl.constexpr = CONFIG.intermediate_size
    M: tl.constexpr = TUNING.down_m
    for tile in range(pid, tl.cdiv(ROWS, M), n_programs):
        row = tile * M + tl.arange(0, M)
        x = tl.load(s.x + row, mask=row < ROWS, other=0.0)
        for slot in range(CONFIG.experts_per_token):
            matrix = (layer * CONFIG.n_experts + common.pick(experts, slot)) * ROWS
            act = s.expert_act + slot * K
            act_scale = s.expert_act_scale + slot * (K // GROUP)
            y = expert_gemv(w.down, w.down_scales, act, act_scale, matrix, tile * M, ROWS, K, M, TUNING, QUANT)
            y += tl.load(w.down_bias + matrix + row, mask=row < ROWS, other=0.0).to(tl.float32)
            x += common.pick(weights, slot) * y
        tl.store(s.x + row, x, mask=row < ROWS)


@triton.jit
def expert_gemv(
    blocks_ptr,
    scales_ptr,
    x_ptr,
    x_scale_ptr,
    matrix,
    row0,
    n_rows,
    K: tl.constexpr,
    M: tl.constexpr,
    TUNING: tl.constexpr,
    QUANT: tl.constexpr,
):
    """Rows row0 .. row0 + M of the MXFP4 matrix that starts at row `matrix` of the stack, times x."""
    blocks_ptr += matrix * (K // 8)
    scales_ptr += matrix * (K // GROUP)
    if QUANT:
        return common.gemv_fp4_fp8(
            blocks_ptr, scales_ptr, x_ptr, x_scale_ptr, row0, n_rows, K, M, TUNING.expert_k, TUNING.dot_scaled
        )
    else:
        return common.gemv_fp4(blocks_ptr, scales_ptr, x_ptr, row0, n_rows, K, M, TUNING.expert_k)


@triton.jit
def head_phase(w, s, want_logits, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, BLOCK_H: tl.constexpr):
    """Each program's largest logit of W_head @ rmsnorm(x); the logits themselves only when asked for."""
    H: tl.constexpr = CONFIG.hidden_size
    V: tl.constexpr = CONFIG.vocab_size
    M: tl.constexpr = TUNING.head_m
    rstd = common.rms_rstd(s.x, H, CONFIG.rms_norm_eps, BLOCK_H)
    best = tl.full([M], float("-inf"), tl.float32)
    best_index = tl.zeros([M], tl.int32)
    for tile in range(pid, tl.cdiv(V, M), n_programs):
        row = tile * M + tl.arange(0, M)
        logits = common.gemv_bf16(w.lm_head, s.x, tile * M, V, H, M, TUNING.head_k, w.final_norm, rstd)
        if want_logits:
            tl.store(s.logits + row, logits, mask=row < V)
        best, best_index = common.keep_larger(best, best_index, tl.where(row < V, logits, float("-inf")), row)
    value, index = common.reduce_argmax(best, best_index)
    tl.store(s.head_value + pid, value)
    tl.store(s.head_index + pid, index)


@triton.jit
def argmax_phase(s, position, pid, n_programs, BLOCK_P: tl.constexpr):
    """tokens[position + 1] = index of the largest logit, unless a barrier gave up."""
    if pid == 0:
        program = tl.arange(0, BLOCK_P)
        value = tl.load(s.head_value + program, mask=program < n_programs, other=float("-inf"))
        index = tl.load(s.head_index + program, mask=program < n_programs, other=0x7FFFFFFF)
        _, token = common.reduce_argmax(value, index)
        if tl.load(s.sync + common.ABORT) == 0:  # otherwise -1 stays there
            tl.store(s.tokens + position + 1, token)


@triton.jit(do_not_specialize=["position", "want_token", "want_logits", "n_layers", "n_programs"])
def megakernel(
    w,
    s,
    position,
    want_token,
    want_logits,
    n_layers,
    max_context,
    n_programs,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
    QUANT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Decode the token at `position`: w is Weights, s is State, CONFIG a ModelConfig, TUNING a Tuning.

    want_token and want_logits (0 or 1) say what to make of the final hidden state; without either, for a prompt's
    tokens, the LM head is left out.
    """
    pid = tl.program_id(0)
    BLOCK_H: tl.constexpr = triton.next_power_of_2(CONFIG.hidden_size)
    SPINS: tl.constexpr = TUNING.spin_limit
    ARCH: tl.constexpr = TUNING.arch

    token = tl.maximum(tl.load(s.tokens + position), 0)  # -1 after an abort
    embed_token(w, s, token, pid, CONFIG, BLOCK_H)
    common.grid_barrier(s.sync, 1, n_programs, SPINS, ARCH)

    for n in range(n_layers):
        layer = tl.cast(n, tl.int64)
        barrier = 2 + n * 6
        qkv_phase(w, s, layer, pid, n_programs, CONFIG, TUNING, BLOCK_H)
        common.grid_barrier(s.sync, barrier, n_programs, SPINS, ARCH)

        attention_phase(w, s, layer, position, max_context, pid, n_programs, CONFIG, TUNING)
        common.grid_barrier(s.sync, barrier + 1, n_programs, SPINS, ARCH)

        o_phase(w, s, layer, pid, n_programs, CONFIG, TUNING)
        common.grid_barrier(s.sync, barrier + 2, n_programs, SPINS, ARCH)

        router_phase(w, s, layer, pid, n_programs, CONFIG, TUNING, QUANT, BLOCK_H)
        common.grid_barrier(s.sync, barrier + 3, n_programs, SPINS, ARCH)

        experts, weights = common.top_k_softmax(
            s.router_logits,
            CONFIG.n_experts,
            CONFIG.experts_per_token,
            triton.next_power_of_2(CONFIG.n_experts),
            triton.next_power_of_2(CONFIG.experts_per_token),
        )
        gate_up_phase(w, s, layer, experts, pid, n_programs, CONFIG, TUNING, QUANT)
        common.grid_barrier(s.sync, barrier + 4, n_programs, SPINS, ARCH)

        down_phase(w, s, layer, experts, weights, pid, n_programs, CONFIG, TUNING, QUANT)
        common.grid_barrier(s.sync, barrier + 5, n_programs, SPINS, ARCH)

    if want_token | want_logits:
        head_phase(w, s, want_logits, pid, n_programs, CONFIG, TUNING, BLOCK_H)
        common.grid_barrier(s.sync, 2 + n_layers * 6, n_programs, SPINS, ARCH)
        if want_token:
            argmax_phase(s, position, pid, n_programs, BLOCK_P)
    common.leave_grid(s.sync, n_programs, ARCH)


def new_state(
    config: ModelConfig,
    tuning: Tuning,
    quant: bool,
    max_context: int,
    num_programs: int,
    device: torch.device | str,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> State:
    """Zeroed state for one sequence of up to max_context tokens."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    hidden, top_k, inter = config.hidden_size, config.experts_per_token, config.intermediate_size
    cache = (config.n_layers, config.n_kv_heads, max_context, config.head_dim)
    splits = (config.n_kv_heads, tuning.max_splits, config.padded_group)
    expert_dtype = torch.float8_e4m3fn if quant else torch.float32
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
        expert_in=zeros(hidden, dtype=expert_dtype),
        expert_in_scale=zeros(hidden // MXFP4_GROUP, dtype=torch.uint8),
        expert_act=zeros(top_k, inter, dtype=expert_dtype),
        expert_act_scale=zeros(top_k, inter // MXFP4_GROUP, dtype=torch.uint8),
        head_value=zeros(num_programs),
        head_index=zeros(num_programs, dtype=torch.int32),
        logits=zeros(config.vocab_size),
        sync=zeros(common.SYNC_WORDS, dtype=torch.int32),
    )


class MegaModel:
    """A GPT-OSS model on one device, decoded greedily, one token a launch."""

    def __init__(
        self,
        checkpoint,
        quant: bool = False,
        max_context: int | None = None,
        device: torch.device | str | None = None,
        num_programs: int | None = None,
        tuning: Tuning | None = None,
        kv_dtype: torch.dtype = torch.bfloat16,
        show_progress: bool = False,
    ):
        """The context defaults to 4096 positions, or all of a model with fewer; the device to the GPU if there is one.

        kv_dtype is float32 for comparisons without rounding. InputError if the context is longer than the model's, or
        weights and cache do not fit the device.
        """
        self.config: ModelConfig = checkpoint.config
        self.device = usable_device(device)
        self.quant = quant
        self.max_context = context_length(self.config, max_context)
        self.tuning = tuning or tuning_for(self.device, self.config)
        self.num_programs = program_count(self.device, self.tuning) if num_programs is None else num_programs
        check_program_count(self.num_programs, self.device, self.tuning)
        self.grid = (self.num_programs,)
        check_memory(self.config, self.max_context, kv_dtype, self.device)
        self.weights: Weights = load_weights(checkpoint, self.device, show_progress)
        self.state = new_state(
            self.config, self.tuning, quant, self.max_context, self.num_programs, self.device, kv_dtype
        )
        self._launch(0, n_layers=0)  # compiles, and shows that the programs can be resident, before anyone waits

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        quant: bool = False,
        max_context: int | None = None,
        device: torch.device | str | None = None,
        **options,
    ) -> "MegaModel":
        """Load a checkpoint folder in the Hugging Face layout, or a hub id. Options and errors: see MegaModel."""
        return cls(open_checkpoint(path), quant, max_context, device, **options)

    def reset(self) -> None:
        """Forget all positions, and a barrier that gave up."""
        for tensor in (self.state.k_cache, self.state.v_cache, self.state.split_arrivals, self.state.sync):
            tensor.zero_()

    def switch_path(self, quant: bool) -> None:
        """Go on with the quantized or the default path: the same weights, a new state."""
        kv_dtype = self.state.k_cache.dtype
        del self.state  # before the new one needs its memory
        self.quant = quant
        self.state = new_state(
            self.config, self.tuning, quant, self.max_context, self.num_programs, self.device, kv_dtype
        )

    def step(self, token_id: int, position: int) -> int:
        """Feed a token at a position whose predecessors were fed; returns the most likely next token."""
        self._write_tokens([token_id], position)
        self._launch(position, token=True)
        return self._token(self.state.tokens[position + 1])

    def logits(self, token_id: int, position: int) -> torch.Tensor:
        """The same, but returns the next token's logits, float32 [vocab], a copy on the model's device."""
        self._write_tokens([token_id], position)
        self._launch(position, logits=True)
        self._check_barriers()
        return self.state.logits.clone()

    def hidden(self, token_id: int, position: int, n_layers: int) -> torch.Tensor:
        """The same, but returns the residual stream after the first n_layers, float32 [hidden], a copy."""
        if not 0 <= n_layers <= self.config.n_layers:
            raise InputError(f"n_layers {n_layers}: the model has {self.config.n_layers}")
        self._write_tokens([token_id], position)
        self._launch(position, n_layers=n_layers)
        self._check_barriers()
        return self.state.x.clone()

    def generate(
        self,
        prompt_ids: Iterable[int],
        max_new_tokens: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[int]:
        """Yield the ids that follow the prompt, a stop id last. Ends early when the context is full.

        `on_logits` receives the logits, float32 [vocab], of each position fed, the prompt's included; the next launch
        overwrites them.
        """
        prompt_ids = list(prompt_ids)
        if not prompt_ids:
            raise InputError("the prompt is empty")
        self._write_tokens(prompt_ids, 0)
        last = len(prompt_ids) - 1
        for position in range(last):
            self._launch(position, logits=on_logits is not None)
            if on_logits:
                self._check_barriers()
                on_logits(self.state.logits)
        for token in self._decode(last, min(last + max_new_tokens, self.max_context), on_logits):
            yield token
            if token in self.config.stop_ids:
                return

    def decode(
        self, token_id: int, position: int, n_tokens: int, on_launch: Callable[[], None] | None = None
    ) -> Iterator[int]:
        """Feed a token at a position whose predecessors are in the cache and yield the n_tokens ids that follow.

        Stop ids end nothing; a full context does. `on_launch` is called after each launch, which a GPU may only have
        queued: events recorded there mark where it ends.
        """
        self._write_tokens([token_id], position)
        yield from self._decode(position, min(position + n_tokens, self.max_context), on_launch=on_launch)

    def _decode(
        self,
        start: int,
        end: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
        on_launch: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Launch positions start .. end - 1, each on the token before it, and yield their tokens.

        On a GPU the next launch is queued before a token is read back, so that the device never waits for the host.
        """
        queued: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        for position in range(start, end):
            self._launch(position, token=True, logits=on_logits is not None)
            if on_launch:
                on_launch()
            if on_logits or self.device.type == "cpu":
                token_id = self._token(self.state.tokens[position + 1])
                if on_logits:
                    on_logits(self.state.logits)
                yield token_id
                continue
            queued.append(self._read_back(position + 1))
            if len(queued) > 1:
                yield self._wait_for(*queued.popleft())
        while queued:
            yield self._wait_for(*queued.popleft())

    def _read_back(self, position: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        token = torch.empty((), dtype=torch.int32, pin_memory=True)
        token.copy_(self.state.tokens[position], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return token, copied

    def _wait_for(self, token: torch.Tensor, copied: torch.cuda.Event) -> int:
        copied.synchronize()
        return self._token(token)

    def _write_tokens(self, token_ids: list[int], position: int) -> None:
        """Put tokens at positions from `position` on; later ones become -1, "not decoded"."""
        if position < 0 or position + len(token_ids) > self.max_context:
            raise InputError(
                f"positions {position} to {position + len(token_ids) - 1} do not fit a context of {self.max_context}"
            )
        for token_id in token_ids:
            check_token(token_id, self.config)
        self.state.tokens[position:] = -1
        ids = torch.tensor(token_ids, dtype=torch.int32)
        self.state.tokens[position : position + len(token_ids)] = ids.to(self.device)

    def _launch(self, position: int, token: bool = False, logits: bool = False, n_layers: int | None = None) -> None:
        try:
            megakernel[self.grid](
                self.weights,
                self.state,
                position,
                int(token),
                int(logits),
                self.config.n_layers if n_layers is None else n_layers,
                self.max_context,
                self.num_programs,
                CONFIG=self.config,
                TUNING=self.tuning,
                QUANT=self.quant,
                BLOCK_P=next_power_of_2(self.num_programs),
                num_warps=self.tuning.num_warps,
                launch_cooperative_grid=self.tuning.arch == "cuda",
            )
        except RuntimeError as error:
            if "cooperative launch" not in str(error):
                raise
            raise InputError(
                f"--num-programs {self.num_programs}: more than can be resident on {self.device}"
            ) from None

    def _token(self, token: torch.Tensor) -> int:
        token_id = int(token)
        if token_id < 0:
            self._check_barriers()
            raise RuntimeError("the kernel ended without a token and without an abort record")
        return token_id

    def _check_barriers(self) -> None:
        barrier = int(self.state.sync[common.ABORT.value])
        if barrier:
            raise MegakernelAborted(
                f"a program did not arrive at the barrier after {barrier_name(barrier, self.config.n_layers)}; "
                "call reset() before the next step"
            )


def barrier_name(barrier: int, n_layers: int) -> str:
    """What precedes barrier number 1, 2, ... of a launch."""
    layer, phase = divmod(barrier - 2, len(PHASES))
    if barrier == 1:
        return "the embedding"
    return f"the {PHASES[phase]} phase of layer {layer}" if layer < n_layers else "the LM head"


def parse_arguments() -> argparse.Namespace:
    """The command line; InputError where it is wrong."""
    parser = ArgumentParser(description="GPT-OSS decoded by one persistent kernel launch per token.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint folder or hub id; default: the shipped one")
    source.add_argument("--random-weights", choices=PRESETS, help="full-size weights made on the device, for timing")
    add_prompt_arguments(parser)
    parser.add_argument("--quant", action="store_true", help="experts as FP4 x FP8, activations quantized on the way")
    parser.add_argument("--layers", metavar="N", type=positive_int, help="use the first N layers only")
    parser.add_argument("--num-programs", metavar="N", type=positive_int, help="default: all that are resident at once")
    return parser.parse_args()


def open_model(args: argparse.Namespace) -> tuple[Checkpoint, Tokenizer | None]:
    """The checkpoint that the command line names, and its tokenizer. Random weights have none, and no stop ids."""
    if not args.random_weights:
        checkpoint = open_checkpoint(args.model, args.layers)
        return checkpoint, Tokenizer.from_folder(checkpoint.folder)
    config = PRESETS[args.random_weights]
    config = dataclasses.replace(config if args.layers is None else config.cut(args.layers), stop_ids=())
    return RandomCheckpoint(config, device=usable_device(None), name=f"random {args.random_weights}"), None


def main() -> None:
    args = parse_arguments()
    checkpoint, tokenizer = open_model(args)
    prompt_ids = prompt_ids_from(args, tokenizer, checkpoint.config)
    with logits_writer(args.logits_out, checkpoint.config.vocab_size) as on_logits:
        model = MegaModel(
            checkpoint, args.quant, args.max_context, num_programs=args.num_programs, show_progress=sys.stderr.isatty()
        )
        stream_generation(
            model.generate(prompt_ids, args.max_new_tokens, on_logits),
            prompt_ids,
            tokenizer,
            checkpoint.config,
            args.max_new_tokens,
            device=device_name(model.device),
            path="quant" if args.quant else "default",
            as_json=args.json,
        )


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the one Triton was set up for when this module was imported. Raises InputError."""
    interpreted = isinstance(megakernel, InterpretedFunction)
    device = torch_device(device or ("cpu" if interpreted else "cuda"))
    if (device.type == "cpu") != interpreted:
        raise InputError(f"device {device}: set TRITON_INTERPRET=1 for the CPU, unset it for a GPU")
    if interpreted:
        cpu_interpreter.install()
    elif device.index not in (None, torch.cuda.current_device()):
        raise InputError(f"device {device}: not the current one; choose it with CUDA_VISIBLE_DEVICES")
    return device


if __name__ == "__main__":
    sys.exit(run_main(main))
