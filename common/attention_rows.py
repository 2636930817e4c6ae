"""Attention of many query positions over a KV cache that holds their keys, causal, with sinks and sliding window.

The query heads of a KV head stand side by side in one matrix product, BLOCK_M // group positions at a time, so that
a key is read once for all of them. The softmax is the online one of attention.py, to the base 2.
"""

import triton
import triton.language as tl

from common.attention import WEIGHT_UNIT, mean_value
from common.parts import two_parts

LOG2_E = tl.constexpr(1.4426950408889634)
# In place of larger sinks, infinite ones among them, which to the base 2 would leave float32. Where q k is finite a
# score is smaller, so that such a sink keeps all weight, or none.
MOST_SINK = tl.constexpr(2.3e38)


@triton.jit
def attend_rows(
    q,
    q_position,
    sink,
    k_ptr,
    v_ptr,
    start,
    end,
    window,
    SM_SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """softmax(q k) v, float32 [M, HEAD_DIM], of cached positions start <= t < end up to each query's own.

    q float32 [M, HEAD_DIM], rotated, at q_position [M], which is at least `start`; sink float32 [M], one more logit;
    window: positions that a query sees, its own included, or 0 for all; k_ptr, v_ptr bfloat16 [positions, HEAD_DIM], or
    float32.
    """
    IN_BF16: tl.constexpr = k_ptr.dtype.element_ty == tl.bfloat16
    M: tl.constexpr = q.shape[0]
    q *= SM_SCALE * LOG2_E
    m = tl.clamp(sink, -MOST_SINK, MOST_SINK, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
    l = tl.full([M], 1.0, tl.float32)  # noqa: E741
    acc = tl.zeros([M, HEAD_DIM], tl.float32)
    queries = _left(q, IN_BF16)
    first_seen = tl.where(window > 0, q_position - window + 1, 0)
    dim = tl.arange(0, HEAD_DIM)[None, :]
    for t0 in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        t = t0 + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None] * HEAD_DIM + dim
        k = tl.load(k_ptr + at, mask=(t < end)[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=(t < end)[:, None], other=0.0)
        scores = _product(queries, tl.trans(k), tl.zeros([M, BLOCK_T], tl.float32), IN_BF16)
        seen = (t[None, :] <= q_position[:, None]) & (t[None, :] >= first_seen[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))  # finite, as the sink is
        p = tl.exp2(scores - m_new[:, None])
        keep = tl.exp2(m - m_new)
        l = l * keep + tl.sum(p, axis=1)  # noqa: E741
        acc = _product(_left(p * WEIGHT_UNIT, IN_BF16), v, acc * keep[:, None], IN_BF16)
        m = m_new
    return mean_value(l[:, None], acc, WEIGHT_UNIT)


@triton.jit
def _left(a, IN_BF16: tl.constexpr):
    if IN_BF16:
        return two_parts(a)
    else:
        return (a,)


@triton.jit
def _product(left, b, acc, IN_BF16: tl.constexpr):
    """acc plus what _left made of a matrix times b."""
    if IN_BF16:
        acc = tl.dot(left[0], b, acc)
        return tl.dot(left[1], b, acc)
    else:
        return tl.dot(left[0], b, acc, input_precision="ieee")
