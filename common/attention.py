"""Flash decode with attention sinks: one query position, grouped heads, a KV cache in bfloat16.

The keys of a query are cut into splits that different programs attend; each split leaves the state of an online
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): the largest score m, the sum l of exp(score - m), and the
values weighted by exp(score - m), times a power of two, UNIT, that keeps the sum of large values finite. States merge
in a fixed order, so the result does not depend on who ran when.
"""

import triton
import triton.language as tl

NO_SCORE = tl.constexpr(-3.4028234663852886e38)  # the least float32: a part may have seen no position
# Of the kernels' weights: the sum of 2^20 values, each as large as float32 allows, times this is finite.
WEIGHT_UNIT = tl.constexpr(2.0**-20)


@triton.jit
def start_state(q, k, v, sink, SM_SCALE: tl.constexpr, UNIT: tl.constexpr = 1.0):
    """The state m [G], l [G], acc [G, HEAD_DIM] of one key and value, held in registers, and of the sinks.

    q, k and v float32 [G, HEAD_DIM], or k and v [1, HEAD_DIM]; sink float32 [G], one more logit, which takes weight but
    has no value.
    """
    score = tl.sum(q * k, axis=1) * SM_SCALE
    m = tl.maximum(score, sink)
    p = tl.exp(score - m)
    return m, p + tl.exp(sink - m), (p * UNIT)[:, None] * v


@triton.jit
def mean_value(l, acc, UNIT: tl.constexpr):  # noqa: E741
    """The mean of the values of a state, by their weights; l and acc have one shape or broadcast."""
    return acc / l * (1.0 / UNIT)


@triton.jit
def keep_state_if(condition, m, l, acc):  # noqa: E741
    """The state, or the one of no key at all."""
    return tl.where(condition, m, NO_SCORE), tl.where(condition, l, 0.0), tl.where(condition, acc, 0.0)


@triton.jit
def attend_cache(
    m,
    l,  # noqa: E741
    acc,
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
    STAGES: tl.constexpr = 1,
    zero=0,
    UNIT: tl.constexpr = 1.0,
):
    """Add cached positions start <= t < end of one KV head to the state m [G], l [G], acc [G, HEAD_DIM] of its heads.

    q float32 [G, HEAD_DIM]; k_ptr, v_ptr bfloat16 [positions, HEAD_DIM], or float32. A step of BLOCK_T positions has
    PARTS equal parts, each of which has a state of its own until the end: with one a warp, no step waits for others.
    With STAGES > 1 the loads of as many steps but one are under way ahead.
    """
    G: tl.constexpr = q.shape[0]
    SHARE: tl.constexpr = BLOCK_T // PARTS
    first = tl.arange(0, PARTS)[:, None] == 0
    m = tl.broadcast_to(m[None, :], (PARTS, G))
    l = tl.where(first, l[None, :], 0.0)  # noqa: E741
    acc = tl.where(first[:, :, None], acc[None, :, :], 0.0)
    dim = tl.arange(0, HEAD_DIM) + zero
    position = tl.arange(0, PARTS)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    IN_BF16: tl.constexpr = BF16_PARTS and k_ptr.dtype.element_ty == tl.bfloat16
    queries = _left(tl.broadcast_to(q[None, :, :], (PARTS, G, HEAD_DIM)) * SM_SCALE, IN_BF16)
    for t0 in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        seen = t0 + position < end
        offsets = (t0 + position)[:, :, None] * HEAD_DIM + dim[None, None, :]
        k = tl.load(k_ptr + offsets, mask=seen[:, :, None], other=0.0)
        v = tl.load(v_ptr + offsets, mask=seen[:, :, None], other=0.0)
        scores = _product(queries, tl.permute(k, (0, 2, 1)), IN_BF16)
        scores = tl.where(seen[:, None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=2))
        p = tl.exp(scores - m_new[:, :, None])
        keep = tl.exp(m - m_new)
        l = l * keep + tl.sum(p, axis=2)  # noqa: E741
        acc = acc * keep[:, :, None] + _product(_left(p * UNIT, IN_BF16), v, IN_BF16)
        m = m_new
    m_all = tl.max(m, axis=0)
    keep = tl.exp(m - m_all[None, :])
    return m_all, tl.sum(l * keep, axis=0), tl.sum(acc * keep[:, :, None], axis=0)


@triton.jit
def _left(a, IN_BF16: tl.constexpr):
    """A product's left operand, float32 [B, M, K]; IN_BF16 makes it bfloat16 [B, 4 * M, K].

    Those are three matrices that add up to it and one of zeros, stacked: one matrix product to float32's precision on
    matrix cores that know no float32.
    """
    if IN_BF16:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        parts = tl.join(tl.join(high, middle), tl.join(low, tl.zeros_like(low)))
        return tl.reshape(tl.permute(parts, (0, 4, 3, 1, 2)), (a.shape[0], 4 * a.shape[1], a.shape[2]))
    else:
        return a


