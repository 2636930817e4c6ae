"""Feed a prompt's tokens through all layers in blocks, into the KV cache that the decoding kernel reads.

A layer takes eleven launches, each over all tokens of a block:

    norm | QKV | append | attention | O projection | norm | router | grouping | blocks | gate-up | down

Dense matrices are multiplied in tiles of rows times tokens. Tokens are grouped by their experts, so that an expert's
weights are decoded once for all tokens of a tile. The last layer ends with its keys and values, as only the cache is
needed from a prompt's tokens before the last. The last token is decoded like any other (gpt_oss_megakernel.py).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from checkpoints.config import ModelConfig
from common.attention import Keys
from common.attention_rows import attend_rows
from common.build import Build, Matrix, Operand
from common.dense import layer_matrix
from common.gemm_dense import gemm_dense
from common.gemm_fp4 import Fp4Matrix, gemm_fp4, gemm_fp4_fp8, split_rows
from common.gemv_dense import vector_prescale
from common.grouping import cut_blocks, group_pairs, load_block
from common.operands import Bf16Pair, half_prescale, store_bf16_pair, to_half
from common.quant import GROUP, e8m0_to_float32, quantize_mxfp8, round_to_mxfp8
from common.rmsnorm import rms_rstd
from common.rope import load_rotated
from common.router import top_k_softmax_rows
from common.swiglu import swiglu
from host.buffers import Buffers, buffer_shapes, max_block_tokens
from host.compilers import compile_errors
from host.state import State
from host.tuning import BlockTuning, Tile
from host.weights import Weights

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
# E8M0, 2^13: float16 would lose an expert's other elements beside those with a larger scale, so prompts of such models
# are not fed in blocks but token by token.
MAX_SCALE = 140
Launch = tuple[Callable, tuple[int, ...], tuple, dict]  # (kernel, grid, arguments, options)
# Arguments that change from launch to launch must not compile a kernel of their own.
DYNAMIC = ["layer", "position", "n_tokens", "n_pairs", "max_context"]


@triton.jit(do_not_specialize=DYNAMIC)
def embed_kernel(tokens_ptr, embed_ptr, x_ptr, position, H: tl.constexpr):
    """x = the tokens' embeddings; a program takes one token."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, triton.next_power_of_2(H))
    token_id = tl.load(tokens_ptr + position + token).to(tl.int64)
    row = tl.load(embed_ptr + token_id * H + h, mask=h < H, other=0.0)
    tl.store(x_ptr + token * H + h, row.to(tl.float32), mask=h < H)


