"""A prompt's tokens through all layers in blocks, into the same KV cache that the decoding kernel reads.

A layer is eleven launches, each over all tokens of a block:

    norm | QKV | append | attention | O projection | norm | router | grouping | blocks | gate-up | down

Dense matrices are multiplied in tiles of rows times tokens. Tokens are grouped by the experts that they chose, so that
an expert's weights are decoded once for all tokens of a tile. The last layer ends with its keys and values: what a
prompt's tokens but the last one leave is the cache. The last token is decoded like any other (gpt_oss_megakernel.py).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from checkpoints.config import ModelConfig
from common.attention_rows import attend_rows
from common.build import Build
from common.gemm_dense import gemm_dense
from common.gemm_fp4 import gemm_fp4, gemm_fp4_fp8, split_rows
from common.gemv_dense import matrix_at, scales_of, vector_unit
from common.grouping import cut_blocks, group_pairs, load_block
from common.parts import half_unit, store_two_parts, to_half
from common.quant import GROUP, e8m0_to_float32, quantize_mxfp8, round_to_mxfp8
from common.rmsnorm import rms_rstd
from common.rope import load_rotated
from common.router import top_k_softmax_rows
from common.swiglu import swiglu
from host.buffers import Buffers, buffer_shapes, most_tokens
from host.compilers import compile_errors
from host.state import State
from host.tuning import BlockTuning, Tile
from host.weights import Weights

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
# E8M0, 2^13: beside experts' elements with a larger scale float16 loses the others, so such models' prompts are not fed
# in blocks but one by one.
MOST_SCALE = 140
# What changes from launch to launch must not compile a kernel of its own.
DYNAMIC = ["layer", "position", "n_tokens", "n_pairs", "max_context"]


@triton.jit(do_not_specialize=DYNAMIC)
def embed_kernel(tokens_ptr, embed_ptr, x_ptr, position, H: tl.constexpr):
    """x = the tokens' embeddings; a program a token."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, triton.next_power_of_2(H))
    token = tl.load(tokens_ptr + position + t).to(tl.int64)
    row = tl.load(embed_ptr + token * H + h, mask=h < H, other=0.0)
    tl.store(x_ptr + t * H + h, row.to(tl.float32), mask=h < H)


@triton.jit(do_not_specialize=DYNAMIC)
def attention_norm_kernel(x_ptr, expert_out_ptr, norm_ptr, high_ptr, low_ptr, layer, CONFIG: tl.constexpr):
    """x += what the layer before's experts left; (high, low) = rmsnorm(x); a program a token."""
    H: tl.constexpr = CONFIG.hidden_size
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, triton.next_power_of_2(H))
    x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0)
    if layer > 0:
        for slot in tl.static_range(TOP_K):
            x += tl.load(expert_out_ptr + (t * TOP_K + slot) * H + h, mask=h < H, other=0.0)
        tl.store(x_ptr + t * H + h, x, mask=h < H)
    x = _normed(x, norm_ptr + layer * H, CONFIG) * vector_unit(CONFIG.dense.qkv)
    store_two_parts(high_ptr, low_ptr, t * H + h, x, h < H)


