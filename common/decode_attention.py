"""Attention of one query position: RoPE, appending to the cache, and which program attends which keys.

Over few keys a program attends one query head. Over many the keys of a KV head are cut into splits: a program attends
all query heads of a KV head over one split, and another merges a query head's splits when all of them have arrived.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.attention import (
    WEIGHT_PRESCALE,
    Keys,
    KeyStep,
    Softmax,
    attend_cache,
    attend_cache_by_head,
    keep_softmax_if,
    load_cache_block,
    mean_value,
    merge_splits,
    start_softmax,
)
from common.barrier import count_arrival, wait_for
from common.rope import load_rotated


class Span(NamedTuple):
    """The cached positions that a query sees, cut into splits."""

    first: Any
    split_size: Any  # positions of a split
    n_splits: Any


@triton.jit
def first_seen(window, position):
    """Return the first position that a query sees; a window of 0 means all."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@triton.jit
def split_cache(first, position, BUILD: tl.constexpr):
    """Return the Span of the positions from `first` to before `position`."""
    ATTENTION: tl.constexpr = BUILD.tuning.attention
    STEP: tl.constexpr = ATTENTION.step_keys
    past = position - first
    split_size = tl.maximum(tl.cdiv(tl.cdiv(past, ATTENTION.max_splits), STEP) * STEP, ATTENTION.min_split_keys)
    return Span(first, split_size, tl.maximum(tl.cdiv(past, split_size), 1))


@triton.jit
def load_current(ctx, kv_head, zero, BUILD: tl.constexpr):
    """Return (keys, values) [N, head_dim] of the current position, rounded to the cache's type; kv_head is [N].

    They stay in registers, so that no program waits for the cache to be appended.
    """
    D: tl.constexpr = BUILD.config.head_dim
    s = ctx.s
    k_ptr = s.qkv + BUILD.config.q_size
    k = load_rotated(k_ptr, kv_head, kv_head >= 0, angles(s.cos, ctx, BUILD), angles(s.sin, ctx, BUILD), D, zero)
    v = tl.load(k_ptr + BUILD.config.kv_size + kv_head[:, None] * D + (tl.arange(0, D) + zero)[None, :])
    return k.to(s.k_cache.dtype.element_ty), v.to(s.v_cache.dtype.element_ty)


@triton.jit
def angles(table_ptr, ctx, BUILD: tl.constexpr):
    """Return the pointer to the current position's cosines or sines [head_dim / 2] in a table of them."""
    HALF: tl.constexpr = BUILD.config.head_dim // 2
    return table_ptr + ctx.position * HALF


@triton.jit
def append_current(ctx, cache, k, v, mask, zero, BUILD: tl.constexpr):
    """Store one of k and v [N, head_dim] in the cache, whose KV head begins at offset `cache`; mask [N] picks it."""
    D: tl.constexpr = BUILD.config.head_dim
    dim = tl.zeros(k.shape, tl.int32) + (tl.arange(0, D) + zero)[None, :]
    offset = cache + ctx.position.to(tl.int64) * D
    tl.store(ctx.s.k_cache + offset + dim, k, mask=mask[:, None])
    tl.store(ctx.s.v_cache + offset + dim, v, mask=mask[:, None])


@triton.jit
def attend_head(ctx, layer, head, first, BUILD: tl.constexpr):
    """Attend one query head over all the keys that it sees, from position `first` on."""
    D: tl.constexpr = BUILD.config.head_dim
    G: tl.constexpr = BUILD.config.n_heads // BUILD.config.n_kv_heads
    BLOCK: tl.constexpr = BUILD.tuning.attention.head_step_keys
    ROWS_PER_LOAD: tl.constexpr = BUILD.tuning.attention.rows_per_load
    SM_SCALE: tl.constexpr = BUILD.config.sm_scale
    zero = BUILD.machine.opaque_zero()
    s, position = ctx.s, ctx.position
    kv_head = head // G
    cache = (layer * BUILD.config.n_kv_heads + kv_head) * ctx.max_context * D
    keys = Keys(s.k_cache + cache, s.v_cache + cache, first, position)
    # All loads before any sum, as behind one each would cost its latency once more.
    block = load_cache_block(keys, first, D, BLOCK, ROWS_PER_LOAD, zero)
    # Every row loads the same, since what is in the threads' registers need not be exchanged.
    row = tl.arange(0, ROWS_PER_LOAD) + zero
    heads = head + 0 * row
    q = load_rotated(s.qkv, heads, heads >= 0, angles(s.cos, ctx, BUILD), angles(s.sin, ctx, BUILD), D, zero)
    new_k, new_v = load_current(ctx, kv_head + 0 * row, zero, BUILD)
    sink = tl.load(ctx.w.sinks + layer * BUILD.config.n_heads + heads)
    append_current(ctx, cache, new_k, new_v, (row == 0) & (head % G == 0), zero, BUILD)
    state = start_softmax(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, SM_SCALE, WEIGHT_PRESCALE)
    total, acc = attend_cache_by_head(state, q, block, keys, SM_SCALE, zero, WEIGHT_PRESCALE)
    tl.store(s.attention + head * D + zero + tl.arange(0, D), mean_value(total, acc, WEIGHT_PRESCALE))


