"""Attention of one query position: RoPE, what is appended to the cache, and who attends which keys.

Few keys: a program attends a query head. Many: the keys of a KV head are cut into splits, a program attends the query
heads of a KV head over one split, and another merges a query head's splits when all of them have arrived.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
from common.rope import load_rotated


class Span(NamedTuple):
    """The cached positions that a query sees, cut into splits."""

    start: Any  # the first one
    split_size: Any  # positions of a split
    n_splits: Any


@triton.jit
def first_seen(window, position):
    """The first position that a query sees."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@triton.jit
def split_cache(start, position, BUILD: tl.constexpr):
    """The Span of positions `start` to before `position`."""
    ATTENTION: tl.constexpr = BUILD.tuning.attention
    BLOCK_T: tl.constexpr = ATTENTION.block_t
    past = position - start
    split_size = tl.maximum(tl.cdiv(tl.cdiv(past, ATTENTION.max_splits), BLOCK_T) * BLOCK_T, ATTENTION.split_t)
    return Span(start, split_size, tl.maximum(tl.cdiv(past, split_size), 1))


@triton.jit
def load_current(ctx, kv_head, zero, BUILD: tl.constexpr):
    """(keys, values) [N, head_dim] of the current position, rounded to the cache's type; kv_head [N].

    They stay in registers: no program waits for the cache to be appended.
    """
    D: tl.constexpr = BUILD.config.head_dim
    s = ctx.s
    k_ptr = s.qkv + BUILD.config.q_size
    k = load_rotated(k_ptr, kv_head, kv_head >= 0, angles(s.cos, ctx, BUILD), angles(s.sin, ctx, BUILD), D, zero)
    v = tl.load(k_ptr + BUILD.config.kv_size + kv_head[:, None] * D + (tl.arange(0, D) + zero)[None, :])
    return k.to(s.k_cache.dtype.element_ty), v.to(s.v_cache.dtype.element_ty)


@triton.jit
def angles(table_ptr, ctx, BUILD: tl.constexpr):
    """The current position's cosines or sines."""
    HALF: tl.constexpr = BUILD.config.head_dim // 2
    return table_ptr + ctx.position * HALF


@triton.jit
def append_current(ctx, cache, k, v, mask, zero, BUILD: tl.constexpr):
    """Store one of k and v [N, head_dim] in the cache, whose KV head begins at `cache`; mask [N]."""
    D: tl.constexpr = BUILD.config.head_dim
    dim = tl.zeros(k.shape, tl.int32) + (tl.arange(0, D) + zero)[None, :]
    at = cache + ctx.position.to(tl.int64) * D
    tl.store(ctx.s.k_cache + at + dim, k, mask=mask[:, None])
    tl.store(ctx.s.v_cache + at + dim, v, mask=mask[:, None])


@triton.jit
def attend_head(ctx, layer, head, start, BUILD: tl.constexpr):
    """Attend one query head over the keys of all the past that it sees, from `start` on."""
    D: tl.constexpr = BUILD.config.head_dim
    G: tl.constexpr = BUILD.config.n_heads // BUILD.config.n_kv_heads
    T: tl.constexpr = BUILD.tuning.attention.head_block_t
    SLOTS: tl.constexpr = BUILD.tuning.attention.head_slots
    SM_SCALE: tl.constexpr = BUILD.config.sm_scale
    zero = BUILD.machine.opaque_zero()
    s, position = ctx.s, ctx.position
    kv_head = head // G
    cache = (layer * BUILD.config.n_kv_heads + kv_head) * ctx.max_context * D
    k_ptr, v_ptr = s.k_cache + cache, s.v_cache + cache
    # All loads before any sum, as behind one each would cost its latency once more.
    block = load_cache_block(k_ptr, v_ptr, start, position, D, T, SLOTS, zero)
    # Every slot loads the same, since what is in the threads' registers need not be exchanged.
    slot = tl.arange(0, SLOTS) + zero
    heads = head + 0 * slot
    q = load_rotated(s.qkv, heads, heads >= 0, angles(s.cos, ctx, BUILD), angles(s.sin, ctx, BUILD), D, zero)
    new_k, new_v = load_current(ctx, kv_head + 0 * slot, zero, BUILD)
    sink = tl.load(ctx.w.sinks + layer * BUILD.config.n_heads + heads)
    append_current(ctx, cache, new_k, new_v, (slot == 0) & (head % G == 0), zero, BUILD)
    m, l, acc = start_state(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, SM_SCALE, WEIGHT_UNIT)  # noqa: E741
    l, acc = attend_cache_by_head(  # noqa: E741
        m, l, acc, q, block, k_ptr, v_ptr, start, position, SM_SCALE, D, T, SLOTS, zero, WEIGHT_UNIT
    )
    tl.store(s.attention + head * D + zero + tl.arange(0, D), mean_value(l, acc, WEIGHT_UNIT))


