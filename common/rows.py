"""Matrices whose rows are read straight from memory when a phase multiplies them: on gfx950 and in the interpreter."""

import triton
import triton.language as tl

from common import fp4
from common.build import Operand
from common.experts import element
from common.gemv_dense import gemv_rows, load_row_vector, load_rows, vector_prescale
from common.gemv_fp4 import fp4_vector_prescale, gemv_fp4, gemv_fp4_fp8
from common.machine import Experts
from common.quant import GROUP, quantize_mxfp8
from common.rmsnorm import add_blocks, largest_magnitude, normed_blocks, rms_rstd, scale_blocks

# ---------------------------------------------------------------- dense matrices


@triton.jit
def load_vector(x_ptr, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return x float32 [k] times vector_prescale as blocks, as gemv_rows takes it."""
    x = load_row_vector(x_ptr, MATRIX, BUILD.machine.opaque_zero())
    if MATRIX.format != "bf16":
        x = scale_blocks(x, vector_prescale(MATRIX.format))
    return x


@triton.jit
def load_normed(ctx, norm_ptr, feed, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return (blocks as load_vector's, factor): the factor makes their product that of the residual's RMSNorm.

    The residual is x plus what the experts left.
    """
    N_OUTS: tl.constexpr = BUILD.config.experts_per_token
    H: tl.constexpr = BUILD.config.hidden_size
    zero = BUILD.machine.opaque_zero()
    x = load_row_vector(ctx.s.x, MATRIX, zero)
    for n in tl.static_range(N_OUTS):
        x = add_blocks(x, load_row_vector(ctx.s.expert_out + n * H, MATRIX, zero))
    rstd = rms_rstd(x, H, BUILD.config.rms_norm_eps)
    return normed_blocks(x, load_row_vector(norm_ptr, MATRIX, zero), rstd, vector_prescale(MATRIX.format))


@triton.jit
def load_tile(matrix, row0, end_row, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return a tile of a dense matrix from row0 on, as gemv_rows takes it."""
    return load_rows(matrix, row0, end_row, MATRIX, BUILD.machine.opaque_zero())


@triton.jit
def multiply(ctx, feed, x, matrix, row0, end_row, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return (the rows of the tile at row0 times x, the feed)."""
    MACHINE: tl.constexpr = BUILD.machine
    return gemv_rows(load_tile(matrix, row0, end_row, MATRIX, BUILD), x, MATRIX, MACHINE), feed


# ---------------------------------------------------------------- experts


@triton.jit
def store_activations(x_ptr, scale_ptr, x, first, SIZE: tl.constexpr, QUANTIZE: tl.constexpr):
    """Store float32 x [N] as elements first .. of a vector [SIZE]; with QUANTIZE as MXFP8, where N is whole groups."""
    N: tl.constexpr = x.shape[0]
    i = first + tl.arange(0, N)
    if QUANTIZE:
        elements, scale = quantize_mxfp8(tl.reshape(x, (N // GROUP, GROUP)))
        tl.store(x_ptr + i, tl.reshape(elements, (N,)), mask=i < SIZE)
        group = tl.arange(0, N // GROUP) + first // GROUP
        tl.store(scale_ptr + group, scale, mask=group < SIZE // GROUP)
    else:
        tl.store(x_ptr + i, x, mask=i < SIZE)


@triton.jit
def store_input(s, block, normed, x, factor, BUILD: tl.constexpr):
    """Store a block of the experts' input, normed, in State s.

    x * factor is all of the input, whose largest element sets the prescale.
    """
    if not BUILD.quant:
        prescale, scale = fp4_vector_prescale(largest_magnitude(x) * factor)
        normed *= prescale
        if block == 0:  # the same for all
            tl.store(s.expert_in_scale, scale)
    first = block * BUILD.tuning.experts.norm_block
    store_activations(s.expert_in, s.expert_in_scale, normed, first, BUILD.config.hidden_size, BUILD.quant)


@triton.jit
def load_input(ctx, BUILD: tl.constexpr):
    """Return (Operand of the experts' input, which a product loads itself; the factor that such a product lacks)."""
    vector = Operand(ctx.s.expert_in, ctx.s.expert_in_scale)
    if BUILD.quant:
        return vector, 1.0
    else:
        return vector, tl.load(ctx.s.expert_in_scale)


@triton.jit
def store_act(ctx, rank, i, act, BUILD: tl.constexpr):
    """Store activations i, float32 [n], of one expert; rank [n] is the same in all, and i [n] rises by one."""
    K: tl.constexpr = BUILD.config.intermediate_size
    expert_rank, first = tl.max(rank, axis=0), tl.min(i, axis=0)
    scale_ptr = ctx.s.expert_act_scale + expert_rank * (K // GROUP)
    store_activations(ctx.s.expert_act + expert_rank * K, scale_ptr, act, first, K, BUILD.quant)


@triton.jit
def load_act(ctx, rank, BUILD: tl.constexpr):
    """Return the Operand of an expert's activations, which a product loads itself."""
    K: tl.constexpr = BUILD.config.intermediate_size
    return Operand(ctx.s.expert_act + rank * K, ctx.s.expert_act_scale + rank * (K // GROUP))


@triton.jit
def multiply_expert(ctx, layer, feed, choice, vector, tiles, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return (even rows, odd rows, the feed) of one tile of an expert's matrix times a vector.

    Rows are float32 [tile_rows / 2] each.
    """
    EXPERTS: tl.constexpr = BUILD.machine.experts
    ROWS: tl.constexpr = MATRIX.rows
    K: tl.constexpr = MATRIX.k
    M: tl.constexpr = MATRIX.tile_rows
    index = layer * BUILD.config.n_experts + element(choice.experts, tiles.rank)
    if MATRIX.name == "gate_up":
        blocks_ptr, scales_ptr = ctx.w.gate_up, ctx.w.gate_up_scales
    else:
        blocks_ptr, scales_ptr = ctx.w.down, ctx.w.down_scales
    matrix = Operand(blocks_ptr + index * (ROWS * (K // 8)), scales_ptr + index * (ROWS * (K // GROUP)))
    row0 = tiles.first * M
    if BUILD.quant:
        y = gemv_fp4_fp8(matrix, vector, row0, MATRIX, EXPERTS, BUILD.tuning.experts.dot_scaled)
    else:
        y = gemv_fp4(matrix, vector.ptr, row0, MATRIX, EXPERTS)
    even, odd = tl.split(tl.reshape(y, (M // 2, 2)))
    return even, odd, feed


# ---------------------------------------------------------------- a feed that asks for nothing


@triton.jit
def open_feed(ctx, BUILD: tl.constexpr):
    """Return an empty feed, as nothing is asked for ahead."""
    return ()


@triton.jit
def open_phase(ctx, layer, MATRIX: tl.constexpr, choice, BUILD: tl.constexpr):
    """Return an empty feed, as nothing is asked for ahead."""
    return ()


@triton.jit
def extend(ctx, layer, feed):
    """Return the feed unchanged."""
    return feed


@triton.jit
def ask_nothing(ctx, layer, feed, BUILD: tl.constexpr):
    """Return the feed unchanged."""
    return feed


@triton.jit
def ask_no_experts(ctx, choice, feed, BUILD: tl.constexpr):
    """Return the feed unchanged."""
    return feed


@triton.jit
def ask_no_head(ctx, feed, BUILD: tl.constexpr):
    """Return the feed unchanged."""
    return feed


@triton.jit
def ask_nothing_small(ctx, layer, window, BUILD: tl.constexpr):
    """Ask for nothing."""


@triton.jit
def ask_no_part(ctx, layer, PART: tl.constexpr, BUILD: tl.constexpr):
    """Ask for nothing."""


EXPERTS = Experts(
    is_packed=False,
    store_input=store_input,
    load_input=load_input,
    store_act=store_act,
    load_act=load_act,
    multiply=multiply_expert,
    e2m1_words_to_float32=fp4.e2m1_words_to_float32,
    e2m1_half_bias=fp4.HALF_BIAS.value,
)
