"""RoPE, KV append and flash decode. Arguments: see common/phases.py."""

import triton
import triton.language as tl

from common.arch import opaque_zero
from common.attention import (
    WEIGHT_UNIT,
    attend_cache,
    attend_cache_by_head,
    keep_state_if,
    load_cache_block,
    mean_value,
    merge_splits,
    start_state,
)
from common.barrier import count_arrival, wait_for
from common.prefetch import prefetch_l2
from common.rope import load_rotated


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
    m, l, acc = start_state(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, CONFIG.sm_scale, WEIGHT_UNIT)  # noqa: E741
    l, acc = attend_cache_by_head(  # noqa: E741
        m, l, acc, q, block, k_ptr, v_ptr, start, position, CONFIG.sm_scale, D, T, SLOTS, zero, WEIGHT_UNIT
    )
    tl.store(s.attention + head * D + zero + tl.arange(0, D), mean_value(l, acc, WEIGHT_UNIT))


@triton.constexpr_function
def parts_of_a_step(tuning, row_bytes: int) -> int:
    """Of a step over the keys, 4 at most of wide rows: more would leave the ring too little shared memory."""
    return tuning.attention_parts if row_bytes <= 128 else min(tuning.attention_parts, 4)


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
    ROW_BYTES: tl.constexpr = D * s.k_cache.dtype.element_ty.primitive_bitwidth // 8
    PARTS: tl.constexpr = parts_of_a_step(TUNING, ROW_BYTES)
    STAGES: tl.constexpr = TUNING.attention_stages if ROW_BYTES <= 256 else 1
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
    m, l, acc = start_state(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, CONFIG.sm_scale, WEIGHT_UNIT)  # noqa: E741
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
        TUNING.block_t // TUNING.attention_parts * PARTS,
        PARTS,
        TUNING.bf16_parts,
        STAGES,
        zero,
        WEIGHT_UNIT,
    )
    if n_splits == 1:
        mean = mean_value(l[:, None], acc, WEIGHT_UNIT)
        tl.store(s.attention + head[:, None] * D + dim[None, :], mean, mask=(g < G)[:, None])
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
    tl.store(s.attention + head * D + zero + tl.arange(0, D), mean_value(l, acc, WEIGHT_UNIT))


@triton.jit
def attention_barrier(layer):
    """Number of the grid barrier behind attention, for what waits inside of it."""
    return (3 + 6 * layer).to(tl.int32)
