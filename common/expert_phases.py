"""Router, gate-up and down projection of the chosen experts. Arguments: see common/phases.py."""

import triton
import triton.language as tl

from common.arch import opaque_zero
from common.fp4_fragments import (
    REST_PLACE,
    block_bytes,
    fragment_parts,
    fragment_places,
    fragment_unit,
    gemv_fp4_fragments,
    load_fragment_vector,
    split_scale,
)
from common.gemv_dense import gemv_rows, load_row_vector, load_rows, matrix_at, scales_of, vector_unit
from common.gemv_fp4 import gemv_fp4, gemv_fp4_fp8, vector_power
from common.quant import GROUP, quantize_mxfp8, round_to_mxfp8
from common.rmsnorm import largest_magnitude, normed_blocks, rms_rstd
from common.router import element, elements, pick, top_k_softmax
from common.stream import Plan, describe, describe_and_fill, gate_up_item, release, take, tiles_in_a_run
from common.sums import collect_fragments, leave_fragments
from common.swiglu import swiglu


@triton.jit
def load_router_tile(w, layer, tile, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """(rows, bias)."""
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    E: tl.constexpr = CONFIG.n_experts
    M: tl.constexpr = TUNING.router_m
    row = tile * M + tl.arange(0, M)
    bias = tl.load(w.router_bias + layer * E + row, mask=row < E, other=0.0).to(tl.float32)
    FORMAT: tl.constexpr = CONFIG.dense.router
    matrix, scales = matrix_at(w.router, layer, E, H, FORMAT), scales_of(w.router_scales, layer, E, H, FORMAT)
    return load_rows(matrix, scales, tile * M, E, H, M, TUNING.dense_k, FORMAT, zero), bias


@triton.jit
def router_phase(w, s, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    """router_logits = W_r @ rmsnorm(x) + b, and the experts' input: rmsnorm(x)."""
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    E: tl.constexpr = CONFIG.n_experts
    M: tl.constexpr = TUNING.router_m
    NORM: tl.constexpr = TUNING.norm_block
    N_TILES: tl.constexpr = (E + M - 1) // M
    N_BLOCKS: tl.constexpr = (H + NORM - 1) // NORM
    FORMAT: tl.constexpr = CONFIG.dense.router
    norm_ptr = w.mlp_norm + layer * H
    # Rows from the first program on, blocks from the last one on, so that few have both.
    if (pid < N_TILES) | (n_programs - 1 - pid < N_BLOCKS):
        weights = load_router_tile(w, layer, pid, CONFIG, TUNING)
        x = load_row_vector(s.x, H, TUNING.dense_k, FORMAT, zero)
        rstd = rms_rstd(x, H, CONFIG.rms_norm_eps)
        norm = load_row_vector(norm_ptr, H, TUNING.dense_k, FORMAT, zero)
        x, factor = normed_blocks(x, norm, rstd, vector_unit(FORMAT))
        for tile in range(pid, N_TILES, n_programs):
            if tile != pid:
                weights = load_router_tile(w, layer, tile, CONFIG, TUNING)
            row = tile * M + tl.arange(0, M)
            tl.store(s.router_logits + row, gemv_rows(weights[0], x, FORMAT, ARCH) * factor + weights[1], mask=row < E)
        for block in range(n_programs - 1 - pid, N_BLOCKS, n_programs):
            h = block * NORM + tl.arange(0, NORM) + zero
            normed = tl.load(s.x + h, mask=h < H, other=0.0) * rstd * tl.load(norm_ptr + h, mask=h < H, other=0.0)
            if TUNING.fragments:
                unit, scale = fragment_unit(largest_magnitude(x) * factor)
                if QUANT:
                    normed = round_to_mxfp8(normed)
                store_parts(s.expert_in, h, h < H, normed, unit)
                if block == 0:  # the same for all
                    tl.store(s.expert_in_scale, scale)
            else:
                if not QUANT:
                    power, scale = vector_power(largest_magnitude(x) * factor)
                    normed *= power
                    if block == 0:
                        tl.store(s.expert_in_scale, scale)
                write_activations(s.expert_in, s.expert_in_scale, normed, block * NORM, H, QUANT)


@triton.jit
def store_parts(x_ptr, k, inside, x, unit):
    """Store those elements k of a vector that are inside as load_fragment_vector reads it."""
    value, rest = fragment_parts(x, unit)
    at = x_ptr + fragment_places(k)
    tl.store(at, value, mask=inside)
    tl.store(at + REST_PLACE, rest, mask=inside)


@triton.jit
def write_activations(x_ptr, scale_ptr, x, first, SIZE: tl.constexpr, QUANTIZE: tl.constexpr):
    """Store float32 x [N] as elements first .. first + N of SIZE; in MXFP8 with QUANTIZE, then N is whole groups."""
    N: tl.constexpr = x.shape[0]
    i = first + tl.arange(0, N)
    if QUANTIZE:
        elements, scale = quantize_mxfp8(tl.reshape(x, (N // GROUP, GROUP)))
        tl.store(x_ptr + i, tl.reshape(elements, (N,)), mask=i < SIZE)
        group = tl.arange(0, N // GROUP) + first // GROUP
        tl.store(scale_ptr + group, scale, mask=group < SIZE // GROUP)
    else:
        tl.store(x_ptr + i, x, mask=i < SIZE)


@triton.jit
def load_router_logits(s, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """As top_k_softmax takes them, a copy for each warp."""
    ARCH: tl.constexpr = TUNING.arch
    expert = tl.arange(0, triton.next_power_of_2(CONFIG.n_experts))[None, :] + opaque_zero(ARCH)
    expert += 0 * tl.arange(0, TUNING.num_warps)[:, None]
    return tl.load(s.router_logits + expert, mask=expert < CONFIG.n_experts, other=0.0)


@triton.jit
def choose_experts(s, plan, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """(the plan with the experts, their weights) of the router's choice; every program makes it for itself."""
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    experts, weights = top_k_softmax(load_router_logits(s, CONFIG, TUNING), CONFIG.n_experts, TOP_K)
    return Plan(plan.limit, elements(experts, TOP_K), plan.n_layers, plan.shares), weights


@triton.jit
def load_expert_in(s, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    """(the experts' input as multiply_experts takes it, or multiply_expert_rows; what products with it lack)."""
    if TUNING.fragments:
        H: tl.constexpr = CONFIG.hidden_size
        scale, missing = split_scale(tl.load(s.expert_in_scale))
        return load_fragment_vector(as_words(s.expert_in), scale, H, TUNING.num_warps), missing
    elif QUANT:
        return (s.expert_in, s.expert_in_scale), 1.0
    else:
        return (s.expert_in,), tl.load(s.expert_in_scale)


@triton.jit
def load_expert_act(s, slot, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """An expert's activations, likewise."""
    K: tl.constexpr = CONFIG.intermediate_size
    if TUNING.fragments:
        _, scale = fragment_unit(tl.full([], CONFIG.swiglu_bound, tl.float32))
        WORDS: tl.constexpr = (K + 127) // 128 * 128
        return load_fragment_vector(as_words(s.expert_act) + slot * WORDS, scale, K, TUNING.num_warps)
    else:
        return s.expert_act + slot * K, s.expert_act_scale + slot * (K // GROUP)


@triton.jit
def as_words(ptr):
    """A pointer to pairs of float16 as one to int32."""
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def write_expert_act(s, slot, act, i, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    """Store activations i of the experts chosen at places `slot`, float32 [n]; nothing beyond the experts.

    With QUANT they come in whole groups; of plain rows all are of one expert, from i[0] on.
    """
    K: tl.constexpr = CONFIG.intermediate_size
    if TUNING.fragments:
        if QUANT:
            act = round_to_mxfp8(act)
        unit, _ = fragment_unit(tl.full([], CONFIG.swiglu_bound, tl.float32))
        PARTS: tl.constexpr = (K + 127) // 128 * 256
        store_parts(s.expert_act + slot * PARTS, i, (i < K) & (slot < CONFIG.experts_per_token), act, unit)
    else:
        place, first = tl.max(slot, axis=0), tl.min(i, axis=0)
        scale_ptr = s.expert_act_scale + place * (K // GROUP)
        write_activations(s.expert_act + place * K, scale_ptr, act, first, K, QUANT)


@triton.jit
def multiply_experts(stream, plan, w, vector, n, pid, n_programs, K: tl.constexpr, CONFIG: tl.constexpr, TUNING):
    """(even, odd, the stream): see collect_fragments, of the stream's next n units, experts' tiles, times a vector."""
    ARCH: tl.constexpr = TUNING.arch
    BATCH: tl.constexpr = TUNING.expert_batch
    WARPS: tl.constexpr = TUNING.num_warps
    BLOCKS: tl.constexpr = block_bytes(K)
    stream = describe(stream, plan, w, pid, n_programs, CONFIG, TUNING)
    for i in range(n):
        pieces, stream = take(stream, BLOCKS, TUNING)
        even, odd = gemv_fp4_fragments(pieces, vector, K, WARPS, ARCH)
        stream = release(stream, CONFIG, TUNING)
        leave_fragments(stream.scratch, i, even, odd, BATCH, WARPS, ARCH)
    even, odd = collect_fragments(stream.scratch, BATCH, WARPS, ARCH)
    return even, odd, stream


@triton.jit
def multiply_expert_rows(
    blocks_ptr,
    scales_ptr,
    vector,
    row0,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TUNING: tl.constexpr,
    QUANT: tl.constexpr,
):
    """(even, odd) rows of row0 .. row0 + M of a plain MXFP4 matrix [ROWS, K] times a vector, float32 [M / 2] each."""
    if QUANT:
        SCALED: tl.constexpr = TUNING.dot_scaled
        y = gemv_fp4_fp8(blocks_ptr, scales_ptr, vector[0], vector[1], row0, ROWS, K, M, BLOCK_K, SCALED)
    else:
        y = gemv_fp4(blocks_ptr, scales_ptr, vector[0], row0, ROWS, K, M, BLOCK_K)
    return tl.split(tl.reshape(y, (M // 2, 2)))


@triton.jit
def gate_up_phase(
    w, s, layer, stream, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr
):
    """expert_act = swiglu(W_gate_up @ expert_in + b) of every chosen expert; gate and up rows alternate.

    Returns the plan with the router's choice, which every program makes for itself, the weights of the chosen, and the
    stream.
    """
    K: tl.constexpr = CONFIG.hidden_size
    ROWS: tl.constexpr = 2 * CONFIG.intermediate_size
    # Whoever quantizes needs all 32 outputs of a scale, that is 64 rows.
    QUANTIZE: tl.constexpr = QUANT and not TUNING.fragments
    M: tl.constexpr = max(TUNING.gate_up_m, 2 * GROUP) if QUANTIZE else TUNING.gate_up_m
    N_TILES: tl.constexpr = (ROWS + M - 1) // M
    ITEMS: tl.constexpr = N_TILES * CONFIG.experts_per_token
    BATCH: tl.constexpr = TUNING.expert_batch
    # Before any tile is asked for: behind them it waited for 3.2 us. 12.5 us a layer instead of 13.1.
    vector, missing = load_expert_in(s, CONFIG, TUNING, QUANT)
    plan, expert_weights = choose_experts(s, plan, CONFIG, TUNING)
    experts, shares = plan.experts, plan.shares
    stream = describe_and_fill(stream, plan, w, pid, n_programs, CONFIG, TUNING)
    RUN: tl.constexpr = tiles_in_a_run(TUNING, QUANT)
    PAIRS: tl.constexpr = M // 2
    number = tl.arange(0, BATCH * PAIRS) // PAIRS
    mine = tl.cdiv(ITEMS - pid, n_programs)
    if TUNING.fragments:
        mine = shares.gate_up
    for turn in range(tl.cdiv(mine, BATCH)):
        item = gate_up_item(turn * BATCH + number, pid, n_programs, RUN)
        slot = item // N_TILES
        i = item % N_TILES * PAIRS + tl.arange(0, BATCH * PAIRS) % PAIRS
        gate_bias = load_expert_bias(w.gate_up_bias, layer, experts, slot, 2 * i, ROWS, CONFIG)
        up_bias = load_expert_bias(w.gate_up_bias, layer, experts, slot, 2 * i + 1, ROWS, CONFIG)
        if TUNING.fragments:
            n = tl.minimum(mine - turn * BATCH, BATCH)
            gate, up, stream = multiply_experts(stream, plan, w, vector, n, pid, n_programs, K, CONFIG, TUNING)
        else:
            first = gate_up_item(turn * BATCH, pid, n_programs, RUN)
            matrix = layer * CONFIG.n_experts + element(experts, first // N_TILES)
            blocks, scales = w.gate_up + matrix * (ROWS * (K // 8)), w.gate_up_scales + matrix * (ROWS * (K // GROUP))
            gate, up = multiply_expert_rows(
                blocks, scales, vector, first % N_TILES * M, ROWS, K, M, TUNING.gate_up_k, TUNING, QUANT
            )
        gate, up = gate * missing + gate_bias, up * missing + up_bias
        act = swiglu(gate, up, CONFIG.swiglu_limit, CONFIG.swiglu_alpha)
        write_expert_act(s, slot, act, i, CONFIG, TUNING, QUANT)
    return plan, expert_weights, stream


@triton.jit
def load_expert_bias(bias_ptr, layer, experts, slot, row, ROWS: tl.constexpr, CONFIG: tl.constexpr):
    """float32, of rows of the experts chosen at places `slot`; 0 where there is no such row or place."""
    mask = (row < ROWS) & (slot < CONFIG.experts_per_token)
    at = bias_ptr + (layer * CONFIG.n_experts + element(experts, slot)) * ROWS + row
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def down_phase(
    w,
    s,
    layer,
    expert_weights,
    stream,
    plan,
    pid,
    n_programs,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
    QUANT: tl.constexpr,
):
    """expert_out = weight * (W_down @ expert_act + b) of every chosen expert. Returns the stream.

    plan: that of gate_up_phase, with the experts.
    """
    ROWS: tl.constexpr = CONFIG.hidden_size
    K: tl.constexpr = CONFIG.intermediate_size
    M: tl.constexpr = TUNING.down_m
    BATCH: tl.constexpr = TUNING.expert_batch
    N_TILES: tl.constexpr = (ROWS + M - 1) // M
    PAIRS: tl.constexpr = M // 2
    number, pair = tl.arange(0, BATCH * PAIRS) // PAIRS, tl.arange(0, BATCH * PAIRS) % PAIRS
    shares = plan.shares
    experts = plan.experts
    for slot in range(pid % shares.lanes, CONFIG.experts_per_token, shares.lanes):
        vector = load_expert_act(s, slot, CONFIG, TUNING)
        expert_weight = pick(expert_weights, slot)
        for first in range(shares.member, N_TILES, shares.members * BATCH):
            row = (first + shares.members * number) * M + 2 * pair
            slots = slot + 0 * row
            even_bias = load_expert_bias(w.down_bias, layer, experts, slots, row, ROWS, CONFIG)
            odd_bias = load_expert_bias(w.down_bias, layer, experts, slots, row + 1, ROWS, CONFIG)
            if TUNING.fragments:
                n = tl.minimum(tl.cdiv(N_TILES - first, shares.members), BATCH)
                even, odd, stream = multiply_experts(stream, plan, w, vector, n, pid, n_programs, K, CONFIG, TUNING)
            else:
                matrix = layer * CONFIG.n_experts + element(experts, slot)
                blocks, scales = w.down + matrix * (ROWS * (K // 8)), w.down_scales + matrix * (ROWS * (K // GROUP))
                even, odd = multiply_expert_rows(
                    blocks, scales, vector, first * M, ROWS, K, M, TUNING.down_k, TUNING, QUANT
                )
            out = s.expert_out + slot * ROWS + row
            tl.store(out, expert_weight * (even + even_bias), mask=row < ROWS)
            tl.store(out + 1, expert_weight * (odd + odd_bias), mask=row + 1 < ROWS)
    return stream
