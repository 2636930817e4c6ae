"""The phases of a token, from which the megakernel and the separate launches are built.

`w` is host.weights.Weights, `s` host.state.State, both of pointers here; CONFIG a ModelConfig, TUNING a Tuning. A phase
is executed by n_programs programs of which this one is number pid, and what it reads of others must have been ordered
before it: the megakernel does so by a grid barrier, separate launches by their order.
"""

import triton
import triton.language as tl

from common.arch import opaque_zero
from common.argmax import keep_larger, reduce_argmax
from common.attention import (
    attend_cache,
    attend_cache_by_head,
    keep_state_if,
    load_cache_block,
    merge_splits,
    start_state,
)
from common.barrier import ABORT, count_arrival, wait_for
from common.fp4_fragments import (
    REST_PLACE,
    block_bytes,
    fragment_parts,
    fragment_places,
    fragment_unit,
    gemv_fp4_fragments,
    load_fragment_vector,
    sum_fragments,
)
from common.gemv_bf16 import gemv_bf16, gemv_bf16_slot, load_bf16_rows, load_lane_vector, load_vector
from common.gemv_fp4 import gemv_fp4, gemv_fp4_fp8
from common.prefetch import prefetch_l2
from common.quant import GROUP, dequantize_mxfp8, quantize_mxfp8
from common.rmsnorm import add_blocks, largest_magnitude, multiply_blocks, rms_rstd
from common.rope import load_rotated
from common.router import element, elements, pick, top_k_softmax
from common.stream import Plan, fill, gate_up_item, release, share, take, tiles_in_a_run
from common.swiglu import swiglu


@triton.jit
def embed_token(w, s, token, pid, n_programs, CONFIG: tl.constexpr, BLOCK_H: tl.constexpr):
    """The residual stream = the token's embedding."""
    H: tl.constexpr = CONFIG.hidden_size
    if pid == 0:
        h = tl.arange(0, BLOCK_H)
        row = tl.load(w.embed + token.to(tl.int64) * H + h, mask=h < H, other=0.0)
        tl.store(s.x + h, row.to(tl.float32), mask=h < H)
        for slot in range(CONFIG.experts_per_token):
            tl.store(s.expert_out + slot * H + h, tl.zeros([BLOCK_H], tl.float32), mask=h < H)


