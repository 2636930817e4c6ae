"""Flash decode with attention sinks: one query position, grouped heads, a KV cache in bfloat16.

The keys of a query are cut into splits that different programs attend; each split leaves the state of an online
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): the largest score m, the sum l of exp(score - m), and the
values weighted by exp(score - m). States merge in a fixed order, so the result does not depend on who ran when.
"""

import triton
import triton.language as tl

NO_SCORE = tl.constexpr(-1e30)  # below any score, yet finite: a part may have seen no position


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
    PARTS: tl.constexpr,
    BF16_PARTS: tl.constexpr,
    zero=0,
):
    """Attend cached positions start <= t < end of one KV head.

    q float32 [G, HEAD_DIM]; k_ptr, v_ptr bfloat16 [positions, HEAD_DIM], or float32. Returns the state m [G], l [G],
    acc [G, HEAD_DIM], float32; with no position at all m is -inf and the rest zero. A step of BLOCK_T positions has
    PARTS equal parts, each of which has a state of its own until the end: with one a warp, no step waits for others.
    """
    G: tl.constexpr = q.shape[0]
    SHARE: tl.constexpr = BLOCK_T // PARTS
    m = tl.full([PARTS, G], NO_SCORE, tl.float32)
    l = tl.zeros([PARTS, G], tl.float32)  # noqa: E741 - the softmax literature's name
    acc = tl.zeros([PARTS, G, HEAD_DIM], tl.float32)
    dim = tl.arange(0, HEAD_DIM) + zero
    position = tl.arange(0, PARTS)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    queries = tl.broadcast_to(q[None, :, :], (PARTS, G, HEAD_DIM)) * SM_SCALE
    for t0 in tl.range(start, end, BLOCK_T, num_stages=1):
        seen = t0 + position < end
        offsets = (t0 + position)[:, :, None] * HEAD_DIM + dim[None, None, :]
        k = tl.load(k_ptr + offsets, mask=seen[:, :, None], other=0.0)
        v = tl.load(v_ptr + offsets, mask=seen[:, :, None], other=0.0)
        scores = _dot(queries, tl.permute(k, (0, 2, 1)), BF16_PARTS)
        scores = tl.where(seen[:, None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=2))
        p = tl.exp(scores - m_new[:, :, None])
        keep = tl.exp(m - m_new)
        l = l * keep + tl.sum(p, axis=2)  # noqa: E741
        acc = acc * keep[:, :, None] + _dot(p, v, BF16_PARTS)
        m = m_new
    m_all = tl.max(m, axis=0)
    keep = tl.exp(m - m_all[None, :])
    l = tl.sum(l * keep, axis=0)  # noqa: E741
    return tl.where(l > 0, m_all, float("-inf")), l, tl.sum(acc * keep[:, :, None], axis=0)


@triton.jit
def _dot(a, b, BF16_PARTS: tl.constexpr):
    """float32 a [B, M, K] times b [B, K, N], to float32's precision.

    With BF16_PARTS and bfloat16 b, a becomes three bfloat16 matrices that add up to it, stacked: one matrix product on
    matrix cores that know no float32.
    """
    if BF16_PARTS and b.dtype == tl.bfloat16:
        B: tl.constexpr = a.shape[0]
        M: tl.constexpr = a.shape[1]
        K: tl.constexpr = a.shape[2]
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        parts = tl.join(tl.join(high, middle), tl.join(low, tl.zeros_like(low)))
        parts = tl.reshape(tl.permute(parts, (0, 4, 3, 1, 2)), (B, 4 * M, K))
        products = tl.dot(parts, b, out_dtype=tl.float32)
        return tl.sum(tl.reshape(products, (B, 4, M, b.shape[2])), axis=1)
    else:
        return tl.dot(a, b.to(tl.float32), input_precision="ieee")


@triton.jit
def attend_one(m, l, acc, q, k, v, SM_SCALE: tl.constexpr):  # noqa: E741
    """Add one key and value, float32 [HEAD_DIM], held in registers, to the state."""
    score = tl.sum(q * k[None, :], axis=1) * SM_SCALE
    m_new = tl.maximum(m, score)
    keep, p = tl.exp(m - m_new), tl.exp(score - m_new)
    return m_new, l * keep + p, acc * keep[:, None] + p[:, None] * v[None, :]


@triton.jit
def merge_splits(
    m_ptr,
    l_ptr,
    acc_ptr,
    n_splits,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    zero=0,
):
    """The state of the keys of n_splits <= SPLITS states together, of which each has at least one key.

    m_ptr and l_ptr float32 [SPLITS, G], acc_ptr float32 [SPLITS, G, HEAD_DIM]; BLOCK_S divides SPLITS.
    """
    g = tl.arange(0, G)
    dim = tl.arange(0, HEAD_DIM) + zero
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
        part = tl.load(
            acc_ptr + states[:, :, None] * HEAD_DIM + dim[None, None, :], mask=seen[:, None, None], other=0.0
        )
        acc += tl.sum(part * keep[:, :, None], axis=0)
    return m, l, acc


@triton.jit
def finish_with_sink(m, l, acc, sink):  # noqa: E741
    """Attention output [G, HEAD_DIM]. The sink [G] is one more logit, which takes weight but has no value."""
    top = tl.maximum(m, sink)
    keep = tl.exp(m - top)
    return acc * (keep / (l * keep + tl.exp(sink - top)))[:, None]