@triton.constexpr_function
def parts_of_a_step(attention_tuning, row_bytes: int) -> int:
    """Parts of a step over the keys, 4 at most of wide rows: more would leave a ring too little shared memory."""
    return attention_tuning.parts if row_bytes <= 128 else min(attention_tuning.parts, 4)


@triton.jit
def attend_split(ctx, layer, unit, span, BUILD: tl.constexpr):
    """Attend the query heads of KV head unit // n_splits over the keys of split unit % n_splits."""
    D: tl.constexpr = BUILD.config.head_dim
    G: tl.constexpr = BUILD.config.n_heads // BUILD.config.n_kv_heads
    SM_SCALE: tl.constexpr = BUILD.config.sm_scale
    ATTENTION: tl.constexpr = BUILD.tuning.attention
    BLOCK_G: tl.constexpr = max(ATTENTION.least_group, triton.next_power_of_2(G))
    s, position = ctx.s, ctx.position
    zero = BUILD.machine.opaque_zero()
    ROW_BYTES: tl.constexpr = D * s.k_cache.dtype.element_ty.primitive_bitwidth // 8
    PARTS: tl.constexpr = parts_of_a_step(ATTENTION, ROW_BYTES)
    STAGES: tl.constexpr = ATTENTION.stages if ROW_BYTES <= 256 else 1
    g = tl.arange(0, BLOCK_G) + zero
    dim = tl.arange(0, D) + zero
    kv_head = unit // span.n_splits
    split = unit % span.n_splits
    cache = (layer * BUILD.config.n_kv_heads + kv_head) * ctx.max_context * D
    head = kv_head * G + g
    q = load_rotated(s.qkv, head, g < G, angles(s.cos, ctx, BUILD), angles(s.sin, ctx, BUILD), D, zero)
    new_k, new_v = load_current(ctx, kv_head + tl.arange(0, 1), zero, BUILD)
    sink = tl.load(ctx.w.sinks + layer * BUILD.config.n_heads + head, mask=g < G, other=0.0)
    last = split == span.n_splits - 1
    append_current(ctx, cache, new_k, new_v, last & (tl.arange(0, 1) == 0), zero, BUILD)
    m, l, acc = start_state(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, SM_SCALE, WEIGHT_UNIT)  # noqa: E741
    m, l, acc = keep_state_if(last, m, l, acc)  # noqa: E741
    first = span.start + split * span.split_size
    m, l, acc = attend_cache(  # noqa: E741
        m,
        l,
        acc,
        q,
        s.k_cache + cache,
        s.v_cache + cache,
        first,
        tl.minimum(first + span.split_size, position),
        SM_SCALE,
        D,
        ATTENTION.block_t // ATTENTION.parts * PARTS,
        PARTS,
        ATTENTION.bf16_parts,
        STAGES,
        zero,
        WEIGHT_UNIT,
    )
    if span.n_splits == 1:
        mean = mean_value(l[:, None], acc, WEIGHT_UNIT)
        tl.store(s.attention + head[:, None] * D + dim[None, :], mean, mask=(g < G)[:, None])
    else:
        MACHINE: tl.constexpr = BUILD.machine
        own = (kv_head * ATTENTION.max_splits + split) * BLOCK_G + g
        tl.store(s.split_m + own, m)
        tl.store(s.split_l + own, l)
        tl.store(s.split_acc + own[:, None] * D + dim[None, :], acc)
        count_arrival(s.split_arrivals + kv_head, MACHINE)


@triton.jit
def merge_head(ctx, head, n_splits, barrier, BUILD: tl.constexpr):
    """Merge one query head, when all splits of its KV head are there; gives up as the phase's barrier."""
    D: tl.constexpr = BUILD.config.head_dim
    G: tl.constexpr = BUILD.config.n_heads // BUILD.config.n_kv_heads
    MAX_SPLITS: tl.constexpr = BUILD.tuning.attention.max_splits
    BLOCK_G: tl.constexpr = max(BUILD.tuning.attention.least_group, triton.next_power_of_2(G))
    SPLITS: tl.constexpr = triton.next_power_of_2(MAX_SPLITS)
    SPINS: tl.constexpr = BUILD.tuning.spin_limit
    MACHINE: tl.constexpr = BUILD.machine
    s = ctx.s
    zero = BUILD.machine.opaque_zero()
    kv_head = head // G
    wait_for(s.split_arrivals + kv_head, n_splits, s.sync, barrier, SPINS, MACHINE)
    state = kv_head * (MAX_SPLITS * BLOCK_G) + head % G
    l, acc = merge_splits(  # noqa: E741
        s.split_m + state, s.split_l + state, s.split_acc + state * D, n_splits, BLOCK_G, D, SPLITS, zero
    )
    tl.store(s.attention + head * D + zero + tl.arange(0, D), mean_value(l, acc, WEIGHT_UNIT))
