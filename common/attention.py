"""Flash decode with attention sinks: one query position, grouped heads, a KV cache in bfloat16.

The keys of a query are cut into splits that different programs attend; each split leaves the state of an online
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): the largest score m, the sum l of exp(score - m), and the
values weighted by exp(score - m). States merge in a fixed order, so the result does not depend on who ran when.
"""

import triton
import triton.language as tl


@triton.jit
def attend_cache(q, k_ptr, v_ptr, start, end, SM_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr):
    """Attend cached positions start <= t < end of one KV head.

    q float32 [G, HEAD_DIM]; k_ptr, v_ptr bfloat16 [positions, HEAD_DIM]. Returns the state m [G], l [G],
    acc [G, HEAD_DIM], float32; with no position at all m is -inf and the rest zero.
    """
    G: tl.constexpr = q.shape[0]
    m = tl.full([G], float("-inf"), tl.float32)
    l = tl.zeros([G], tl.float32)  # noqa: E741 - the softmax literature's name
    acc = tl.zeros([G, HEAD_DIM], tl.float32)
    dim = tl.arange(0, HEAD_DIM)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        seen = t < end
        offsets = t[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(k_ptr + offsets, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offsets, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SM_SCALE
        scores = tl.where(seen[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        p = tl.exp(scores - m_new[:, None])
        keep = tl.exp(m - m_new)
        l = l * keep + tl.sum(p, axis=1)  # noqa: E741
        acc = acc * keep[:, None] + tl.dot(p, v, input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit
def attend_one(m, l, acc, q, k, v, SM_SCALE: tl.constexpr):  # noqa: E741
    """Add one key and value, float32 [HEAD_DIM], held in registers, to the state."""
    score = tl.sum(q * k[None, :], axis=1) * SM_SCALE
    m_new = tl.maximum(m, score)
    keep, p = tl.exp(m - m_new), tl.exp(score - m_new)
    return m_new, l * keep + p, acc * keep[:, None] + p[:, None] * v[None, :]


@triton.jit
def merge_states(m_a, l_a, acc_a, m_b, l_b, acc_b):
    """The state of two disjoint sets of keys together; each has at least one key."""
    m = tl.maximum(m_a, m_b)
    keep_a, keep_b = tl.exp(m_a - m), tl.exp(m_b - m)
    return m, l_a * keep_a + l_b * keep_b, acc_a * keep_a[:, None] + acc_b * keep_b[:, None]


@triton.jit
def finish_with_sink(m, l, acc, sink):  # noqa: E741
    """Attention output [G, HEAD_DIM]. The sink [G] is one more logit, which takes weight but has no value."""
    top = tl.maximum(m, sink)
    keep = tl.exp(m - top)
    return acc * (keep / (l * keep + tl.exp(sink - top)))[:, None]
