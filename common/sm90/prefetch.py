"""Prefetches into the L2 cache of what does not come through the ring."""

import triton
import triton.language as tl

from common.decode_attention import first_seen, split_cache
from common.gemv_dense import item_bytes
from common.sm90.ptx import prefetch_l2
from common.work import share_rows


@triton.jit
def ask_small(ctx, layer, window, BUILD: tl.constexpr):
    """Ask for this program's split of the KV cache, and for the small vectors that the next three phases read."""
    CONFIG: tl.constexpr = BUILD.config
    H: tl.constexpr = CONFIG.hidden_size
    D: tl.constexpr = CONFIG.head_dim
    w, s, program = ctx.w, ctx.s, ctx.program
    KV_BYTES: tl.constexpr = s.k_cache.dtype.element_ty.primitive_bitwidth // 8
    span = split_cache(first_seen(window, ctx.position), ctx.position, BUILD)
    if program < CONFIG.n_kv_heads * span.n_splits:
        first = span.first + (program % span.n_splits) * span.split_size
        n_bytes = tl.minimum(span.split_size, ctx.position - first) * (D * KV_BYTES)
        offset = ((layer * CONFIG.n_kv_heads + program // span.n_splits) * ctx.max_context + first) * D
        prefetch_l2(s.k_cache + offset, n_bytes)
        prefetch_l2(s.v_cache + offset, n_bytes)
    if program == ctx.n_programs - 1:
        prefetch_l2(w.sinks + layer * CONFIG.n_heads, CONFIG.n_heads * 4)
        prefetch_l2(w.o_bias + layer * H, H * 2)
        prefetch_l2(w.mlp_norm + layer * H, H * 4)
        prefetch_l2(w.router_bias + layer * CONFIG.n_experts, CONFIG.n_experts * 2)
    for row in range(program, CONFIG.n_experts, ctx.n_programs):
        prefetch_l2(w.router + (layer * CONFIG.n_experts + row) * (H // 2), H * 2)


@triton.jit
def ask_part_of_qkv(ctx, layer, PART: tl.constexpr, BUILD: tl.constexpr):
    """Ask for part number PART, from the end, of this program's rows of a layer's QKV weights.

    The parts are small, as requests delay all later ones, also those of barriers.
    """
    CONFIG: tl.constexpr = BUILD.config
    MATRIX: tl.constexpr = BUILD.qkv
    SIXTEENTHS: tl.constexpr = BUILD.tuning.ring.prefetch_qkv
    if PART == 0:
        if ctx.program == ctx.n_programs - 1:
            prefetch_l2(ctx.w.attn_norm + layer * CONFIG.hidden_size, CONFIG.hidden_size * 4)
            prefetch_l2(ctx.w.qkv_bias + layer * MATRIX.rows, MATRIX.rows * 2)
    if SIXTEENTHS > 0:
        ROW_BYTES: tl.constexpr = MATRIX.k * item_bytes(MATRIX.format)
        first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
        n_bytes = (end - first) * ROW_BYTES * SIXTEENTHS // 16 & -16
        end_ptr = ctx.w.qkv.to(tl.int64) + (layer * MATRIX.rows + end) * ROW_BYTES
        prefetch_l2(end_ptr - (PART + 1) * n_bytes, n_bytes)