@triton.jit(do_not_specialize=DYNAMIC)
def expert_norm_kernel(
    x_ptr,
    norm_ptr,
    high_ptr,
    low_ptr,
    expert_in_ptr,
    expert_in_scale_ptr,
    layer,
    BUILD: tl.constexpr,
):
    """(high, low) = rmsnorm(x), for the router; the experts' input is the same; a program a token."""
    CONFIG: tl.constexpr = BUILD.config
    H: tl.constexpr = CONFIG.hidden_size
    BLOCK_H: tl.constexpr = triton.next_power_of_2(H)
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0)
    x = _normed(x, norm_ptr + layer * H, CONFIG)
    store_two_parts(high_ptr, low_ptr, t * H + h, x * vector_unit(CONFIG.dense.router), h < H)
    if BUILD.is_scaled:
        elements, scale = quantize_mxfp8(tl.reshape(x, (BLOCK_H // GROUP, GROUP)))
        group = tl.arange(0, BLOCK_H // GROUP)
        tl.store(expert_in_ptr + t * H + h, tl.reshape(elements, (BLOCK_H,)), mask=h < H)
        tl.store(expert_in_scale_ptr + t * (H // GROUP) + group, scale, mask=group < H // GROUP)
    else:
        STRIDE: tl.constexpr = BUILD.machine.prompts.vector_stride(H)
        if BUILD.quant:
            x = round_to_mxfp8(x)
        unit, undo = half_unit(tl.max(tl.abs(x), axis=0))
        tl.store(expert_in_ptr + t * STRIDE + BUILD.machine.prompts.column_of(h), to_half(x * unit), mask=h < H)
        tl.store(expert_in_scale_ptr + t, undo)


@triton.jit
def _normed(x, norm_ptr, CONFIG: tl.constexpr):
    """rmsnorm of a whole vector."""
    h = tl.arange(0, x.shape[0])
    rstd = rms_rstd((x,), CONFIG.hidden_size, CONFIG.rms_norm_eps)
    return x * rstd * tl.load(norm_ptr + h, mask=h < CONFIG.hidden_size, other=0.0)


@triton.jit(do_not_specialize=DYNAMIC)
def dense_kernel(
    w_ptr,
    scales_ptr,
    bias_ptr,
    high_ptr,
    low_ptr,
    y_ptr,
    layer,
    n_tokens,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """y [tokens, ROWS] = x W^T + bias, or with ADD y += that; a program a tile of rows and tokens."""
    M_TILES: tl.constexpr = (ROWS + TILE.m - 1) // TILE.m
    pid = tl.program_id(0)
    row0, token0 = pid % M_TILES * TILE.m, pid // M_TILES * TILE.n
    layer = tl.cast(layer, tl.int64)
    w_ptr, scales_ptr = matrix_at(w_ptr, layer, ROWS, K, FORMAT), scales_of(scales_ptr, layer, ROWS, K, FORMAT)
    acc = gemm_dense(
        w_ptr,
        scales_ptr,
        high_ptr,
        low_ptr,
        row0,
        token0,
        n_tokens,
        ROWS,
        K,
        FORMAT,
        TILE.m,
        TILE.n,
        TILE.k,
        TILE.stages,
    )
    row, token = row0 + tl.arange(0, TILE.m), token0 + tl.arange(0, TILE.n)
    y = tl.trans(acc) * (1.0 / vector_unit(FORMAT))
    y += tl.load(bias_ptr + layer * ROWS + row, mask=row < ROWS, other=0.0).to(tl.float32)[None, :]
    y_ptr += token.to(tl.int64)[:, None] * ROWS + row[None, :]
    mask = (token < n_tokens)[:, None] & (row < ROWS)[None, :]
    if ADD:
        y += tl.load(y_ptr, mask=mask, other=0.0)
    tl.store(y_ptr, y, mask=mask)


@triton.jit(do_not_specialize=DYNAMIC)
def append_kernel(
    qkv_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, layer, position, max_context, CONFIG: tl.constexpr
):
    """The cache at the tokens' positions = their keys, rotated, and values; a program a token."""
    D: tl.constexpr = CONFIG.head_dim
    KV_HEADS: tl.constexpr = CONFIG.n_kv_heads
    t = tl.program_id(0).to(tl.int64)
    position += t
    head = tl.arange(0, triton.next_power_of_2(KV_HEADS))
    mask = (head < KV_HEADS)[:, None]
    dim = tl.arange(0, D)[None, :]
    k_ptr = qkv_ptr + t * CONFIG.qkv_size + CONFIG.q_size
    cos_ptr, sin_ptr = cos_ptr + position * (D // 2), sin_ptr + position * (D // 2)
    k = load_rotated(k_ptr, head, head < KV_HEADS, cos_ptr, sin_ptr, D)
    v = tl.load(k_ptr + CONFIG.kv_size + head[:, None] * D + dim, mask=mask, other=0.0)
    at = (layer * KV_HEADS + head).to(tl.int64)[:, None] * max_context * D + position * D + dim
    tl.store(k_cache_ptr + at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=DYNAMIC)
def attention_kernel(
    qkv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    sinks_ptr,
    cos_ptr,
    sin_ptr,
    windows_ptr,
    high_ptr,
    low_ptr,
    layer,
    position,
    n_tokens,
    max_context,
    CONFIG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(high, low) [tokens, heads, head_dim] = attention; a program a KV head and some tokens, the last ones first."""
    D: tl.constexpr = CONFIG.head_dim
    G: tl.constexpr = CONFIG.n_heads // CONFIG.n_kv_heads
    TOKENS: tl.constexpr = BLOCK_M // G
    kv_head = tl.program_id(0) % CONFIG.n_kv_heads
    block = tl.num_programs(0) // CONFIG.n_kv_heads - 1 - tl.program_id(0) // CONFIG.n_kv_heads
    first_token = block * TOKENS
    end_token = tl.minimum(first_token + TOKENS, n_tokens)
    m = tl.arange(0, BLOCK_M)
    token = tl.minimum(first_token + m // G, n_tokens - 1)
    head = kv_head * G + m % G
    mine = (m < TOKENS * G) & (first_token + m // G < n_tokens)
    q_position = position + token
    angles = q_position.to(tl.int64)[:, None] * (D // 2)
    # A query's heads begin qkv_size elements after the one before it.
    row = token.to(tl.int64)[:, None] * CONFIG.qkv_size
    q = load_rotated(qkv_ptr + row, head, m >= 0, cos_ptr + angles, sin_ptr + angles, D)
    sink = tl.load(sinks_ptr + layer * CONFIG.n_heads + head)
    window = tl.load(windows_ptr + layer)
    start = tl.where(window > 0, tl.maximum(position + first_token - window + 1, 0), 0)
    cache = (layer * CONFIG.n_kv_heads + kv_head).to(tl.int64) * max_context * D
    end = position + end_token
    y = attend_rows(
        q,
        q_position,
        sink,
        k_cache_ptr + cache,
        v_cache_ptr + cache,
        start,
        end,
        window,
        CONFIG.sm_scale,
        D,
        BLOCK_T,
        STAGES,
    )
    at = token.to(tl.int64)[:, None] * CONFIG.q_size + head[:, None] * D + tl.arange(0, D)[None, :]
    store_two_parts(high_ptr, low_ptr, at, y * vector_unit(CONFIG.dense.o), mine[:, None])


@triton.jit(do_not_specialize=DYNAMIC)
def router_kernel(
    w_ptr,
    scales_ptr,
    bias_ptr,
    high_ptr,
    low_ptr,
    chosen_ptr,
    weights_ptr,
    layer,
    n_tokens,
    CONFIG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each token's experts, chosen int32 and weights float32 [tokens, top_k]; a program some tokens."""
    E: tl.constexpr = CONFIG.n_experts
    H: tl.constexpr = CONFIG.hidden_size
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    FORMAT: tl.constexpr = CONFIG.dense.router
    BLOCK_E: tl.constexpr = triton.next_power_of_2(E)
    BLOCK_M: tl.constexpr = max(16, BLOCK_E)
    token0 = tl.program_id(0) * BLOCK_N
    layer = tl.cast(layer, tl.int64)
    w_ptr, scales_ptr = matrix_at(w_ptr, layer, E, H, FORMAT), scales_of(scales_ptr, layer, E, H, FORMAT)
    acc = gemm_dense(
        w_ptr, scales_ptr, high_ptr, low_ptr, 0, token0, n_tokens, E, H, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    acc *= 1.0 / vector_unit(FORMAT)
    expert = tl.arange(0, BLOCK_M)
    bias = tl.load(bias_ptr + layer * E + expert, mask=expert < E, other=0.0).to(tl.float32)
    # Of BLOCK_M logits, as many as the smallest matrix product has, only the first E may be chosen.
    chosen, weights = top_k_softmax_rows(tl.trans(acc) + bias[None, :], E, TOP_K)
    slot, token = tl.arange(0, chosen.shape[1])[None, :], token0 + tl.arange(0, BLOCK_N)[:, None]
    at, mask = token * TOP_K + slot, (token < n_tokens) & (slot < TOP_K)
    tl.store(chosen_ptr + at, chosen, mask=mask)
    tl.store(weights_ptr + at, weights, mask=mask)


@triton.jit(do_not_specialize=DYNAMIC)
def grouping_kernel(chosen_ptr, order_ptr, starts_ptr, n_pairs, BLOCK: tl.constexpr):
    """A program an expert."""
    group_pairs(chosen_ptr, order_ptr, starts_ptr, tl.program_id(0), n_pairs, BLOCK)


@triton.jit(do_not_specialize=["gate_up_width", "gate_up_blocks", "down_width", "down_blocks", "capacity"])
def blocks_kernel(
    starts_ptr,
    blocks_ptr,
    gate_up_width,
    gate_up_blocks,
    down_width,
    down_blocks,
    capacity,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """blocks int32 [2, capacity, 4]: what gate-up's and down's programs multiply; a program each."""
    if tl.program_id(0) == 0:
        cut_blocks(starts_ptr, blocks_ptr, gate_up_width, gate_up_blocks, E, BLOCK)
    else:
        cut_blocks(starts_ptr, blocks_ptr + capacity * 4, down_width, down_blocks, E, BLOCK)


class Experts(NamedTuple):
    """A stack of experts' matrices, all layers'."""

    words_ptr: tl.tensor
    scales_ptr: tl.tensor
    bases_ptr: tl.tensor  # see largest_scales
    bias_ptr: tl.tensor


class Vectors(NamedTuple):
    ptr: tl.tensor
    scale_ptr: tl.tensor


@triton.jit
def expert_product(
    experts,
    matrix,
    m0,
    x,
    x_rows,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BUILD: tl.constexpr,
    X_SCALE: tl.constexpr = None,
):
    """Places m0 .. of matrix number `matrix` times rows of x: see gemm_fp4, but with all factors.

    X_SCALE: the power of two that float16 vectors lack; None: each has its own at x.scale_ptr, float32.
    """
    words_ptr, scales_ptr = experts.words_ptr, experts.scales_ptr
    if BUILD.is_scaled:
        words_ptr, scales_ptr = words_ptr + matrix * (ROWS * K // 8), scales_ptr + matrix * (ROWS * K // GROUP)
        return gemm_fp4_fp8(words_ptr, scales_ptr, x.ptr, x.scale_ptr, m0, x_rows, ROWS, K, TILE)
    else:
        WARPS: tl.constexpr = BUILD.tuning.num_warps
        MACHINE: tl.constexpr = BUILD.machine
        words_ptr += matrix * MACHINE.prompts.matrix_words(ROWS, K)
        scales_ptr += matrix * MACHINE.prompts.matrix_scales(ROWS, K, WARPS)
        base = tl.load(experts.bases_ptr + matrix).to(tl.int32)
        accs = gemm_fp4(words_ptr, scales_ptr, base, x.ptr, m0, x_rows, ROWS, K, TILE, WARPS, MACHINE)
        scale = e8m0_to_float32(base)
        products = ()
        for i in tl.static_range(len(accs)):
            x_scale = tl.load(x.scale_ptr + x_rows[i])[None, :] if X_SCALE is None else X_SCALE
            # At once, as one of them alone may bring a product beyond float32; finite, as a product may be 0.
            products = products + (accs[i] * tl.minimum(x_scale * scale, FLOAT32_MAX),)
        return products


@triton.constexpr_function
def act_unit(limit: float) -> float:
    """The power of two that brings what swiglu gives, at most limit (limit + 1), to 2^14 to 2^15 of float16."""
    bound, unit = max(limit, 1.0) * (max(limit, 1.0) + 1), 1.0
    while bound * unit < 2**14 and unit < 2**20:
        unit *= 2
    while bound * unit >= 2**15 and unit > 2**-20:
        unit /= 2
    return unit


@triton.jit(do_not_specialize=DYNAMIC)
def gate_up_kernel(
    words_ptr,
    scales_ptr,
    bases_ptr,
    bias_ptr,
    x_ptr,
    x_scale_ptr,
    order_ptr,
    blocks_ptr,
    act_ptr,
    act_scale_ptr,
    layer,
    TILE: tl.constexpr,
    BUILD: tl.constexpr,
):
    """act = swiglu(W_gate_up x + bias), in the order of `order`; a program a tile of an expert's rows and pairs."""
    CONFIG: tl.constexpr = BUILD.config
    E: tl.constexpr = CONFIG.n_experts
    M_TILES: tl.constexpr = (2 * CONFIG.intermediate_size + TILE.m - 1) // TILE.m
    experts = Experts(words_ptr, scales_ptr, bases_ptr, bias_ptr)
    x, act = Vectors(x_ptr, x_scale_ptr), Vectors(act_ptr, act_scale_ptr)
    pid = tl.program_id(0)
    m0 = pid % M_TILES * TILE.m
    expert, first, end = load_block(blocks_ptr, pid // M_TILES)
    if expert < E:
        matrix = tl.cast(layer, tl.int64) * E + expert
        places = first + tl.arange(0, TILE.n)
        if end - first > TILE.n if TILE.more else False:  # known to the compiler where there is no more
            both = (places, first + TILE.n + tl.arange(0, TILE.more))
            gate_up_tile(experts, matrix, m0, x, order_ptr, both, end, act, TILE, BUILD)
        else:
            gate_up_tile(experts, matrix, m0, x, order_ptr, (places,), end, act, TILE, BUILD)


@triton.jit
def gate_up_tile(
    experts,
    matrix,
    m0,
    x,
    order_ptr,
    places,
    end,
    act,
    TILE: tl.constexpr,
    BUILD: tl.constexpr,
):
    """At `places`, a tuple of ranges, up to `end`: rows m0 .. of an expert's matrix times the pairs' tokens."""
    CONFIG: tl.constexpr = BUILD.config
    MACHINE: tl.constexpr = BUILD.machine
    I: tl.constexpr = CONFIG.intermediate_size  # noqa: E741
    ROWS: tl.constexpr = 2 * I
    tokens = ()
    for part in tl.static_range(len(places)):
        pair = tl.load(order_ptr + tl.minimum(places[part], end - 1))
        tokens = tokens + (pair // CONFIG.experts_per_token,)
    products = expert_product(experts, matrix, m0, x, tokens, ROWS, CONFIG.hidden_size, TILE, BUILD)
    i = m0 // 2 + tl.arange(0, TILE.m // 2)
    bias = experts.bias_ptr + matrix * ROWS + 2 * i
    gate_bias = tl.load(bias, mask=i < I, other=0.0).to(tl.float32)[:, None]
    up_bias = tl.load(bias + 1, mask=i < I, other=0.0).to(tl.float32)[:, None]
    for part in tl.static_range(len(places)):
        gate, up = split_rows(products[part], MACHINE)
        y = tl.trans(swiglu(gate + gate_bias, up + up_bias, CONFIG.swiglu_limit, CONFIG.swiglu_alpha))
        store_act(act.ptr, act.scale_ptr, y, places[part], m0 // 2, end, BUILD)


@triton.jit
def store_act(
    act_ptr,
    act_scale_ptr,
    act,
    place,
    i0,
    end,
    BUILD: tl.constexpr,
):
    """Elements i0 .. of swiglu's output, act [places, elements], at places below `end`, as down multiplies them."""
    CONFIG: tl.constexpr = BUILD.config
    I: tl.constexpr = CONFIG.intermediate_size  # noqa: E741
    N: tl.constexpr = act.shape[0]
    HALF: tl.constexpr = act.shape[1]
    i = i0 + tl.arange(0, HALF)
    place_mask = (place < end)[:, None]
    if BUILD.is_scaled:
        elements, scale = quantize_mxfp8(tl.reshape(act, (N * HALF // GROUP, GROUP)))
        at = place.to(tl.int64)[:, None] * I + i[None, :]
        tl.store(act_ptr + at, tl.reshape(elements, (N, HALF)), mask=place_mask & (i < I)[None, :])
        group = i0 // GROUP + tl.arange(0, HALF // GROUP)
        at = place.to(tl.int64)[:, None] * (I // GROUP) + group[None, :]
        mask = place_mask & (group < I // GROUP)[None, :]
        tl.store(act_scale_ptr + at, tl.reshape(scale, (N, HALF // GROUP)), mask=mask)
    else:
        if BUILD.quant:
            act = round_to_mxfp8(act)
        UNIT: tl.constexpr = act_unit(CONFIG.swiglu_limit)
        STRIDE: tl.constexpr = BUILD.machine.prompts.vector_stride(I)
        act, column = BUILD.machine.prompts.in_columns(to_half(tl.where((i < I)[None, :], act * UNIT, 0.0)), i0)
        at = place.to(tl.int64)[:, None] * STRIDE + column[None, :]
        tl.store(act_ptr + at, act, mask=place_mask & (column < STRIDE)[None, :])


@triton.jit(do_not_specialize=DYNAMIC)
def down_kernel(
    words_ptr,
    scales_ptr,
    bases_ptr,
    bias_ptr,
    act_ptr,
    act_scale_ptr,
    order_ptr,
    blocks_ptr,
    weights_ptr,
    out_ptr,
    layer,
    TILE: tl.constexpr,
    BUILD: tl.constexpr,
):
    """out [tokens, top_k, hidden] = weight * (W_down act + bias); a program a tile of rows and pairs."""
    CONFIG: tl.constexpr = BUILD.config
    E: tl.constexpr = CONFIG.n_experts
    M_TILES: tl.constexpr = (CONFIG.hidden_size + TILE.m - 1) // TILE.m
    experts, act = Experts(words_ptr, scales_ptr, bases_ptr, bias_ptr), Vectors(act_ptr, act_scale_ptr)
    pid = tl.program_id(0)
    m0 = pid % M_TILES * TILE.m
    expert, first, end = load_block(blocks_ptr, pid // M_TILES)
    if expert < E:
        matrix = tl.cast(layer, tl.int64) * E + expert
        places = first + tl.arange(0, TILE.n)
        if end - first > TILE.n if TILE.more else False:  # known to the compiler where there is no more
            both = (places, first + TILE.n + tl.arange(0, TILE.more))
            down_tile(experts, matrix, m0, act, order_ptr, both, end, weights_ptr, out_ptr, TILE, BUILD)
        else:
            down_tile(experts, matrix, m0, act, order_ptr, (places,), end, weights_ptr, out_ptr, TILE, BUILD)


@triton.jit
def down_tile(
    experts,
    matrix,
    m0,
    act,
    order_ptr,
    places,
    end,
    weights_ptr,
    out_ptr,
    TILE: tl.constexpr,
    BUILD: tl.constexpr,
):
    """At `places`, a tuple of ranges, up to `end`: rows m0 .. of an expert's matrix times the pairs' act."""
    CONFIG: tl.constexpr = BUILD.config
    H: tl.constexpr = CONFIG.hidden_size
    UNIT: tl.constexpr = act_unit(CONFIG.swiglu_limit)
    inside = ()
    for part in tl.static_range(len(places)):
        inside = inside + (tl.minimum(places[part], end - 1),)
    I: tl.constexpr = CONFIG.intermediate_size  # noqa: E741
    products = expert_product(experts, matrix, m0, act, inside, H, I, TILE, BUILD, 1.0 / UNIT)
    row = m0 + tl.arange(0, TILE.m)
    bias = tl.load(experts.bias_ptr + matrix * H + row, mask=row < H, other=0.0).to(tl.float32)
    for part in tl.static_range(len(places)):
        acc = BUILD.machine.prompts.in_rows(products[part])
        pair = tl.load(order_ptr + inside[part]).to(tl.int64)
        y = tl.trans(acc + bias[:, None]) * tl.load(weights_ptr + pair)[:, None]
        mask = (places[part] < end)[:, None] & (row < H)[None, :]
        tl.store(out_ptr + pair[:, None] * H + row[None, :], y, mask=mask)


class Prefill:
    """Blocks of tokens through a model's layers."""

    def __init__(self, config: ModelConfig, build: Build, blocks: BlockTuning, weights: Weights, state: State):
        """build, weights, state: those of the decoding kernel."""
        self.config, self.build, self.blocks = config, build, blocks
        self.compiled_config = build.config
        self.weights, self.state = weights, state
        device = state.x.device
        max_context = state.k_cache.shape[2]
        longest = min(blocks.tokens, most_tokens(config), max_context - 1)
        self.tokens = longest if max_context > blocks.least_tokens else 0
        shapes = buffer_shapes(config, self.tokens, build.is_scaled, build.machine.prompts.vector_stride)
        # What lies beyond a vector's elements stays zero.
        self.buffers = Buffers(*(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes))
        self.gate_up_bases = largest_scales(weights.gate_up_scales)
        self.down_bases = largest_scales(weights.down_scales)

    @functools.cached_property
    def holds_experts(self) -> bool:
        """Whether the experts' scales are small enough for their products with many vectors."""
        return (
            self.build.is_scaled
            or max(int(bases.max()) for bases in (self.gate_up_bases, self.down_bases)) <= MOST_SCALE
        )

    def feed(self, position: int, n_tokens: int) -> None:
        """Fill the cache from `position` on with the state's next n_tokens tokens, whose predecessors are in it."""
        end = position + n_tokens
        while position < end:
            n = min(self.tokens, end - position)
            with compile_errors(self.state.x.device):
                self._feed_block(position, n)
            position += n

    def _feed_block(self, position: int, n: int) -> None:
        c, w, s, b = self.config, self.weights, self.state, self.buffers
        t, compiled = self.blocks, self.compiled_config
        embed_kernel[(n,)](s.tokens, w.embed, b.x, position, H=c.hidden_size)
        for layer in range(c.n_layers):
            attention_norm_kernel[(n,)](
                b.x, b.expert_out, w.attn_norm, b.high, b.low, layer, CONFIG=compiled, num_warps=t.norm_warps
            )
            self._dense(w.qkv, w.qkv_scales, w.qkv_bias, b.qkv, layer, n, c.qkv_size, c.hidden_size, c.dense.qkv)
            max_context = s.k_cache.shape[2]
            append_kernel[(n,)](
                b.qkv, s.k_cache, s.v_cache, s.cos, s.sin, layer, position, max_context, CONFIG=compiled
            )
            if layer == c.n_layers - 1:
                return
            self._attention(layer, position, n, max_context)
            self._dense(w.o, w.o_scales, w.o_bias, b.x, layer, n, c.hidden_size, c.q_size, c.dense.o, add=True)
            self._experts(layer, n)

    def _dense(
        self,
        matrix: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor,
        y: torch.Tensor,
        layer: int,
        n: int,
        rows: int,
        k: int,
        dense_format: str,
        add: bool = False,
    ) -> None:
        tile = self.blocks.dense_tile(rows, n)
        dense_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(n, tile.n),)](
            matrix,
            scales,
            bias,
            self.buffers.high,
            self.buffers.low,
            y,
            layer,
            n,
            ROWS=rows,
            K=k,
            FORMAT=dense_format,
            ADD=add,
            **tile.options(),
        )

    def _attention(self, layer: int, position: int, n: int, max_context: int) -> None:
        c, w, s, b, t = self.config, self.weights, self.state, self.buffers, self.blocks
        group = c.n_heads // c.n_kv_heads
        m = max(t.attention_m, triton.next_power_of_2(group))
        attention_kernel[(triton.cdiv(n, m // group) * c.n_kv_heads,)](
            b.qkv,
            s.k_cache,
            s.v_cache,
            w.sinks,
            s.cos,
            s.sin,
            s.windows,
            b.high,
            b.low,
            layer,
            position,
            n,
            max_context,
            CONFIG=self.compiled_config,
            BLOCK_M=m,
            BLOCK_T=t.attention_t,
            STAGES=t.attention_stages,
            num_warps=t.attention_warps,
        )

    def _experts(self, layer: int, n: int) -> None:
        c, w, b, t = self.config, self.weights, self.buffers, self.blocks
        expert_norm_kernel[(n,)](
            b.x,
            w.mlp_norm,
            b.high,
            b.low,
            b.expert_in,
            b.expert_in_scale,
            layer,
            BUILD=self.build,
            num_warps=t.norm_warps,
        )
        router_kernel[(triton.cdiv(n, t.router_n),)](
            w.router,
            w.router_scales,
            w.router_bias,
            b.high,
            b.low,
            b.chosen,
            b.weights,
            layer,
            n,
            CONFIG=self.compiled_config,
            BLOCK_N=t.router_n,
            BLOCK_K=t.router_k,
            STAGES=t.router_stages,
            num_warps=t.router_warps,
        )
        n_pairs = n * c.experts_per_token
        grouping_kernel[(c.n_experts,)](b.chosen, b.order, b.starts, n_pairs, BLOCK=t.grouping)
        mean = n_pairs / c.n_experts
        gate_up, down = t.expert_tile(t.gate_up, mean), t.expert_tile(t.down, mean)
        gate_up_blocks, down_blocks = self._most_blocks(gate_up, n_pairs), self._most_blocks(down, n_pairs)
        blocks_kernel[(2,)](
            b.starts,
            b.blocks,
            gate_up.width,
            gate_up_blocks,
            down.width,
            down_blocks,
            b.blocks.shape[1],
            E=c.n_experts,
            BLOCK=t.grouping,
        )
        gate_up_kernel[(triton.cdiv(2 * c.intermediate_size, gate_up.m) * gate_up_blocks,)](
            w.gate_up,
            w.gate_up_scales,
            self.gate_up_bases,
            w.gate_up_bias,
            b.expert_in,
            b.expert_in_scale,
            b.order,
            b.blocks[0],
            b.act,
            b.act_scale,
            layer,
            BUILD=self.build,
            **gate_up.options(),
        )
        down_kernel[(triton.cdiv(c.hidden_size, down.m) * down_blocks,)](
            w.down,
            w.down_scales,
            self.down_bases,
            w.down_bias,
            b.act,
            b.act_scale,
            b.order,
            b.blocks[1],
            b.weights,
            b.expert_out,
            layer,
            BUILD=self.build,
            **down.options(),
        )

    def _most_blocks(self, tile: Tile, n_pairs: int) -> int:
        """Of so many pairs, whatever their experts: each expert's last one may be short."""
        return n_pairs // tile.width + min(self.config.n_experts, n_pairs)


def largest_scales(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [layers * experts]: the largest E8M0 scale of each matrix of a stack [layers, experts, ...] that is none of
    NaN."""
    layers, experts = scales.shape[:2]
    found = torch.zeros(layers, experts, dtype=torch.uint8, device=scales.device)
    for layer, largest in zip(scales, found):
        flat = layer.view(torch.uint8).reshape(experts, -1)
        largest.copy_(flat.masked_fill(flat == 255, 0).amax(1))
    return found.flatten()
