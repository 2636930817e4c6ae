"""Embedding, QKV, O projection, LM head and the choice of the token. Arguments: see common/phases.py."""

import triton
import triton.language as tl

from common.arch import opaque_zero
from common.argmax import expose_doubt, keep_finite, keep_larger, reduce_argmax
from common.barrier import ABORT
from common.gemv_bf16 import load_lane_vector
from common.gemv_dense import (
    gemv_rows,
    gemv_slot,
    item_bytes,
    load_row_vector,
    load_rows,
    matrix_at,
    row_lanes,
    scales_of,
    vector_unit,
)
from common.prefetch import prefetch_l2
from common.rmsnorm import add_blocks, normed_blocks, rms_rstd, scale_blocks
from common.spread import spread_vector
from common.stream import describe, release, scratch_words, share, take
from common.sums import collect_dense, leave_dense


@triton.jit
def embed_token(w, s, token, pid, n_programs, CONFIG: tl.constexpr, BLOCK_H: tl.constexpr):
    """The residual stream = the token's embedding."""
    H: tl.constexpr = CONFIG.hidden_size
    if pid == 0:
        h = tl.arange(0, BLOCK_H)
        row = tl.load(w.embed + token.to(tl.int64) * H + h, mask=h < H, other=0.0)
        tl.store(s.x + h, row.to(tl.float32), mask=h < H)
        for slot in range(CONFIG.experts_per_token):
            tl.store(s.expert_out + slot * H + h, tl.zeros([BLOCK_H], tl.float32), mask=h < H)