@triton.constexpr_function
def key_step(attention_tuning, row_bytes: int) -> KeyStep:
    """Return the KeyStep for a cache with rows of so many bytes.

    Wide rows get shorter steps, of at most 4 partial softmaxes, and the widest no loads ahead: more would leave a ring
    too little shared memory.
    """
    partials = attention_tuning.partial_softmaxes
    share = attention_tuning.step_keys // partials
    partials = partials if row_bytes <= 128 else min(partials, 4)
    stages = attention_tuning.stages if row_bytes <= 256 else 1
    return KeyStep(share * partials, partials, attention_tuning.bf16x3, stages)


@triton.jit
def attend_split(ctx, layer, item, span, BUILD: tl.constexpr):
    """Attend the query heads of KV head item // n_splits over the keys of split item % n_splits."""
    D: tl.constexpr = BUILD.config.head_dim
    G: tl.constexpr = BUILD.config.n_heads // BUILD.config.n_kv_heads
    SM_SCALE: tl.constexpr = BUILD.config.sm_scale
    ATTENTION: tl.constexpr = BUILD.tuning.attention
    BLOCK_G: tl.constexpr = max(ATTENTION.min_query_rows, triton.next_power_of_2(G))
    s, position = ctx.s, ctx.position
    zero = BUILD.machine.opaque_zero()
    STEP: tl.constexpr = key_step(ATTENTION, D * s.k_cache.dtype.element_ty.primitive_bitwidth // 8)
    g = tl.arange(0, BLOCK_G) + zero
    dim = tl.arange(0, D) + zero
    kv_head = item // span.n_splits
    split = item % span.n_splits
    cache = (layer * BUILD.config.n_kv_heads + kv_head) * ctx.max_context * D
    head = kv_head * G + g
    q = load_rotated(s.qkv, head, g < G, angles(s.cos, ctx, BUILD), angles(s.sin, ctx, BUILD), D, zero)
    new_k, new_v = load_current(ctx, kv_head + tl.arange(0, 1), zero, BUILD)
    sink = tl.load(ctx.w.sinks + layer * BUILD.config.n_heads + head, mask=g < G, other=0.0)
    is_last = split == span.n_splits - 1
    append_current(ctx, cache, new_k, new_v, is_last & (tl.arange(0, 1) == 0), zero, BUILD)
    state = start_softmax(q, new_k.to(tl.float32), new_v.to(tl.float32), sink, SM_SCALE, WEIGHT_PRESCALE)
    state = keep_softmax_if(is_last, state)
    first = span.first + split * span.split_size
    keys = Keys(s.k_cache + cache, s.v_cache + cache, first, tl.minimum(first + span.split_size, position))
    state = attend_cache(state, q, keys, STEP, SM_SCALE, zero, WEIGHT_PRESCALE)
    if span.n_splits == 1:
        mean = mean_value(state.total[:, None], state.acc, WEIGHT_PRESCALE)
        tl.store(s.attention + head[:, None] * D + dim[None, :], mean, mask=(g < G)[:, None])
    else:
        MACHINE: tl.constexpr = BUILD.machine
        offset = (kv_head * ATTENTION.max_splits + split) * BLOCK_G + g
        tl.store(s.split_m + offset, state.largest)
        tl.store(s.split_l + offset, state.total)
        tl.store(s.split_acc + offset[:, None] * D + dim[None, :], state.acc)
        count_arrival(s.split_arrivals + kv_head, MACHINE)


@triton.jit
def merge_head(ctx, head, n_splits, barrier, BUILD: tl.constexpr):
    """Merge one query head's splits when all those of its KV head have arrived; a wait in vain aborts as `barrier`."""
    D: tl.constexpr = BUILD.config.head_dim
    G: tl.constexpr = BUILD.config.n_heads // BUILD.config.n_kv_heads
    MAX_SPLITS: tl.constexpr = BUILD.tuning.attention.max_splits
    BLOCK_G: tl.constexpr = max(BUILD.tuning.attention.min_query_rows, triton.next_power_of_2(G))
    SPLITS: tl.constexpr = triton.next_power_of_2(MAX_SPLITS)
    SPINS: tl.constexpr = BUILD.tuning.spin_limit
    SYNC: tl.constexpr = BUILD.machine.sync
    s = ctx.s
    zero = BUILD.machine.opaque_zero()
    kv_head = head // G
    wait_for(s.split_arrivals + kv_head, n_splits, s.sync, barrier, SPINS, SYNC)
    offset = kv_head * (MAX_SPLITS * BLOCK_G) + head % G
    states = Softmax(s.split_m + offset, s.split_l + offset, s.split_acc + offset * D)
    total, acc = merge_splits(states, n_splits, BLOCK_G, D, SPLITS, zero)
    tl.store(s.attention + head * D + zero + tl.arange(0, D), mean_value(total, acc, WEIGHT_PRESCALE))
