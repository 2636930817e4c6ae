"""Flash decode with attention sinks: one query position, grouped heads, a KV cache in bfloat16.

The keys of a query are cut into splits that different programs attend; each split leaves the state of an online
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). States merge in a fixed order, so the result does not depend
on which program finishes first.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

NO_SCORE = tl.constexpr(-3.4028234663852886e38)  # the least float32: a partial softmax may have seen no position
# The kernels' PRESCALE: the sum of 2^20 values, each as large as float32 allows, times this is finite.
WEIGHT_PRESCALE = tl.constexpr(2.0**-20)


class Keys(NamedTuple):
    """Cached keys and values of one KV head: bfloat16 or float32 [positions, head_dim], attended from first to end."""

    k_ptr: Any
    v_ptr: Any
    first: Any
    end: Any


class Softmax(NamedTuple):
    """The state of an online softmax over the scores seen so far, or pointers to such states."""

    largest: Any  # the largest score
    total: Any  # the sum of exp(score - largest)
    acc: Any  # values weighted by exp(score - largest) times PRESCALE, a power of two that keeps large sums finite


@dataclass(frozen=True)
class KeyStep:
    """How attend_cache walks through the keys."""

    size: int  # positions of a step
    partial_softmaxes: int  # equal shares of a step that each keep a state until the end: one a warp, or one for all
    bf16x3: bool  # float32 operands of products with bfloat16 keys and values as three bfloat16 terms
    stages: int = 1  # steps in flight: the loads of all but one run ahead


@triton.jit
def start_softmax(q, k, v, sink, SM_SCALE: tl.constexpr, PRESCALE: tl.constexpr = 1.0):
    """Return the Softmax [G], [G], [G, HEAD_DIM] of the sinks and one key and value, held in registers.

    q, k and v are float32 [G, HEAD_DIM], or k and v [1, HEAD_DIM]. sink float32 [G] is one more logit, which takes
    weight but has no value.
    """
    score = tl.sum(q * k, axis=1) * SM_SCALE
    largest = tl.maximum(score, sink)
    p = tl.exp(score - largest)
    return Softmax(largest, p + tl.exp(sink - largest), (p * PRESCALE)[:, None] * v)


@triton.jit
def mean_value(total, acc, PRESCALE: tl.constexpr):
    """Return the weighted mean of a Softmax's values; total and acc have one shape or broadcast."""
    return acc / total * (1.0 / PRESCALE)


@triton.jit
def keep_softmax_if(condition, state):
    """Return the Softmax `state` where `condition` holds, else the one that has seen no score."""
    largest, total, acc = state
    return Softmax(
        tl.where(condition, largest, NO_SCORE), tl.where(condition, total, 0.0), tl.where(condition, acc, 0.0)
    )