@triton.jit(do_not_specialize=DYNAMIC)
def attention_norm_kernel(x_ptr, expert_out_ptr, norm_ptr, high_ptr, low_ptr, layer, CONFIG: tl.constexpr):
    """x += expert_out of the previous layer; (high, low) = rmsnorm(x); a program takes one token."""
    H: tl.constexpr = CONFIG.hidden_size
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, triton.next_power_of_2(H))
    x = tl.load(x_ptr + token * H + h, mask=h < H, other=0.0)
    if layer > 0:
        for rank in tl.static_range(TOP_K):
            x += tl.load(expert_out_ptr + (token * TOP_K + rank) * H + h, mask=h < H, other=0.0)
        tl.store(x_ptr + token * H + h, x, mask=h < H)
    x = _normed(x, norm_ptr + layer * H, CONFIG) * vector_prescale(CONFIG.dense.qkv)
    store_bf16_pair(Bf16Pair(high_ptr, low_ptr), token * H + h, x, h < H)


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
    """(high, low) = rmsnorm(x), for the router; expert_in = rmsnorm(x); a program takes one token."""
    CONFIG: tl.constexpr = BUILD.config
    H: tl.constexpr = CONFIG.hidden_size
    BLOCK_H: tl.constexpr = triton.next_power_of_2(H)
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + token * H + h, mask=h < H, other=0.0)
    x = _normed(x, norm_ptr + layer * H, CONFIG)
    store_bf16_pair(Bf16Pair(high_ptr, low_ptr), token * H + h, x * vector_prescale(CONFIG.dense.router), h < H)
    if BUILD.is_scaled:
        elements, scale = quantize_mxfp8(tl.reshape(x, (BLOCK_H // GROUP, GROUP)))
        group = tl.arange(0, BLOCK_H // GROUP)
        tl.store(expert_in_ptr + token * H + h, tl.reshape(elements, (BLOCK_H,)), mask=h < H)
        tl.store(expert_in_scale_ptr + token * (H // GROUP) + group, scale, mask=group < H // GROUP)
    else:
        STRIDE: tl.constexpr = BUILD.machine.prompts.vector_stride(H)
        if BUILD.quant:
            x = round_to_mxfp8(x)
        prescale, undo = half_prescale(tl.max(tl.abs(x), axis=0))
        column = BUILD.machine.prompts.column_of(h)
        tl.store(expert_in_ptr + token * STRIDE + column, to_half(x * prescale), mask=h < H)
        tl.store(expert_in_scale_ptr + token, undo)


@triton.jit
def _normed(x, norm_ptr, CONFIG: tl.constexpr):
    """Return rmsnorm of a whole vector."""
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
    MATRIX: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """y [tokens, rows] = x W^T + bias, or with ADD y += x W^T + bias; a program takes a tile of rows and tokens."""
    ROWS: tl.constexpr = MATRIX.rows
    M_TILES: tl.constexpr = (ROWS + TILE.m - 1) // TILE.m
    program = tl.program_id(0)
    row0, token0 = program % M_TILES * TILE.m, program // M_TILES * TILE.n
    layer = tl.cast(layer, tl.int64)
    matrix = layer_matrix(w_ptr, scales_ptr, layer, MATRIX)
    acc = gemm_dense(matrix, Bf16Pair(high_ptr, low_ptr), row0, token0, n_tokens, MATRIX, TILE)
    row, token = row0 + tl.arange(0, TILE.m), token0 + tl.arange(0, TILE.n)
    y = tl.trans(acc) * (1.0 / vector_prescale(MATRIX.format))
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
    """The cache at the tokens' positions = their rotated keys, and their values; a program takes one token."""
    D: tl.constexpr = CONFIG.head_dim
    KV_HEADS: tl.constexpr = CONFIG.n_kv_heads
    token = tl.program_id(0).to(tl.int64)
    position += token
    head = tl.arange(0, triton.next_power_of_2(KV_HEADS))
    mask = (head < KV_HEADS)[:, None]
    dim = tl.arange(0, D)[None, :]
    k_ptr = qkv_ptr + token * CONFIG.qkv_size + CONFIG.q_size
    cos_ptr, sin_ptr = cos_ptr + position * (D // 2), sin_ptr + position * (D // 2)
    k = load_rotated(k_ptr, head, head < KV_HEADS, cos_ptr, sin_ptr, D)
    v = tl.load(k_ptr + CONFIG.kv_size + head[:, None] * D + dim, mask=mask, other=0.0)
    offset = (layer * KV_HEADS + head).to(tl.int64)[:, None] * max_context * D + position * D + dim
    tl.store(k_cache_ptr + offset, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + offset, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=DYNAMIC)
def prompt_attention_kernel(
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
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(high, low) [tokens, heads, head_dim] = attention; a program takes a KV head and some tokens, the last first."""
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
    inside = (m < TOKENS * G) & (first_token + m // G < n_tokens)
    q_position = position + token
    angles = q_position.to(tl.int64)[:, None] * (D // 2)
    # A query's heads begin qkv_size elements after those of the query before it.
    row = token.to(tl.int64)[:, None] * CONFIG.qkv_size
    q = load_rotated(qkv_ptr + row, head, m >= 0, cos_ptr + angles, sin_ptr + angles, D)
    sink = tl.load(sinks_ptr + layer * CONFIG.n_heads + head)
    window = tl.load(windows_ptr + layer)
    first = tl.where(window > 0, tl.maximum(position + first_token - window + 1, 0), 0)
    cache = (layer * CONFIG.n_kv_heads + kv_head).to(tl.int64) * max_context * D
    end = position + end_token
    keys = Keys(k_cache_ptr + cache, v_cache_ptr + cache, first, end)
    y = attend_rows(q, q_position, sink, keys, window, CONFIG.sm_scale, BLOCK_KEYS, STAGES)
    offset = token.to(tl.int64)[:, None] * CONFIG.q_size + head[:, None] * D + tl.arange(0, D)[None, :]
    store_bf16_pair(Bf16Pair(high_ptr, low_ptr), offset, y * vector_prescale(CONFIG.dense.o), inside[:, None])


@triton.jit(do_not_specialize=DYNAMIC)
def prompt_router_kernel(
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
    MATRIX: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each token's experts, chosen int32 and weights float32 [tokens, top_k]; a program takes TILE.n tokens."""
    E: tl.constexpr = CONFIG.n_experts
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    token0 = tl.program_id(0) * TILE.n
    layer = tl.cast(layer, tl.int64)
    matrix = layer_matrix(w_ptr, scales_ptr, layer, MATRIX)
    acc = gemm_dense(matrix, Bf16Pair(high_ptr, low_ptr), 0, token0, n_tokens, MATRIX, TILE)
    acc *= 1.0 / vector_prescale(MATRIX.format)
    expert = tl.arange(0, TILE.m)
    bias = tl.load(bias_ptr + layer * E + expert, mask=expert < E, other=0.0).to(tl.float32)
    # Only the first E of TILE.m logits may be chosen.
    chosen, weights = top_k_softmax_rows(tl.trans(acc) + bias[None, :], E, TOP_K)
    rank, token = tl.arange(0, chosen.shape[1])[None, :], token0 + tl.arange(0, TILE.n)[:, None]
    offset, mask = token * TOP_K + rank, (token < n_tokens) & (rank < TOP_K)
    tl.store(chosen_ptr + offset, chosen, mask=mask)
    tl.store(weights_ptr + offset, weights, mask=mask)


@triton.jit(do_not_specialize=DYNAMIC)
def grouping_kernel(chosen_ptr, order_ptr, starts_ptr, n_pairs, BLOCK: tl.constexpr):
    """order, starts = group_pairs(chosen); a program takes one expert."""
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
    """blocks int32 [2, capacity, 4] = cut_blocks for gate-up and for down; a program takes one of them."""
    if tl.program_id(0) == 0:
        cut_blocks(starts_ptr, blocks_ptr, gate_up_width, gate_up_blocks, E, BLOCK)
    else:
        cut_blocks(starts_ptr, blocks_ptr + capacity * 4, down_width, down_blocks, E, BLOCK)


class ExpertMatrix(NamedTuple):
    """Pointers to a matrix of all experts of all layers, and which one of these is meant."""

    words_ptr: Any
    scales_ptr: Any
    bases_ptr: Any  # see largest_scales
    bias_ptr: Any
    index: Any  # layer * experts + expert


class Pairs(NamedTuple):
    """Some (token, expert) pairs of one expert, by their places in the order of grouping.py."""

    order_ptr: Any
    places: Any  # a tuple of int32 [n]
    end: Any  # places from here on are another expert's


@triton.jit
def expert_product(
    expert,
    m0,
    x,
    x_rows,
    MATRIX: tl.constexpr,
    TILE: tl.constexpr,
    BUILD: tl.constexpr,
    x_scale=None,
):
    """Return places m0 .. of an ExpertMatrix times vectors of the Operand x with all factors; see gemm_fp4.

    x_scale: what undoes the prescale of float16 vectors; without it each has its own at x.scales_ptr, float32.
    """
    words_ptr, scales_ptr = expert.words_ptr, expert.scales_ptr
    if BUILD.is_scaled:
        words_ptr += expert.index * (MATRIX.rows * MATRIX.k // 8)
        scales_ptr += expert.index * (MATRIX.rows * MATRIX.k // GROUP)
        return gemm_fp4_fp8(Operand(words_ptr, scales_ptr), x, m0, x_rows, MATRIX, TILE)
    else:
        WARPS: tl.constexpr = BUILD.tuning.num_warps
        MACHINE: tl.constexpr = BUILD.machine
        words_ptr += expert.index * MACHINE.prompts.matrix_words(MATRIX.rows, MATRIX.k)
        scales_ptr += expert.index * MACHINE.prompts.matrix_scales(MATRIX.rows, MATRIX.k, WARPS)
        base = tl.load(expert.bases_ptr + expert.index).to(tl.int32)
        matrix = Fp4Matrix(words_ptr, scales_ptr, base)
        accs = gemm_fp4(matrix, x.ptr, m0, x_rows, MATRIX, TILE, WARPS, MACHINE)
        scale = e8m0_to_float32(base)
        products = ()
        for i in tl.static_range(len(accs)):
            vector_scale = tl.load(x.scales_ptr + x_rows[i])[None, :] if x_scale is None else x_scale
            # Both scales at once, as one alone may bring a product beyond float32; finite, as a product may be 0.
            products = products + (accs[i] * tl.minimum(vector_scale * scale, FLOAT32_MAX),)
        return products


@triton.jit
def _act_prescale(BUILD: tl.constexpr):
    """Return half_prescale of the largest activation that swiglu returns."""
    return half_prescale(tl.full([], BUILD.config.swiglu_bound, tl.float32))


@triton.jit(do_not_specialize=DYNAMIC)
def prompt_gate_up_kernel(
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
    """act = swiglu(W_gate_up x + bias) in the order of `order`; a program takes an expert's tile of rows and pairs."""
    E: tl.constexpr = BUILD.config.n_experts
    M_TILES: tl.constexpr = (BUILD.gate_up.rows + TILE.m - 1) // TILE.m
    x, act = Operand(x_ptr, x_scale_ptr), Operand(act_ptr, act_scale_ptr)
    program = tl.program_id(0)
    m0 = program % M_TILES * TILE.m
    expert, first, end = load_block(blocks_ptr, program // M_TILES)
    if expert < E:
        index = tl.cast(layer, tl.int64) * E + expert
        matrix = ExpertMatrix(words_ptr, scales_ptr, bases_ptr, bias_ptr, index)
        places = first + tl.arange(0, TILE.n)
        if end - first > TILE.n if TILE.extra_tokens else False:  # known to the compiler without extra tokens
            both = (places, first + TILE.n + tl.arange(0, TILE.extra_tokens))
            multiply_gate_up(matrix, m0, x, Pairs(order_ptr, both, end), act, TILE, BUILD)
        else:
            multiply_gate_up(matrix, m0, x, Pairs(order_ptr, (places,), end), act, TILE, BUILD)


@triton.jit
def multiply_gate_up(expert, m0, x, pairs, act, TILE: tl.constexpr, BUILD: tl.constexpr):
    """Store in `act` swiglu of rows m0 .. of an ExpertMatrix times the tokens of its Pairs."""
    CONFIG: tl.constexpr = BUILD.config
    MACHINE: tl.constexpr = BUILD.machine
    MATRIX: tl.constexpr = BUILD.gate_up
    I: tl.constexpr = CONFIG.intermediate_size  # noqa: E741
    tokens = ()
    for n in tl.static_range(len(pairs.places)):
        pair = tl.load(pairs.order_ptr + tl.minimum(pairs.places[n], pairs.end - 1))
        tokens = tokens + (pair // CONFIG.experts_per_token,)
    products = expert_product(expert, m0, x, tokens, MATRIX, TILE, BUILD)
    i = m0 // 2 + tl.arange(0, TILE.m // 2)
    bias_ptr = expert.bias_ptr + expert.index * MATRIX.rows + 2 * i
    gate_bias = tl.load(bias_ptr, mask=i < I, other=0.0).to(tl.float32)[:, None]
    up_bias = tl.load(bias_ptr + 1, mask=i < I, other=0.0).to(tl.float32)[:, None]
    for n in tl.static_range(len(pairs.places)):
        gate, up = split_rows(products[n], MACHINE)
        y = tl.trans(swiglu(gate + gate_bias, up + up_bias, CONFIG.swiglu_limit, CONFIG.swiglu_alpha))
        store_act_rows(act, y, pairs.places[n], m0 // 2, pairs.end, BUILD)


@triton.jit
def store_act_rows(act, y, place, i0, end, BUILD: tl.constexpr):
    """Store elements i0 .. of swiglu's output, y [places, elements], at places below `end`, as down multiplies them."""
    I: tl.constexpr = BUILD.config.intermediate_size  # noqa: E741
    N: tl.constexpr = y.shape[0]
    ELEMENTS: tl.constexpr = y.shape[1]
    i = i0 + tl.arange(0, ELEMENTS)
    inside = (place < end)[:, None]
    if BUILD.is_scaled:
        elements, scale = quantize_mxfp8(tl.reshape(y, (N * ELEMENTS // GROUP, GROUP)))
        offset = place.to(tl.int64)[:, None] * I + i[None, :]
        tl.store(act.ptr + offset, tl.reshape(elements, (N, ELEMENTS)), mask=inside & (i < I)[None, :])
        group = i0 // GROUP + tl.arange(0, ELEMENTS // GROUP)
        offset = place.to(tl.int64)[:, None] * (I // GROUP) + group[None, :]
        mask = inside & (group < I // GROUP)[None, :]
        tl.store(act.scales_ptr + offset, tl.reshape(scale, (N, ELEMENTS // GROUP)), mask=mask)
    else:
        if BUILD.quant:
            y = round_to_mxfp8(y)
        prescale, _ = _act_prescale(BUILD)
        STRIDE: tl.constexpr = BUILD.machine.prompts.vector_stride(I)
        y, column = BUILD.machine.prompts.in_columns(to_half(tl.where((i < I)[None, :], y * prescale, 0.0)), i0)
        offset = place.to(tl.int64)[:, None] * STRIDE + column[None, :]
        tl.store(act.ptr + offset, y, mask=inside & (column < STRIDE)[None, :])


@triton.jit(do_not_specialize=DYNAMIC)
def prompt_down_kernel(
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
    """out [tokens, top_k, hidden] = weight * (W_down act + bias); a program takes an expert's tile."""
    E: tl.constexpr = BUILD.config.n_experts
    M_TILES: tl.constexpr = (BUILD.down.rows + TILE.m - 1) // TILE.m
    act = Operand(act_ptr, act_scale_ptr)
    program = tl.program_id(0)
    m0 = program % M_TILES * TILE.m
    expert, first, end = load_block(blocks_ptr, program // M_TILES)
    if expert < E:
        index = tl.cast(layer, tl.int64) * E + expert
        matrix = ExpertMatrix(words_ptr, scales_ptr, bases_ptr, bias_ptr, index)
        places = first + tl.arange(0, TILE.n)
        if end - first > TILE.n if TILE.extra_tokens else False:  # known to the compiler without extra tokens
            both = (places, first + TILE.n + tl.arange(0, TILE.extra_tokens))
            multiply_down(matrix, m0, act, Pairs(order_ptr, both, end), weights_ptr, out_ptr, TILE, BUILD)
        else:
            multiply_down(matrix, m0, act, Pairs(order_ptr, (places,), end), weights_ptr, out_ptr, TILE, BUILD)


@triton.jit
def multiply_down(expert, m0, act, pairs, weights_ptr, out_ptr, TILE: tl.constexpr, BUILD: tl.constexpr):
    """Store rows m0 .. of an ExpertMatrix times the activations of its Pairs, with bias and the router's weights."""
    MATRIX: tl.constexpr = BUILD.down
    H: tl.constexpr = MATRIX.rows
    inside = ()
    for n in tl.static_range(len(pairs.places)):
        inside = inside + (tl.minimum(pairs.places[n], pairs.end - 1),)
    _, act_scale = _act_prescale(BUILD)
    products = expert_product(expert, m0, act, inside, MATRIX, TILE, BUILD, act_scale)
    row = m0 + tl.arange(0, TILE.m)
    bias = tl.load(expert.bias_ptr + expert.index * H + row, mask=row < H, other=0.0).to(tl.float32)
    for n in tl.static_range(len(pairs.places)):
        acc = BUILD.machine.prompts.in_rows(products[n])
        pair = tl.load(pairs.order_ptr + inside[n]).to(tl.int64)
        y = tl.trans(acc + bias[:, None]) * tl.load(weights_ptr + pair)[:, None]
        mask = (pairs.places[n] < pairs.end)[:, None] & (row < H)[None, :]
        tl.store(out_ptr + pair[:, None] * H + row[None, :], y, mask=mask)


class Prefill:
    """Feeds blocks of a prompt's tokens through a model's layers."""

    def __init__(
        self,
        config: ModelConfig,
        build: Build,
        blocks: BlockTuning,
        weights: Weights,
        state: State,
        max_context: int | None = None,
    ):
        """Allocate the buffers. build, weights and state are those of the decoding kernel.

        max_context: positions of the cache; default: of the state's.
        """
        self.config, self.build, self.blocks = config, build, blocks
        self.compiled_config = build.config
        self.weights, self.state = weights, state
        device = state.x.device
        self.tokens = block_tokens(config, blocks, max_context or state.k_cache.shape[2])
        shapes = buffer_shapes(config, self.tokens, build.is_scaled, build.machine.prompts.vector_stride)
        # The padding behind a vector's elements stays zero.
        self.buffers = Buffers(*(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes))
        self.gate_up_bases = largest_scales(weights.gate_up_scales)
        self.down_bases = largest_scales(weights.down_scales)

    @functools.cached_property
    def holds_experts(self) -> bool:
        """Whether the experts' scales are small enough for their products with many vectors."""
        return (
            self.build.is_scaled
            or max(int(bases.max()) for bases in (self.gate_up_bases, self.down_bases)) <= MAX_SCALE
        )

    def feed(self, position: int, n_tokens: int) -> None:
        """Feed the state's n_tokens tokens from `position` on into the cache, which has all earlier positions."""
        end = position + n_tokens
        while position < end:
            n = min(self.tokens, end - position)
            with compile_errors(self.state.x.device):
                self._feed_block(position, n)
            position += n

    def _feed_block(self, position: int, n: int) -> None:
        for kernel, grid, arguments, options in self.launches(position, n):
            kernel[grid](*arguments, **options)

    def launches(self, position: int, n: int) -> Iterator[Launch]:
        """Yield the launches that feed a block of n tokens from `position` on, in order."""
        c, s, b = self.config, self.state, self.buffers
        yield from self._embed(position, n)
        for layer in range(c.n_layers):
            yield self._attention_norm(layer, n)
            yield self._dense(self.build.qkv, b.qkv, layer, n)
            max_context = s.k_cache.shape[2]
            cache = (b.qkv, s.k_cache, s.v_cache, s.cos, s.sin, layer, position, max_context)
            yield append_kernel, (n,), cache, {"CONFIG": self.compiled_config}
            if layer == c.n_layers - 1:
                return
            yield self._attention(layer, position, n, max_context)
            yield from self._project(layer, n)
            yield from self._experts(layer, n)

    def _embed(self, position: int, n: int) -> Iterator[Launch]:
        arguments = (self.state.tokens, self.weights.embed, self.buffers.x, position)
        yield embed_kernel, (n,), arguments, {"H": self.config.hidden_size}

    def _attention_norm(self, layer: int, n: int) -> Launch:
        w, b = self.weights, self.buffers
        arguments = (b.x, b.expert_out, w.attn_norm, b.high, b.low, layer)
        return (
            attention_norm_kernel,
            (n,),
            arguments,
            {"CONFIG": self.compiled_config, "num_warps": self.blocks.norm_warps},
        )

    def _project(self, layer: int, n: int) -> Iterator[Launch]:
        """x += the O projection."""
        yield self._dense(self.build.o, self.buffers.x, layer, n, add=True)

    def _dense(self, matrix: Matrix, y: torch.Tensor, layer: int, n: int, add: bool = False) -> Launch:
        """Multiply the vectors in high and low, and add the bias."""
        w, b = self.weights, self.buffers
        weights, scales, bias = (getattr(w, matrix.name + ending) for ending in ("", "_scales", "_bias"))
        tile = self.blocks.dense_tile(matrix.rows, n)
        return (
            dense_kernel,
            (triton.cdiv(matrix.rows, tile.m) * triton.cdiv(n, tile.n),),
            (weights, scales, bias, b.high, b.low, y, layer, n),
            {"MATRIX": matrix, "ADD": add, **tile.options()},
        )

    def _attention(self, layer: int, position: int, n: int, max_context: int) -> Launch:
        c, w, s, b, t = self.config, self.weights, self.state, self.buffers, self.blocks
        group = c.n_heads // c.n_kv_heads
        m = max(t.attention_m, triton.next_power_of_2(group))
        return (
            prompt_attention_kernel,
            (triton.cdiv(n, m // group) * c.n_kv_heads,),
            (
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
            ),
            {
                "CONFIG": self.compiled_config,
                "BLOCK_M": m,
                "BLOCK_KEYS": t.attention_t,
                "STAGES": t.attention_stages,
                "num_warps": t.attention_warps,
            },
        )

    def _experts(self, layer: int, n: int) -> Iterator[Launch]:
        c, w, b, t = self.config, self.weights, self.buffers, self.blocks
        yield (
            expert_norm_kernel,
            (n,),
            (b.x, w.mlp_norm, b.high, b.low, b.expert_in, b.expert_in_scale, layer),
            {"BUILD": self.build, "num_warps": t.norm_warps},
        )
        router_rows = max(16, triton.next_power_of_2(c.n_experts))  # at least as many as a matrix product takes
        router_tile = Tile(router_rows, t.router_n, t.router_k, t.router_warps, t.router_stages)
        yield (
            prompt_router_kernel,
            (triton.cdiv(n, t.router_n),),
            (w.router, w.router_scales, w.router_bias, b.high, b.low, b.chosen, b.weights, layer, n),
            {"CONFIG": self.compiled_config, "MATRIX": self.build.router, **router_tile.options()},
        )
        n_pairs = n * c.experts_per_token
        yield (
            grouping_kernel,
            (c.n_experts,),
            (b.chosen, b.order, b.starts, n_pairs),
            {"BLOCK": t.grouping},
        )
        mean = n_pairs / c.n_experts
        gate_up, down = t.expert_tile(t.gate_up, mean), t.expert_tile(t.down, mean)
        gate_up_blocks, down_blocks = self._max_blocks(gate_up, n_pairs), self._max_blocks(down, n_pairs)
        yield (
            blocks_kernel,
            (2,),
            (b.starts, b.blocks, gate_up.width, gate_up_blocks, down.width, down_blocks, b.blocks.shape[1]),
            {"E": c.n_experts, "BLOCK": t.grouping},
        )
        yield (
            prompt_gate_up_kernel,
            (triton.cdiv(2 * c.intermediate_size, gate_up.m) * gate_up_blocks,),
            (
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
            ),
            {"BUILD": self.build, **gate_up.options()},
        )
        yield (
            prompt_down_kernel,
            (triton.cdiv(c.hidden_size, down.m) * down_blocks,),
            (
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
            ),
            {"BUILD": self.build, **down.options()},
        )

    def _max_blocks(self, tile: Tile, n_pairs: int) -> int:
        """Return the most blocks that n_pairs pairs are cut into, as each expert's last block may be short."""
        return n_pairs // tile.width + min(self.config.n_experts, n_pairs)


def block_tokens(config: ModelConfig, blocks: BlockTuning, max_context: int) -> int:
    """Return the most tokens of a block; 0 if a cache of so many positions is too small for any."""
    longest = min(blocks.tokens, max_block_tokens(config), max_context - 1)
    return longest if max_context > blocks.min_tokens else 0


def largest_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return the largest E8M0 scale other than NaN of each matrix, uint8 [layers * experts].

    scales: [layers, experts, ...], of all matrices; or empty.
    """
    if not scales.numel():
        return torch.zeros(0, dtype=torch.uint8)
    layers, experts = scales.shape[:2]
    bases = torch.zeros(layers, experts, dtype=torch.uint8, device=scales.device)
    for layer, largest in zip(scales, bases):
        flat = layer.view(torch.uint8).reshape(experts, -1)
        largest.copy_(flat.masked_fill(flat == 255, 0).amax(1))
    return bases.flatten()