@triton.jit
def load_dense_vector(x_ptr, K: tl.constexpr, TUNING: tl.constexpr, zero):
    """x [K] as blocks, in the order of the tiles of dense matrices."""
    if TUNING.ring_slots > 0:
        return load_lane_vector(x_ptr, K, TUNING.dense_lanes, 32 * TUNING.num_warps // TUNING.dense_lanes)
    else:
        return load_vector(x_ptr, K, TUNING.dense_k, zero)


@triton.jit
def load_residual(s, CONFIG: tl.constexpr, TUNING: tl.constexpr, zero):
    """x plus what the experts left, as blocks."""
    H: tl.constexpr = CONFIG.hidden_size
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    x = load_dense_vector(s.x, H, TUNING, zero)
    for slot in tl.static_range(TOP_K):
        x = add_blocks(x, load_dense_vector(s.expert_out + slot * H, H, TUNING, zero))
    return x


@triton.jit
def first_dense_rows(w_ptr, row0, end_row, K: tl.constexpr, M: tl.constexpr, TUNING: tl.constexpr):
    """What a dense phase's multiply_rows begins with, to be loaded before the phase may begin; () but for prefetch."""
    ARCH: tl.constexpr = TUNING.arch
    if TUNING.prefetch:
        return load_bf16_rows(w_ptr, row0, end_row, K, M, TUNING.dense_k, opaque_zero(ARCH))
    else:
        return ()


@triton.jit
def multiply_rows(
    tile,
    stream,
    plan,
    x,
    w,
    w_ptr,
    row0,
    end_row,
    pid,
    n_programs,
    K: tl.constexpr,
    M: tl.constexpr,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
):
    """(rows row0 .. row0 + TUNING.dense_batch * M of a bfloat16 matrix times x, what follows `tile`, the stream).

    Streamed, the rows are the next units of the stream; with prefetch they are `tile`; else they are loaded.
    """
    ARCH: tl.constexpr = TUNING.arch
    if TUNING.ring_slots > 0:
        BATCH: tl.constexpr = TUNING.dense_batch
        COPIES: tl.constexpr = x[0].shape[0]
        number = tl.arange(0, BATCH)[:, None, None, None]
        sums = tl.zeros([BATCH, M // COPIES, COPIES, x[0].shape[1]], tl.float32)
        for n in range(tl.minimum(tl.cdiv(end_row - row0, M), BATCH)):
            pieces, stream = take(stream, 0, TUNING)
            mine = gemv_bf16_slot(pieces[0], x, end_row - row0 - n * M, K, M, ARCH)
            sums = tl.where(number == n, mine[None, :, :, :], sums)
            stream = release(stream, plan, w, pid, n_programs, CONFIG, TUNING, True)
        return tl.reshape(tl.sum(sums, axis=3), (BATCH * M,)), tile, stream
    else:
        zero = opaque_zero(ARCH)
        if TUNING.prefetch:
            rows = tile
            tile = load_bf16_rows(w_ptr, row0 + M, end_row, K, M, TUNING.dense_k, zero)
        else:
            rows = load_bf16_rows(w_ptr, row0, end_row, K, M, TUNING.dense_k, zero)
        return gemv_bf16(rows, x), tile, stream


@triton.jit
def row_share(pid, n_programs, ROWS: tl.constexpr, M: tl.constexpr):
    """(first, end) of the rows of a dense matrix that a program takes, whole tiles of M but for the last of all."""
    first, end = share(tl.cdiv(ROWS, M), pid, n_programs)
    return first * M, tl.minimum(end * M, ROWS)


@triton.jit
def qkv_matrix(w, layer, CONFIG: tl.constexpr):
    return w.qkv + layer * CONFIG.qkv_size * (CONFIG.hidden_size // 2)


@triton.jit
def first_qkv_tile(w, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """What qkv_phase begins with."""
    M: tl.constexpr = TUNING.qkv_m
    first, end = row_share(pid, n_programs, CONFIG.qkv_size, M)
    return first_dense_rows(qkv_matrix(w, layer, CONFIG), first, end, CONFIG.hidden_size, M, TUNING)


@triton.jit
def prefetch_qkv(w, layer, PLACE: tl.constexpr, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Ask for a piece of this program's share of a layer's QKV weights: number PLACE, counted from the share's end.

    Little at a time: what has been asked for holds up all that comes after it, barriers too.
    """
    ARCH: tl.constexpr = TUNING.arch
    if TUNING.prefetch_small and PLACE == 0:
        if pid == n_programs - 1:
            prefetch_l2(w.attn_norm + layer * CONFIG.hidden_size, CONFIG.hidden_size * 4, ARCH)
            prefetch_l2(w.qkv_bias + layer * CONFIG.qkv_size, CONFIG.qkv_size * 2, ARCH)
    if TUNING.prefetch_qkv > 0:
        ROW_BYTES: tl.constexpr = 2 * CONFIG.hidden_size
        first, end = row_share(pid, n_programs, CONFIG.qkv_size, TUNING.qkv_m)
        n_bytes = (end - first) * ROW_BYTES * TUNING.prefetch_qkv // 16 & -16
        at = w.qkv.to(tl.int64) + (layer * CONFIG.qkv_size + end) * ROW_BYTES
        prefetch_l2(at - (PLACE + 1) * n_bytes, n_bytes, ARCH)


@triton.jit
def qkv_phase(w, s, layer, tile, stream, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """qkv = W_qkv @ rmsnorm(residual) + b. Returns the stream.

    tile: first_qkv_tile; stream and plan: see multiply_rows.
    """
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    ROWS: tl.constexpr = CONFIG.qkv_size
    M: tl.constexpr = TUNING.qkv_m
    STEP: tl.constexpr = TUNING.dense_batch * M
    x = load_residual(s, CONFIG, TUNING, zero)
    rstd = rms_rstd(x, H, CONFIG.rms_norm_eps)
    x = multiply_blocks(x, load_dense_vector(w.attn_norm + layer * H, H, TUNING, zero))
    first, end = row_share(pid, n_programs, ROWS, M)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        # Before the sum, as behind it the bias would cost its latency once more.
        bias = tl.load(w.qkv_bias + layer * ROWS + row, mask=row < end, other=0.0).to(tl.float32)
        y, tile, stream = multiply_rows(
            tile, stream, plan, x, w, qkv_matrix(w, layer, CONFIG), row0, end, pid, n_programs, H, M, CONFIG, TUNING
        )
        tl.store(s.qkv + row, y * rstd + bias, mask=row < end)
    return stream


@triton.jit
def first_seen(window, position):
    """The first position that a query sees."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@triton.jit
def split_cache(past, TUNING: tl.constexpr):
    """(positions of a split, splits) of that many cached ones."""
    SPLITS: tl.constexpr = TUNING.max_splits
    split_size = tl.maximum(tl.cdiv(tl.cdiv(past, SPLITS), TUNING.block_t) * TUNING.block_t, TUNING.split_t)
    return split_size, tl.maximum(tl.cdiv(past, split_size), 1)


@triton.jit
def prefetch_small(
    w, s, layer, window, position, max_context, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr
):
    """Ask for this program's part of the cache, and for the small vectors that the next three phases read."""
    ARCH: tl.constexpr = TUNING.arch
    if TUNING.prefetch_small:
        H: tl.constexpr = CONFIG.hidden_size
        D: tl.constexpr = CONFIG.head_dim
        KV_BYTES: tl.constexpr = s.k_cache.dtype.element_ty.primitive_bitwidth // 8
        start = first_seen(window, position)
        split_size, n_splits = split_cache(position - start, TUNING)
        if pid < CONFIG.n_kv_heads * n_splits:
            first = start + (pid % n_splits) * split_size
            n_bytes = tl.minimum(split_size, position - first) * (D * KV_BYTES)
            at = ((layer * CONFIG.n_kv_heads + pid // n_splits) * max_context + first) * D
            prefetch_l2(s.k_cache + at, n_bytes, ARCH)
            prefetch_l2(s.v_cache + at, n_bytes, ARCH)
        if pid == n_programs - 1:
            prefetch_l2(w.sinks + layer * CONFIG.n_heads, CONFIG.n_heads * 4, ARCH)
            prefetch_l2(w.o_bias + layer * H, H * 2, ARCH)
            prefetch_l2(w.mlp_norm + layer * H, H * 4, ARCH)
            prefetch_l2(w.router_bias + layer * CONFIG.n_experts, CONFIG.n_experts * 2, ARCH)
        for row in range(pid, CONFIG.n_experts, n_programs):
            prefetch_l2(w.router + (layer * CONFIG.n_experts + row) * (H // 2), H * 2, ARCH)


@triton.jit
def attention_phase(
    w, s, layer, window, position, max_context, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr
):
    """RoPE, KV append, flash decode with sinks: attention = softmax(q k) v, over the window or all of the past."""
    start = first_seen(window, position)
    by_head = False
    if TUNING.head_keys > 0:
        by_head = position - start <= TUNING.head_keys
        if by_head:
            for head in range(pid, CONFIG.n_heads, n_programs):
                attend_head(w, s, layer, head, start, position, max_context, CONFIG, TUNING)
    if not by_head:
        split_size, n_splits = split_cache(position - start, TUNING)
        for unit in range(pid, CONFIG.n_kv_heads * n_splits, n_programs):
            attend_split(w, s, layer, unit, start, split_size, n_splits, position, max_context, CONFIG, TUNING)
        if n_splits > 1:
            # From the last program on: it is the first ones that have one split more, if any have.
            for head in range(n_programs - 1 - pid, CONFIG.n_heads, n_programs):
                merge_head(s, layer, head, n_splits, CONFIG, TUNING)


@triton.jit
def load_current(s, kv_head, position, zero, CONFIG: tl.constexpr):
    """(keys, values) [N, head_dim] of the current position, rounded to the cache's type; kv_head [N].

    They stay in registers: no program waits for the cache to be appended.
    """
    D: tl.constexpr = CONFIG.head_dim
    k = load_rotated(
        s.qkv + CONFIG.q_size, kv_head, kv_head >= 0, s.cos + position * (D // 2), s.sin + position * (D // 2), D, zero
    )
    v = tl.load(s.qkv + CONFIG.q_size + CONFIG.kv_size + kv_head[:, None] * D + (tl.arange(0, D) + zero)[None, :])
    return k.to(s.k_cache.dtype.element_ty), v.to(s.v_cache.dtype.element_ty)


@triton.jit
def append_current(s, cache, position, k, v, mask, zero, CONFIG: tl.constexpr):
    """Store one of k and v [N, head_dim] in the cache, whose KV head begins at `cache`; mask [N]."""
    D: tl.constexpr = CONFIG.head_dim
    dim = tl.zeros(k.shape, tl.int32) + (tl.arange(0, D) + zero)[None, :]
    at = cache + position.to(tl.int64) * D
    tl.store(s.k_cache + at + dim, k, mask=mask[:, None])
    tl.store(s.v_cache + at + dim, v, mask=mask[:, None])


@triton.jit
def attend_head(w, s, layer, head, start, position, max_context, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """One query head, with the keys of all the past that it sees."""
    D: tl.constexpr = CONFIG.head_dim
    G: tl.constexpr = CONFIG.n_heads // CONFIG.n_kv_heads
    T: tl.constexpr = TUNING.head_block_t
    SLOTS: tl.constexpr = TUNING.head_slots
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    kv_head = head // G
    cache = (layer * CONFIG.n_kv_heads + kv_head) * max_context * D
    k_ptr, v_ptr = s.k_cache + cache, s.v_cache + cache
    # All loads before any sum, as behind one each would cost its latency once more.
    block = load_cache_block(k_ptr, v_ptr, start, position, D, T, SLOTS, zero)
    # Every slot loads the same, since what is in the threads' registers need not be exchanged.
    slot = tl.arange(0, SLOTS) + zero
    heads = head + 0 * slot
    q = load_rotated(s.qkv, heads, heads >= 0, s.cos + position * (D // 2), s.sin + position * (D // 2), D, zero)
    new_k, new_v = load_current(s, kv_head + 0 * slot, position, zero, CONFIG)
    sink = tl.load(w.sinks + layer * CONFIG.n_heads + heads)
    append_current(s, cache, position, new_k, new_v, (slot == 0) & (head % G == 0), zero, CONFIG)
    m, l, acc = start_state(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, CONFIG.sm_scale)  # noqa: E741
    l, acc = attend_cache_by_head(  # noqa: E741
        m, l, acc, q, block, k_ptr, v_ptr, start, position, CONFIG.sm_scale, D, T, SLOTS, zero
    )
    tl.store(s.attention + head * D + zero + tl.arange(0, D), acc / l)


@triton.jit
def attend_split(
    w,
    s,
    layer,
    unit,
    start,
    split_size,
    n_splits,
    position,
    max_context,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
):
    """The query heads of a KV head, with a split of the keys."""
    D: tl.constexpr = CONFIG.head_dim
    G: tl.constexpr = CONFIG.n_heads // CONFIG.n_kv_heads
    BLOCK_G: tl.constexpr = max(TUNING.least_group, triton.next_power_of_2(G))
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    # Wider rows would take more shared memory than two programs on an SM have.
    NARROW: tl.constexpr = D * s.k_cache.dtype.element_ty.primitive_bitwidth <= 2048
    STAGES: tl.constexpr = TUNING.attention_stages if NARROW else 1
    g = tl.arange(0, BLOCK_G) + zero
    dim = tl.arange(0, D) + zero
    kv_head = unit // n_splits
    split = unit % n_splits
    cache = (layer * CONFIG.n_kv_heads + kv_head) * max_context * D
    head = kv_head * G + g
    q = load_rotated(s.qkv, head, g < G, s.cos + position * (D // 2), s.sin + position * (D // 2), D, zero)
    new_k, new_v = load_current(s, kv_head + tl.arange(0, 1), position, zero, CONFIG)
    sink = tl.load(w.sinks + layer * CONFIG.n_heads + head, mask=g < G, other=0.0)
    last = split == n_splits - 1
    append_current(s, cache, position, new_k, new_v, last & (tl.arange(0, 1) == 0), zero, CONFIG)
    m, l, acc = start_state(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, CONFIG.sm_scale)  # noqa: E741
    m, l, acc = keep_state_if(last, m, l, acc)  # noqa: E741
    first = start + split * split_size
    m, l, acc = attend_cache(  # noqa: E741
        m,
        l,
        acc,
        q,
        s.k_cache + cache,
        s.v_cache + cache,
        first,
        tl.minimum(first + split_size, position),
        CONFIG.sm_scale,
        D,
        TUNING.block_t,
        TUNING.attention_parts,
        TUNING.bf16_parts,
        STAGES,
        zero,
    )
    if n_splits == 1:
        tl.store(s.attention + head[:, None] * D + dim[None, :], acc / l[:, None], mask=(g < G)[:, None])
    else:
        mine = (kv_head * TUNING.max_splits + split) * BLOCK_G + g
        tl.store(s.split_m + mine, m)
        tl.store(s.split_l + mine, l)
        tl.store(s.split_acc + mine[:, None] * D + dim[None, :], acc)
        count_arrival(s.split_arrivals + kv_head, ARCH)


@triton.jit
def merge_head(s, layer, head, n_splits, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """One query head, when all splits of its KV head are there."""
    D: tl.constexpr = CONFIG.head_dim
    G: tl.constexpr = CONFIG.n_heads // CONFIG.n_kv_heads
    BLOCK_G: tl.constexpr = max(TUNING.least_group, triton.next_power_of_2(G))
    SPLITS: tl.constexpr = triton.next_power_of_2(TUNING.max_splits)
    SPINS: tl.constexpr = TUNING.spin_limit
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    kv_head = head // G
    wait_for(s.split_arrivals + kv_head, n_splits, s.sync, attention_barrier(layer), SPINS, ARCH)
    state = kv_head * (TUNING.max_splits * BLOCK_G) + head % G
    l, acc = merge_splits(  # noqa: E741
        s.split_m + state, s.split_l + state, s.split_acc + state * D, n_splits, BLOCK_G, D, SPLITS, zero
    )
    tl.store(s.attention + head * D + zero + tl.arange(0, D), acc / l)


@triton.jit
def attention_barrier(layer):
    """Number of the grid barrier behind attention, for what waits inside of it."""
    return (3 + 6 * layer).to(tl.int32)


@triton.jit
def o_matrix(w, layer, CONFIG: tl.constexpr):
    return w.o + layer * CONFIG.hidden_size * (CONFIG.q_size // 2)


@triton.jit
def first_o_tile(w, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """What o_phase begins with."""
    M: tl.constexpr = TUNING.o_m
    first, end = row_share(pid, n_programs, CONFIG.hidden_size, M)
    return first_dense_rows(o_matrix(w, layer, CONFIG), first, end, CONFIG.q_size, M, TUNING)


@triton.jit
def o_phase(w, s, layer, tile, stream, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """x = residual + W_o @ attention + b. Returns the stream.

    tile: first_o_tile; stream and plan: see multiply_rows.
    """
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    K: tl.constexpr = CONFIG.q_size
    M: tl.constexpr = TUNING.o_m
    STEP: tl.constexpr = TUNING.dense_batch * M
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    a = load_dense_vector(s.attention, K, TUNING, zero)
    if pid == n_programs - 1:
        kv_head = tl.arange(0, triton.next_power_of_2(CONFIG.n_kv_heads))
        tl.store(s.split_arrivals + kv_head, 0, mask=kv_head < CONFIG.n_kv_heads)  # none is waited for any more
    first, end = row_share(pid, n_programs, H, M)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        x = tl.load(s.x + row, mask=row < end, other=0.0)
        for slot in tl.static_range(TOP_K):
            x += tl.load(s.expert_out + slot * H + row, mask=row < end, other=0.0)
        x += tl.load(w.o_bias + layer * H + row, mask=row < end, other=0.0).to(tl.float32)
        y, tile, stream = multiply_rows(
            tile, stream, plan, a, w, o_matrix(w, layer, CONFIG), row0, end, pid, n_programs, K, M, CONFIG, TUNING
        )
        tl.store(s.x + row, x + y, mask=row < end)
    return stream


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
    return load_bf16_rows(w.router + layer * E * (H // 2), tile * M, E, H, M, TUNING.dense_k, zero), bias


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
    norm_ptr = w.mlp_norm + layer * H
    # Rows from the first program on, blocks from the last one on, so that few have both.
    if (pid < N_TILES) | (n_programs - 1 - pid < N_BLOCKS):
        weights = load_router_tile(w, layer, pid, CONFIG, TUNING)
        x = load_vector(s.x, H, TUNING.dense_k, zero)
        rstd = rms_rstd(x, H, CONFIG.rms_norm_eps)
        x = multiply_blocks(x, load_vector(norm_ptr, H, TUNING.dense_k, zero))
        for tile in range(pid, N_TILES, n_programs):
            if tile != pid:
                weights = load_router_tile(w, layer, tile, CONFIG, TUNING)
            row = tile * M + tl.arange(0, M)
            tl.store(s.router_logits + row, gemv_bf16(weights[0], x) * rstd + weights[1], mask=row < E)
        for block in range(n_programs - 1 - pid, N_BLOCKS, n_programs):
            h = block * NORM + tl.arange(0, NORM) + zero
            normed = tl.load(s.x + h, mask=h < H, other=0.0) * rstd * tl.load(norm_ptr + h, mask=h < H, other=0.0)
            if TUNING.fragments:
                unit, scale = fragment_unit(largest_magnitude(x) * rstd)
                if QUANT:
                    normed = round_to_mxfp8(normed)
                store_parts(s.expert_in, h, h < H, normed, unit)
                if block == 0:  # the same for all
                    tl.store(s.expert_in_scale, scale)
            else:
                write_activations(s.expert_in, s.expert_in_scale, normed, block * NORM, H, QUANT)


@triton.jit
def round_to_mxfp8(x):
    """float32 x [N], N whole groups, to what MXFP8 makes of it."""
    groups = tl.reshape(x, (x.shape[0] // GROUP, GROUP))
    elements, scale = quantize_mxfp8(groups)
    return tl.reshape(dequantize_mxfp8(elements, scale), x.shape)


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
def load_expert_in(s, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """The experts' input as expert_gemv takes it."""
    if TUNING.fragments:
        H: tl.constexpr = CONFIG.hidden_size
        scale = tl.load(s.expert_in_scale)
        return load_fragment_vector(as_words(s.expert_in), scale, H, TUNING.num_warps)
    else:
        return s.expert_in, s.expert_in_scale


@triton.jit
def load_expert_act(s, slot, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """An expert's activations as expert matrices' rows take them."""
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
def write_expert_act(s, slot, act, first, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    """Store activations [tiles, N] of experts slot [tiles, 1], from `first` [tiles, 1] on; nothing beyond the experts.

    With QUANT, where whoever writes quantizes, one tile of whole groups.
    """
    K: tl.constexpr = CONFIG.intermediate_size
    if TUNING.fragments:
        i = first + tl.arange(0, act.shape[1])[None, :]
        if QUANT:
            act = tl.reshape(round_to_mxfp8(tl.reshape(act, (act.shape[0] * act.shape[1],))), act.shape)
        unit, _ = fragment_unit(tl.full([], CONFIG.swiglu_bound, tl.float32))
        PARTS: tl.constexpr = (K + 127) // 128 * 256
        store_parts(s.expert_act + slot * PARTS, i, (i < K) & (slot < CONFIG.experts_per_token), act, unit)
    else:
        scale_ptr = s.expert_act_scale + slot * (K // GROUP)
        write_activations(s.expert_act + slot * K, scale_ptr, tl.reshape(act, (act.shape[1],)), first, K, QUANT)


@triton.jit
def multiply_experts(stream, plan, w, vector, n, pid, n_programs, K: tl.constexpr, CONFIG: tl.constexpr, TUNING):
    """(rows [TUNING.expert_batch, 16] of the stream's next n units, experts' tiles, times a vector; the stream)."""
    ARCH: tl.constexpr = TUNING.arch
    BATCH: tl.constexpr = TUNING.expert_batch
    WARPS: tl.constexpr = TUNING.num_warps
    BLOCKS: tl.constexpr = block_bytes(K)
    number = tl.arange(0, BATCH)[:, None]
    even = tl.zeros([BATCH, 32 * WARPS], tl.float32)
    odd = tl.zeros([BATCH, 32 * WARPS], tl.float32)
    for i in range(n):
        pieces, stream = take(stream, BLOCKS, TUNING)
        my_even, my_odd = gemv_fp4_fragments(pieces, vector, K, WARPS, ARCH)
        even = tl.where(number == i, my_even[None, :], even)
        odd = tl.where(number == i, my_odd[None, :], odd)
        stream = release(stream, plan, w, pid, n_programs, CONFIG, TUNING, False)
    return sum_fragments(even, odd, WARPS), stream


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
    """Rows row0 .. row0 + M of a plain MXFP4 matrix [ROWS, K] times a vector, [1, M]."""
    if QUANT:
        SCALED: tl.constexpr = TUNING.dot_scaled
        y = gemv_fp4_fp8(blocks_ptr, scales_ptr, vector[0], vector[1], row0, ROWS, K, M, BLOCK_K, SCALED)
    else:
        y = gemv_fp4(blocks_ptr, scales_ptr, vector[0], row0, ROWS, K, M, BLOCK_K)
    return y[None, :]


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
    plan, expert_weights = choose_experts(s, plan, CONFIG, TUNING)
    experts, shares = plan.experts, plan.shares
    stream = fill(stream, plan, w, pid, n_programs, CONFIG, TUNING, False, TUNING.window)
    vector = load_expert_in(s, CONFIG, TUNING)
    RUN: tl.constexpr = tiles_in_a_run(TUNING, QUANT)
    number = tl.arange(0, BATCH)[:, None]
    mine = tl.cdiv(ITEMS - pid, n_programs)
    if TUNING.fragments:
        mine = shares.gate_up
    for turn in range(tl.cdiv(mine, BATCH)):
        first = gate_up_item(turn * BATCH, pid, n_programs, RUN)
        item = gate_up_item(turn * BATCH + number, pid, n_programs, RUN)
        slot = item // N_TILES
        row0 = item % N_TILES * M
        bias = load_expert_bias(w.gate_up_bias, layer, experts, slot, row0, ROWS, M, CONFIG)
        if TUNING.fragments:
            n = tl.minimum(mine - turn * BATCH, BATCH)
            y, stream = multiply_experts(stream, plan, w, vector, n, pid, n_programs, K, CONFIG, TUNING)
        else:
            matrix = layer * CONFIG.n_experts + element(experts, first // N_TILES)
            blocks, scales = w.gate_up + matrix * (ROWS * (K // 8)), w.gate_up_scales + matrix * (ROWS * (K // GROUP))
            y = multiply_expert_rows(
                blocks, scales, vector, first % N_TILES * M, ROWS, K, M, TUNING.gate_up_k, TUNING, QUANT
            )
        gate, up = tl.split(tl.reshape(y + bias, (BATCH, M // 2, 2)))
        act = swiglu(gate, up, CONFIG.swiglu_limit, CONFIG.swiglu_alpha)
        write_expert_act(s, slot, act, row0 // 2, CONFIG, TUNING, QUANT)
    return plan, expert_weights, stream


@triton.jit
def load_expert_bias(bias_ptr, layer, experts, slot, row0, ROWS: tl.constexpr, M: tl.constexpr, CONFIG: tl.constexpr):
    """float32 [tiles, M], of rows from row0 [tiles, 1] on, of the experts chosen at places slot [tiles, 1]."""
    expert = element(experts, slot)
    row = row0 + tl.arange(0, M)[None, :]
    mask = (row < ROWS) & (slot < CONFIG.experts_per_token)
    return tl.load(bias_ptr + (layer * CONFIG.n_experts + expert) * ROWS + row, mask=mask, other=0.0).to(tl.float32)


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
    shares = plan.shares
    experts = plan.experts
    for slot in range(pid % shares.lanes, CONFIG.experts_per_token, shares.lanes):
        vector = load_expert_act(s, slot, CONFIG, TUNING)
        expert_weight = pick(expert_weights, slot)
        for first in range(shares.member, N_TILES, shares.members * BATCH):
            tile = first + shares.members * tl.arange(0, BATCH)[:, None]
            bias = load_expert_bias(w.down_bias, layer, experts, slot + 0 * tile, tile * M, ROWS, M, CONFIG)
            if TUNING.fragments:
                n = tl.minimum(tl.cdiv(N_TILES - first, shares.members), BATCH)
                y, stream = multiply_experts(stream, plan, w, vector, n, pid, n_programs, K, CONFIG, TUNING)
            else:
                matrix = layer * CONFIG.n_experts + element(experts, slot)
                blocks, scales = w.down + matrix * (ROWS * (K // 8)), w.down_scales + matrix * (ROWS * (K // GROUP))
                y = multiply_expert_rows(blocks, scales, vector, first * M, ROWS, K, M, TUNING.down_k, TUNING, QUANT)
            row = tile * M + tl.arange(0, M)[None, :]
            tl.store(s.expert_out + slot * ROWS + row, expert_weight * (y + bias), mask=row < ROWS)
    return stream


@triton.jit
def head_phase(w, s, want_logits, stream, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Each program's largest logit of W_head @ rmsnorm(residual); the logits themselves only when asked for."""
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    M: tl.constexpr = TUNING.head_m
    STEP: tl.constexpr = TUNING.dense_batch * M
    first, end = row_share(pid, n_programs, CONFIG.vocab_size, M)
    tile = first_dense_rows(w.lm_head, first, end, H, M, TUNING)
    x = load_residual(s, CONFIG, TUNING, zero)
    rstd = rms_rstd(x, H, CONFIG.rms_norm_eps)
    x = multiply_blocks(x, load_dense_vector(w.final_norm, H, TUNING, zero))
    best = tl.full([STEP], float("-inf"), tl.float32)
    best_index = tl.zeros([STEP], tl.int32)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        y, tile, stream = multiply_rows(
            tile, stream, plan, x, w, w.lm_head, row0, end, pid, n_programs, H, M, CONFIG, TUNING
        )
        logits = y * rstd
        if want_logits:
            tl.store(s.logits + row, logits, mask=row < end)
        best, best_index = keep_larger(best, best_index, tl.where(row < end, logits, float("-inf")), row)
    value, index = reduce_argmax(best, best_index)
    tl.store(s.head_value + pid, value)
    tl.store(s.head_index + pid, index)


@triton.jit
def argmax_phase(s, position, pid, n_programs, BLOCK_P: tl.constexpr):
    """tokens[position + 1] = index of the largest logit, unless a barrier gave up."""
    if pid == 0:
        program = tl.arange(0, BLOCK_P)
        value = tl.load(s.head_value + program, mask=program < n_programs, other=float("-inf"))
        index = tl.load(s.head_index + program, mask=program < n_programs, other=0x7FFFFFFF)
        _, token = reduce_argmax(value, index)
        if tl.load(s.sync + ABORT) == 0:  # otherwise -1 stays there
            tl.store(s.tokens + position + 1, token)