@triton.jit
def _product(left, b, IN_BF16: tl.constexpr):
    """What _left made of float32 [B, M, K], times b [B, K, N]: float32 [B, M, N]."""
    if IN_BF16:
        products = tl.dot(left, b, out_dtype=tl.float32)
        return tl.sum(tl.reshape(products, (left.shape[0], 4, left.shape[1] // 4, b.shape[2])), axis=1)
    else:
        return tl.dot(left, b.to(tl.float32), input_precision="ieee")


@triton.jit
def load_cache_block(k_ptr, v_ptr, t0, end, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, SLOTS: tl.constexpr, zero=0):
    """(keys, values) of positions t0 <= t < t0 + BLOCK_T below end, as words [SLOTS, BLOCK_T / SLOTS, HEAD_DIM / 2].

    A word is two neighbours along HEAD_DIM: in the loop that carries a block from step to step it stays what was
    loaded, where bfloat16 would be unpacked, and so waited for, at once.
    """
    WORD: tl.constexpr = tl.int32 if k_ptr.dtype.element_ty == tl.bfloat16 else tl.int64
    t = t0 + _slot_positions(BLOCK_T, SLOTS)
    offsets = t[:, :, None] * (HEAD_DIM // 2) + (tl.arange(0, HEAD_DIM // 2) + zero)[None, None, :]
    seen = (t < end)[:, :, None]
    k = tl.load(k_ptr.to(tl.pointer_type(WORD)) + offsets, mask=seen, other=0)
    return k, tl.load(v_ptr.to(tl.pointer_type(WORD)) + offsets, mask=seen, other=0)


@triton.jit
def _slot_positions(BLOCK_T: tl.constexpr, SLOTS: tl.constexpr):
    return tl.arange(0, SLOTS)[:, None] + tl.arange(0, BLOCK_T // SLOTS)[None, :] * SLOTS


@triton.jit
def _unpack(words):
    """float32 [SLOTS, ROWS, HEAD_DIM] of a block's words."""
    if words.dtype == tl.int32:
        low, high = words << 16, words & -65536
    else:
        low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    pairs = tl.join(low, high).to(tl.float32, bitcast=True)
    return tl.reshape(pairs, (words.shape[0], words.shape[1], 2 * words.shape[2]))


@triton.jit
def attend_cache_by_head(
    m,
    l,  # noqa: E741
    acc,
    q,
    block,
    k_ptr,
    v_ptr,
    start,
    end,
    SM_SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SLOTS: tl.constexpr,
    zero=0,
    UNIT: tl.constexpr = 1.0,
):
    """attend_cache for one query head and few positions: float32 products, made for a short way through.

    The state that comes is m and l [SLOTS], acc [SLOTS, HEAD_DIM], the same in all slots, and q has acc's shape;
    `block` is load_cache_block of `start`. Returned are l [HEAD_DIM], the same in all elements, and acc [HEAD_DIM],
    relative to the same maximum.

    Number t of a step's positions belongs to slot t % SLOTS, and each slot has a state of its own until the end. With
    as many slots as the threads load rows at a time, a step exchanges nothing but the sums over HEAD_DIM, between the
    few threads that share a row.
    """
    first = tl.arange(0, SLOTS) == 0
    l = tl.where(first, l, 0.0)  # noqa: E741
    acc = tl.where(first[:, None], acc, 0.0)
    q *= SM_SCALE
    k, v = block
    for t0 in tl.range(start, end, BLOCK_T, num_stages=1):
        following = load_cache_block(k_ptr, v_ptr, t0 + BLOCK_T, end, HEAD_DIM, BLOCK_T, SLOTS, zero)
        scores = tl.sum(_unpack(k) * q[:, None, :], axis=2)
        scores = tl.where(t0 + _slot_positions(BLOCK_T, SLOTS) < end, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        p = tl.exp(scores - m_new[:, None])
        keep = tl.exp(m - m_new)
        l = l * keep + tl.sum(p, axis=1)  # noqa: E741
        acc = acc * keep[:, None] + tl.sum((p * UNIT)[:, :, None] * _unpack(v), axis=1)
        m = m_new
        k, v = following
    keep = tl.exp(m - tl.max(m, axis=0))
    # One sum for both, as each is a way through shared memory.
    l = tl.broadcast_to((l * keep)[:, None], (SLOTS, HEAD_DIM))  # noqa: E741
    acc, l = tl.split(tl.sum(tl.join(acc * keep[:, None], l), axis=0))  # noqa: E741
    return l, acc


@triton.jit
def merge_splits(
    m_ptr, l_ptr, acc_ptr, n_splits, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, zero=0
):
    """l and acc [HEAD_DIM] of one head, of the keys of n_splits <= SPLITS states, of which each has at least one key.

    The states are STRIDE apart: m_ptr and l_ptr float32 [SPLITS, STRIDE], acc_ptr float32 [SPLITS, STRIDE, HEAD_DIM].
    """
    split = tl.arange(0, SPLITS) + zero
    seen = split < n_splits
    dim = tl.arange(0, HEAD_DIM) + zero
    parts = tl.load(acc_ptr + split[:, None] * (STRIDE * HEAD_DIM) + dim[None, :], mask=seen[:, None], other=0.0)
    m = tl.load(m_ptr + split * STRIDE, mask=seen, other=float("-inf"))
    l = tl.load(l_ptr + split * STRIDE, mask=seen, other=0.0)  # noqa: E741
    keep = tl.exp(m - tl.max(m, axis=0))
    return tl.sum(l * keep, axis=0), tl.sum(parts * keep[:, None], axis=0)