@triton.jit
def attend_cache(state, q, keys, STEP: tl.constexpr, SM_SCALE: tl.constexpr, zero=0, PRESCALE: tl.constexpr = 1.0):
    """Add the Keys of one KV head to the Softmax [G], [G], [G, HEAD_DIM] of its query heads.

    q is float32 [G, HEAD_DIM], STEP a KeyStep. `zero`: see Machine.opaque_zero. With one partial softmax a warp, no
    step waits for another warp.
    """
    G: tl.constexpr = q.shape[0]
    HEAD_DIM: tl.constexpr = q.shape[1]
    PARTIALS: tl.constexpr = STEP.partial_softmaxes
    SHARE: tl.constexpr = STEP.size // PARTIALS
    is_first = tl.arange(0, PARTIALS)[:, None] == 0
    largest = tl.broadcast_to(state.largest[None, :], (PARTIALS, G))
    total = tl.where(is_first, state.total[None, :], 0.0)
    acc = tl.where(is_first[:, :, None], state.acc[None, :, :], 0.0)
    dim = tl.arange(0, HEAD_DIM) + zero
    position = tl.arange(0, PARTIALS)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    BF16X3: tl.constexpr = STEP.bf16x3 and keys.k_ptr.dtype.element_ty == tl.bfloat16
    queries = _stack_bf16_terms(tl.broadcast_to(q[None, :, :], (PARTIALS, G, HEAD_DIM)) * SM_SCALE, BF16X3)
    for step0 in tl.range(keys.first, keys.end, STEP.size, num_stages=STEP.stages):
        seen = step0 + position < keys.end
        offsets = (step0 + position)[:, :, None] * HEAD_DIM + dim[None, None, :]
        k = tl.load(keys.k_ptr + offsets, mask=seen[:, :, None], other=0.0)
        v = tl.load(keys.v_ptr + offsets, mask=seen[:, :, None], other=0.0)
        scores = _multiply_bf16_terms(queries, tl.permute(k, (0, 2, 1)), BF16X3)
        scores = tl.where(seen[:, None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=2))
        p = tl.exp(scores - new_largest[:, :, None])
        keep = tl.exp(largest - new_largest)
        total = total * keep + tl.sum(p, axis=2)
        acc = acc * keep[:, :, None] + _multiply_bf16_terms(_stack_bf16_terms(p * PRESCALE, BF16X3), v, BF16X3)
        largest = new_largest
    merged = tl.max(largest, axis=0)
    keep = tl.exp(largest - merged[None, :])
    return Softmax(merged, tl.sum(total * keep, axis=0), tl.sum(acc * keep[:, :, None], axis=0))


@triton.jit
def _stack_bf16_terms(a, BF16X3: tl.constexpr):
    """Return a product's left operand, float32 [B, M, K], with BF16X3 as bfloat16 [B, 4 * M, K].

    Those are three matrices that add up to it and one of zeros, stacked: one matrix product to float32's precision on
    matrix cores without float32.
    """
    if BF16X3:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        terms = tl.join(tl.join(high, middle), tl.join(low, tl.zeros_like(low)))
        return tl.reshape(tl.permute(terms, (0, 4, 3, 1, 2)), (a.shape[0], 4 * a.shape[1], a.shape[2]))
    else:
        return a