@triton.jit
def load_dense_vector(x_ptr, K: tl.constexpr, FORMAT: tl.constexpr, TUNING: tl.constexpr, zero):
    """x [K] times vector_unit as blocks, in the order of the tiles of a dense matrix of that format."""
    if TUNING.ring_slots > 0:
        LANES: tl.constexpr = row_lanes(K, FORMAT, TUNING)
        x = load_lane_vector(x_ptr, K, LANES, 32 * TUNING.num_warps // LANES, 16 // item_bytes(FORMAT))
    else:
        x = load_row_vector(x_ptr, K, TUNING.dense_k, FORMAT, zero)
    if FORMAT != "bf16":
        x = scale_blocks(x, vector_unit(FORMAT))
    return x


@triton.jit
def load_normed(s, norm_ptr, stream, FORMAT: tl.constexpr, CONFIG: tl.constexpr, TUNING: tl.constexpr, zero):
    """(the residual's RMSNorm but for a factor, as load_dense_vector; what a product with it is to be multiplied by).

    The residual is x plus what the experts left.
    """
    H: tl.constexpr = CONFIG.hidden_size
    ARCH: tl.constexpr = TUNING.arch
    x = load_once(s.x, H, FORMAT, TUNING, zero)
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    for slot in tl.static_range(TOP_K):
        x = add_blocks(x, load_once(s.expert_out + slot * H, H, FORMAT, TUNING, zero))
    rstd = rms_rstd(x, H, CONFIG.rms_norm_eps)
    x, factor = normed_blocks(x, load_once(norm_ptr, H, FORMAT, TUNING, zero), rstd, vector_unit(FORMAT))
    if TUNING.ring_slots > 0:
        LANES: tl.constexpr = row_lanes(H, FORMAT, TUNING)
        EACH: tl.constexpr = 16 // item_bytes(FORMAT)
        WORDS: tl.constexpr = scratch_words(CONFIG, TUNING)
        x = spread_vector(stream.scratch, x, H, LANES, 32 * TUNING.num_warps // LANES, EACH, WORDS, ARCH)
    return x, factor


@triton.jit
def load_once(x_ptr, K: tl.constexpr, FORMAT: tl.constexpr, TUNING: tl.constexpr, zero):
    """x [K] as blocks, each element once; see spread_vector where rows come through a ring."""
    if TUNING.ring_slots > 0:
        return load_lane_vector(x_ptr, K, 32 * TUNING.num_warps, 1, 4)
    else:
        return load_row_vector(x_ptr, K, TUNING.dense_k, FORMAT, zero)


@triton.jit
def first_dense_rows(
    matrix, row0, end_row, K: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr, TUNING: tl.constexpr
):
    """What a dense phase's multiply_rows begins with, to be loaded before the phase may begin; () but for prefetch."""
    ARCH: tl.constexpr = TUNING.arch
    if TUNING.prefetch:
        return load_rows(matrix[0], matrix[1], row0, end_row, K, M, TUNING.dense_k, FORMAT, opaque_zero(ARCH))
    else:
        return ()


@triton.jit
def multiply_rows(
    tile,
    stream,
    plan,
    x,
    w,
    matrix,
    row0,
    end_row,
    pid,
    n_programs,
    K: tl.constexpr,
    M: tl.constexpr,
    FORMAT: tl.constexpr,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
):
    """(rows row0 .. row0 + TUNING.dense_batch * M of a dense matrix times x, what follows `tile`, the stream).

    Streamed, the rows are the next units of the stream; with prefetch they are `tile`; else they are loaded.
    """
    ARCH: tl.constexpr = TUNING.arch
    if TUNING.ring_slots > 0:
        BATCH: tl.constexpr = TUNING.dense_batch
        if FORMAT == "fp8-row":
            row = row0 + tl.arange(0, BATCH * M)
            scales = tl.load(matrix[1] + row, mask=row < end_row, other=0.0)
        stream = describe(stream, plan, w, pid, n_programs, CONFIG, TUNING)
        for n in range(tl.minimum(tl.cdiv(end_row - row0, M), BATCH)):
            pieces, stream = take(stream, 0, TUNING)
            mine = gemv_slot(pieces, x, end_row - row0 - n * M, K, M, FORMAT, ARCH)
            stream = release(stream, CONFIG, TUNING)
            leave_dense(stream.scratch, n, mine, BATCH, ARCH)
        y = collect_dense(stream.scratch, BATCH * M, x[0].shape[1] // 32, ARCH)
        if FORMAT == "fp8-row":
            y *= scales
        return y, tile, stream
    else:
        zero = opaque_zero(ARCH)
        if TUNING.prefetch:
            rows = tile
            tile = load_rows(matrix[0], matrix[1], row0 + M, end_row, K, M, TUNING.dense_k, FORMAT, zero)
        else:
            rows = load_rows(matrix[0], matrix[1], row0, end_row, K, M, TUNING.dense_k, FORMAT, zero)
        return gemv_rows(rows, x, FORMAT, ARCH), tile, stream


@triton.jit
def row_share(pid, n_programs, ROWS: tl.constexpr, M: tl.constexpr):
    """(first, end) of the rows of a dense matrix that a program takes, whole tiles of M but for the last of all."""
    first, end = share(tl.cdiv(ROWS, M), pid, n_programs)
    return first * M, tl.minimum(end * M, ROWS)


@triton.jit
def qkv_matrix(w, layer, CONFIG: tl.constexpr):
    """(a layer's matrix, its scales)."""
    FORMAT: tl.constexpr = CONFIG.dense.qkv
    matrix = matrix_at(w.qkv, layer, CONFIG.qkv_size, CONFIG.hidden_size, FORMAT)
    return matrix, scales_of(w.qkv_scales, layer, CONFIG.qkv_size, CONFIG.hidden_size, FORMAT)


@triton.jit
def first_qkv_tile(w, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """What qkv_phase begins with."""
    M: tl.constexpr = TUNING.qkv_m
    first, end = row_share(pid, n_programs, CONFIG.qkv_size, M)
    FORMAT: tl.constexpr = CONFIG.dense.qkv
    return first_dense_rows(qkv_matrix(w, layer, CONFIG), first, end, CONFIG.hidden_size, M, FORMAT, TUNING)


@triton.jit
def prefetch_qkv(w, layer, PLACE: tl.constexpr, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Ask for a piece of this program's share of a layer's QKV weights: number PLACE, counted from the share's end.

    Little at a time: what has been asked for holds up all that comes after it, barriers too.
    """
    ARCH: tl.constexpr = TUNING.arch
    if TUNING.prefetch_small and PLACE == 0:
        if pid == n_programs - 1:
            prefetch_l2(w.attn_norm + layer * CONFIG.hidden_size, CONFIG.hidden_size * 4, ARCH)
            prefetch_l2(w.qkv_bias + layer * CONFIG.qkv_size, CONFIG.qkv_size * 2, ARCH)
    if TUNING.prefetch_qkv > 0:
        ROW_BYTES: tl.constexpr = CONFIG.hidden_size * item_bytes(CONFIG.dense.qkv)
        first, end = row_share(pid, n_programs, CONFIG.qkv_size, TUNING.qkv_m)
        n_bytes = (end - first) * ROW_BYTES * TUNING.prefetch_qkv // 16 & -16
        at = w.qkv.to(tl.int64) + (layer * CONFIG.qkv_size + end) * ROW_BYTES
        prefetch_l2(at - (PLACE + 1) * n_bytes, n_bytes, ARCH)


@triton.jit
def qkv_phase(w, s, layer, tile, stream, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """qkv = W_qkv @ rmsnorm(residual) + b. Returns the stream.

    tile: first_qkv_tile; stream and plan: see multiply_rows.
    """
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    ROWS: tl.constexpr = CONFIG.qkv_size
    M: tl.constexpr = TUNING.qkv_m
    STEP: tl.constexpr = TUNING.dense_batch * M
    FORMAT: tl.constexpr = CONFIG.dense.qkv
    x, factor = load_normed(s, w.attn_norm + layer * H, stream, FORMAT, CONFIG, TUNING, zero)
    matrix = qkv_matrix(w, layer, CONFIG)
    first, end = row_share(pid, n_programs, ROWS, M)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        # Before the sum, as behind it the bias would cost its latency once more.
        bias = tl.load(w.qkv_bias + layer * ROWS + row, mask=row < end, other=0.0).to(tl.float32)
        y, tile, stream = multiply_rows(
            tile, stream, plan, x, w, matrix, row0, end, pid, n_programs, H, M, FORMAT, CONFIG, TUNING
        )
        tl.store(s.qkv + row, y * factor + bias, mask=row < end)
    return stream


@triton.jit
def o_matrix(w, layer, CONFIG: tl.constexpr):
    """(a layer's matrix, its scales)."""
    FORMAT: tl.constexpr = CONFIG.dense.o
    matrix = matrix_at(w.o, layer, CONFIG.hidden_size, CONFIG.q_size, FORMAT)
    return matrix, scales_of(w.o_scales, layer, CONFIG.hidden_size, CONFIG.q_size, FORMAT)


@triton.jit
def first_o_tile(w, layer, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """What o_phase begins with."""
    M: tl.constexpr = TUNING.o_m
    first, end = row_share(pid, n_programs, CONFIG.hidden_size, M)
    FORMAT: tl.constexpr = CONFIG.dense.o
    return first_dense_rows(o_matrix(w, layer, CONFIG), first, end, CONFIG.q_size, M, FORMAT, TUNING)


@triton.jit
def o_phase(w, s, layer, tile, stream, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """x = residual + W_o @ attention + b. Returns the stream.

    tile: first_o_tile; stream and plan: see multiply_rows.
    """
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    K: tl.constexpr = CONFIG.q_size
    M: tl.constexpr = TUNING.o_m
    STEP: tl.constexpr = TUNING.dense_batch * M
    TOP_K: tl.constexpr = CONFIG.experts_per_token
    FORMAT: tl.constexpr = CONFIG.dense.o
    a = load_dense_vector(s.attention, K, FORMAT, TUNING, zero)
    matrix = o_matrix(w, layer, CONFIG)
    if pid == n_programs - 1:
        kv_head = tl.arange(0, triton.next_power_of_2(CONFIG.n_kv_heads))
        tl.store(s.split_arrivals + kv_head, 0, mask=kv_head < CONFIG.n_kv_heads)  # none is waited for any more
    first, end = row_share(pid, n_programs, H, M)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        x = tl.load(s.x + row, mask=row < end, other=0.0)
        for slot in tl.static_range(TOP_K):
            x += tl.load(s.expert_out + slot * H + row, mask=row < end, other=0.0)
        x += tl.load(w.o_bias + layer * H + row, mask=row < end, other=0.0).to(tl.float32)
        y, tile, stream = multiply_rows(
            tile, stream, plan, a, w, matrix, row0, end, pid, n_programs, K, M, FORMAT, CONFIG, TUNING
        )
        tl.store(s.x + row, x + y * (1.0 / vector_unit(FORMAT)), mask=row < end)
    return stream


@triton.jit
def head_phase(w, s, want_logits, stream, plan, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """Each program's largest logit of W_head @ rmsnorm(residual); the logits themselves only when asked for.

    Its index is NOT_FINITE if any of the program's logits is not finite.
    """
    ARCH: tl.constexpr = TUNING.arch
    zero = opaque_zero(ARCH)
    H: tl.constexpr = CONFIG.hidden_size
    M: tl.constexpr = TUNING.head_m
    STEP: tl.constexpr = TUNING.dense_batch * M
    first, end = row_share(pid, n_programs, CONFIG.vocab_size, M)
    FORMAT: tl.constexpr = CONFIG.dense.head
    matrix = (w.lm_head, w.lm_head_scales)
    tile = first_dense_rows(matrix, first, end, H, M, FORMAT, TUNING)
    x, factor = load_normed(s, w.final_norm, stream, FORMAT, CONFIG, TUNING, zero)
    best = tl.full([STEP], float("-inf"), tl.float32)
    best_index = tl.zeros([STEP], tl.int32)
    doubt = tl.zeros([STEP], tl.float32)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        y, tile, stream = multiply_rows(
            tile, stream, plan, x, w, matrix, row0, end, pid, n_programs, H, M, FORMAT, CONFIG, TUNING
        )
        logits = y * factor
        if want_logits:
            tl.store(s.logits + row, logits, mask=row < end)
        best, best_index = keep_larger(best, best_index, tl.where(row < end, logits, float("-inf")), row)
        doubt = keep_finite(doubt, tl.where(row < end, logits, 0.0))
    best, best_index = expose_doubt(best, best_index, doubt)
    value, index = reduce_argmax(best, best_index)
    tl.store(s.head_value + pid, value)
    tl.store(s.head_index + pid, index)


@triton.jit
def argmax_phase(s, position, pid, n_programs, BLOCK_P: tl.constexpr):
    """tokens[position + 1] = index of the largest logit, or NOT_FINITE, unless a barrier gave up."""
    if pid == 0:
        program = tl.arange(0, BLOCK_P)
        value = tl.load(s.head_value + program, mask=program < n_programs, other=float("-inf"))
        index = tl.load(s.head_index + program, mask=program < n_programs, other=0x7FFFFFFF)
        _, token = reduce_argmax(value, index)
        if tl.load(s.sync + ABORT) == 0:  # otherwise -1 stays there
            tl.store(s.tokens + position + 1, token)
