"""Flash decode with attention sinks: one query position, grouped heads, a KV cache in bfloat16.

The keys of a query are cut into splits that different programs attend; each split leaves the state of an online
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): the largest score m, the sum l of exp(score - m), and the
values weighted by exp(score - m). States merge in a fixed order, so the result does not depend on who ran when.
"""

import triton
import triton.language as tl


@triton.jit
def attend_cache(
    q,
    k_ptr,
    v_ptr,
    start,
    end,
    SM_SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend cached positions start <= t < end of one KV head.

    q float32 [G, HEAD_DIM]; k_ptr, v_ptr bfloat16 [positions, HEAD_DIM]; PRECISION is tl.dot's input_precision.
    Returns the state m [G], l [G], acc [G, HEAD_DIM], float32; with no position at all m is -inf and the rest zero.
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
        k = tl.load(k_ptr + offsets, mask=seen[:, None], other=0.0)
        v = tl.load(v_ptr + offsets, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision=PRECISION) * SM_SCALE
        scores = tl.where(seen[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        p = tl.exp(scores - m_new[:, None])
        keep = tl.exp(m - m_new)
        l = l * keep + tl.sum(p, axis=1)  # noqa: E741
        acc = acc * keep[:, None] + tl.dot(p, v.to(tl.float32), input_precision=PRECISION)
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
def merge_splits(m_ptr, l_ptr, acc_ptr, n_splits, G: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """The state of the keys of n_splits <= SPLITS states together, of which each has at least one key.

    m_ptr and l_ptr float32 [SPLITS, G], acc_ptr float32 [SPLITS, G, HEAD_DIM]; BLOCK_S divides SPLITS.
    """
    g = tl.arange(0, G)
    dim = tl.arange(0, HEAD_DIM)
    every = tl.arange(0, SPLITS)[:, None]
    all_m = tl.load(m_ptr + every * G + g[None, :], mask=every < n_splits, other=float("-inf"))
    all_l = tl.load(l_ptr + every * G + g[None, :], mask=every < n_splits, other=0.0)
    m = tl.max(all_m, axis=0)
    l = tl.sum(all_l * tl.exp(all_m - m[None, :]), axis=0)  # noqa: E741
    acc = tl.zeros([G, HEAD_DIM], tl.float32)
    for first in range(0, n_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        seen = split < n_splits
        states = split[:, None] * G + g[None, :]
        keep = tl.exp(tl.load(m_ptr + states, mask=seen[:, None], other=float("-inf")) - m[None, :])
        part = tl.load(acc_ptr + states[:, :, None] * HEAD_DIM + dim[None, None, :], mask=seen[:, None, None], other=0.0)
        acc += tl.sum(part * keep[:, :, None], axis=0)
    return m, l, acc


@triton.jit
def finish_with_sink(m, l, acc, sink):  # noqa: E741
    """Attention output [G, HEAD_DIM]. The sink [G] is one more logit, which takes weight but has no value."""
    top = tl.maximum(m, sink)
    keep = tl.exp(m - top)
    return acc * (keep / (l * keep + tl.exp(sink - top)))[:, None]
