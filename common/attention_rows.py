"""Attention of many query positions over a KV cache that holds their keys, causal, with sinks and sliding window.

The query heads of a KV head are rows of one matrix product, BLOCK_M // group positions at a time, so that a key is read
once for all of them. The softmax is the online one of attention.py, to the base 2.
"""

import triton
import triton.language as tl

from common.attention import WEIGHT_PRESCALE, mean_value
from common.operands import bf16_pair

LOG2_E = tl.constexpr(1.4426950408889634)
# Larger sinks, also infinite ones, are clamped to this, as to the base 2 they would leave float32. Any score is smaller
# where q k is finite, so that such a sink keeps all weight, or none.
MAX_SINK = tl.constexpr(2.3e38)


@triton.jit
def attend_rows(
    q, q_position, sink, keys, window, SM_SCALE: tl.constexpr, BLOCK_KEYS: tl.constexpr, STAGES: tl.constexpr
):
    """Return softmax(q k) v, float32 [M, HEAD_DIM], over a KV head's Keys up to each query's own position.

    q float32 [M, HEAD_DIM] is rotated, for q_position [M], which is at least keys.first; sink float32 [M] is one more
    logit; a query sees `window` positions, its own included, or all with 0. Keys are multiplied BLOCK_KEYS at a time.
    """
    IN_BF16: tl.constexpr = keys.k_ptr.dtype.element_ty == tl.bfloat16
    M: tl.constexpr = q.shape[0]
    HEAD_DIM: tl.constexpr = q.shape[1]
    q *= SM_SCALE * LOG2_E
    largest = tl.clamp(sink, -MAX_SINK, MAX_SINK, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
    total = tl.full([M], 1.0, tl.float32)
    acc = tl.zeros([M, HEAD_DIM], tl.float32)
    queries = _bf16_terms(q, IN_BF16)
    first_seen = tl.where(window > 0, q_position - window + 1, 0)
    dim = tl.arange(0, HEAD_DIM)[None, :]
    for step0 in tl.range(keys.first, keys.end, BLOCK_KEYS, num_stages=STAGES):
        position = step0 + tl.arange(0, BLOCK_KEYS)
        offset = position.to(tl.int64)[:, None] * HEAD_DIM + dim
        k = tl.load(keys.k_ptr + offset, mask=(position < keys.end)[:, None], other=0.0)
        v = tl.load(keys.v_ptr + offset, mask=(position < keys.end)[:, None], other=0.0)
        scores = _add_product(queries, tl.trans(k), tl.zeros([M, BLOCK_KEYS], tl.float32), IN_BF16)
        seen = (position[None, :] <= q_position[:, None]) & (position[None, :] >= first_seen[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))  # finite, as the sink is
        p = tl.exp2(scores - new_largest[:, None])
        keep = tl.exp2(largest - new_largest)
        total = total * keep + tl.sum(p, axis=1)
        acc = _add_product(_bf16_terms(p * WEIGHT_PRESCALE, IN_BF16), v, acc * keep[:, None], IN_BF16)
        largest = new_largest
    return mean_value(total[:, None], acc, WEIGHT_PRESCALE)


@triton.jit
def _bf16_terms(a, IN_BF16: tl.constexpr):
    """Return a product's left operand as a tuple of matrices that add up to it."""
    if IN_BF16:
        return bf16_pair(a)
    else:
        return (a,)


@triton.jit
def _add_product(terms, b, acc, IN_BF16: tl.constexpr):
    """Return acc + a @ b of terms = _bf16_terms(a)."""
    if IN_BF16:
        acc = tl.dot(terms[0], b, acc)
        return tl.dot(terms[1], b, acc)
    else:
        return tl.dot(terms[0], b, acc, input_precision="ieee")