@triton.jit
def _multiply_bf16_terms(left, b, BF16X3: tl.constexpr):
    """Return a @ b, float32 [B, M, N], of left = _stack_bf16_terms(a) and b [B, K, N]."""
    if BF16X3:
        products = tl.dot(left, b, out_dtype=tl.float32)
        return tl.sum(tl.reshape(products, (left.shape[0], 4, left.shape[1] // 4, b.shape[2])), axis=1)
    else:
        return tl.dot(left, b.to(tl.float32), input_precision="ieee")


@triton.jit
def load_cache_block(keys, first, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS_PER_LOAD: tl.constexpr, zero=0):
    """Return (keys, values) of BLOCK positions from `first` on as words [ROWS_PER_LOAD, loads, HEAD_DIM / 2].

    Position number i of the block is row i % ROWS_PER_LOAD of load i // ROWS_PER_LOAD; positions from keys.end on are
    zeros. A word is two neighbours along HEAD_DIM: the loop that carries a block from step to step holds what was
    loaded, where bfloat16 would be unpacked, and so waited for, at once.
    """
    WORD: tl.constexpr = tl.int32 if keys.k_ptr.dtype.element_ty == tl.bfloat16 else tl.int64
    position = first + _block_positions(BLOCK, ROWS_PER_LOAD)
    offsets = position[:, :, None] * (HEAD_DIM // 2) + (tl.arange(0, HEAD_DIM // 2) + zero)[None, None, :]
    seen = (position < keys.end)[:, :, None]
    k = tl.load(keys.k_ptr.to(tl.pointer_type(WORD)) + offsets, mask=seen, other=0)
    return k, tl.load(keys.v_ptr.to(tl.pointer_type(WORD)) + offsets, mask=seen, other=0)


@triton.jit
def _block_positions(BLOCK: tl.constexpr, ROWS_PER_LOAD: tl.constexpr):
    """Return the number within its block of each position, [ROWS_PER_LOAD, loads]."""
    return tl.arange(0, ROWS_PER_LOAD)[:, None] + tl.arange(0, BLOCK // ROWS_PER_LOAD)[None, :] * ROWS_PER_LOAD


@triton.jit
def _unpack(words):
    """Return float32 [ROWS_PER_LOAD, loads, HEAD_DIM] of a block's words."""
    if words.dtype == tl.int32:
        low, high = words << 16, words & -65536
    else:
        low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    pairs = tl.join(low, high).to(tl.float32, bitcast=True)
    return tl.reshape(pairs, (words.shape[0], words.shape[1], 2 * words.shape[2]))


@triton.jit
def attend_cache_by_head(state, q, block, keys, SM_SCALE: tl.constexpr, zero=0, PRESCALE: tl.constexpr = 1.0):
    """Attend one query head over few Keys with float32 products and low latency; return (total, acc) [HEAD_DIM] each.

    `block` is load_cache_block of keys.first, whose size is a step's. `state` is the Softmax [ROWS_PER_LOAD],
    [ROWS_PER_LOAD], [ROWS_PER_LOAD, HEAD_DIM] to start from, the same in all rows, and q has acc's shape. In the result
    all elements of total are equal, and relative to the same maximum as acc.

    Each row of a load has a partial softmax until the end. With as many rows as the threads load at a time, a step
    exchanges nothing but the sums over HEAD_DIM, between the few threads that share a row.
    """
    k, v = block
    ROWS: tl.constexpr = q.shape[0]
    HEAD_DIM: tl.constexpr = q.shape[1]
    BLOCK: tl.constexpr = ROWS * k.shape[1]
    is_first = tl.arange(0, ROWS) == 0
    largest = state.largest
    total = tl.where(is_first, state.total, 0.0)
    acc = tl.where(is_first[:, None], state.acc, 0.0)
    q *= SM_SCALE
    for step0 in tl.range(keys.first, keys.end, BLOCK, num_stages=1):
        following = load_cache_block(keys, step0 + BLOCK, HEAD_DIM, BLOCK, ROWS, zero)
        scores = tl.sum(_unpack(k) * q[:, None, :], axis=2)
        scores = tl.where(step0 + _block_positions(BLOCK, ROWS) < keys.end, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        p = tl.exp(scores - new_largest[:, None])
        keep = tl.exp(largest - new_largest)
        total = total * keep + tl.sum(p, axis=1)
        acc = acc * keep[:, None] + tl.sum((p * PRESCALE)[:, :, None] * _unpack(v), axis=1)
        largest = new_largest
        k, v = following
    keep = tl.exp(largest - tl.max(largest, axis=0))
    # One sum for both, as each goes through shared memory once.
    total = tl.broadcast_to((total * keep)[:, None], (ROWS, HEAD_DIM))
    acc, total = tl.split(tl.sum(tl.join(acc * keep[:, None], total), axis=0))
    return total, acc


@triton.jit
def merge_splits(states, n_splits, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, zero=0):
    """Merge one head's states of n_splits <= SPLITS splits, each with at least one key; return (total, acc [HEAD_DIM]).

    `states` is a Softmax of pointers to states STRIDE apart: float32 [SPLITS, STRIDE], [SPLITS, STRIDE] and
    [SPLITS, STRIDE, HEAD_DIM].
    """
    split = tl.arange(0, SPLITS) + zero
    seen = split < n_splits
    dim = tl.arange(0, HEAD_DIM) + zero
    acc = tl.load(states.acc + split[:, None] * (STRIDE * HEAD_DIM) + dim[None, :], mask=seen[:, None], other=0.0)
    largest = tl.load(states.largest + split * STRIDE, mask=seen, other=float("-inf"))
    total = tl.load(states.total + split * STRIDE, mask=seen, other=0.0)
    keep = tl.exp(largest - tl.max(largest, axis=0))
    return tl.sum(total * keep, axis=0), tl.sum(acc * keep[:, None], axis=0)
