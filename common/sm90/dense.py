"""Products of one vector with dense matrices whose tiles come through the ring."""

import triton
import triton.language as tl

from common.experts import no_choice
from common.gemv_dense import vector_prescale
from common.rmsnorm import add_blocks, normed_blocks, rms_rstd, scale_blocks
from common.sm90.feed import describe, release, scratch_words, take
from common.sm90.gemv import elements_per_load, load_thread_vector, multiply_rows, row_threads
from common.sm90.spread import spread_vector
from common.sm90.sums import collect_dense, leave_dense


@triton.jit
def load_vector(x_ptr, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return x float32 [k] times vector_prescale as the threads that multiply a matrix's rows hold it."""
    THREADS: tl.constexpr = row_threads(MATRIX.k, MATRIX.format, BUILD.tuning.dense)
    COPIES: tl.constexpr = 32 * BUILD.tuning.num_warps // THREADS
    x = load_thread_vector(x_ptr, MATRIX.k, THREADS, COPIES, elements_per_load(MATRIX.format))
    if MATRIX.format != "bf16":
        x = scale_blocks(x, vector_prescale(MATRIX.format))
    return x


@triton.jit
def load_once(x_ptr, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return x float32 [k], each element in one thread."""
    return load_thread_vector(x_ptr, MATRIX.k, 32 * BUILD.tuning.num_warps, 1, 4)


@triton.jit
def load_normed(ctx, norm_ptr, feed, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return (blocks as load_vector's, factor): the factor makes their product that of the residual's RMSNorm.

    The residual is x plus what the experts left.
    """
    N_OUTS: tl.constexpr = BUILD.config.experts_per_token
    H: tl.constexpr = BUILD.config.hidden_size
    x = load_once(ctx.s.x, MATRIX, BUILD)
    for n in tl.static_range(N_OUTS):
        x = add_blocks(x, load_once(ctx.s.expert_out + n * H, MATRIX, BUILD))
    rstd = rms_rstd(x, H, BUILD.config.rms_norm_eps)
    x, factor = normed_blocks(x, load_once(norm_ptr, MATRIX, BUILD), rstd, vector_prescale(MATRIX.format))
    THREADS: tl.constexpr = row_threads(MATRIX.k, MATRIX.format, BUILD.tuning.dense)
    COPIES: tl.constexpr = 32 * BUILD.tuning.num_warps // THREADS
    WORDS: tl.constexpr = scratch_words(BUILD)
    return spread_vector(feed.scratch, x, H, THREADS, COPIES, elements_per_load(MATRIX.format), WORDS), factor


@triton.jit
def multiply(ctx, feed, x, matrix, row0, end_row, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return (rows row0 .. of the next tiles of the feed times x, the feed); a step has up to step_tiles tiles."""
    TILES: tl.constexpr = BUILD.tuning.dense.step_tiles
    M: tl.constexpr = MATRIX.tile_rows
    if MATRIX.format == "fp8-row":
        row = row0 + tl.arange(0, TILES * M)
        scales = tl.load(matrix.scales_ptr + row, mask=row < end_row, other=0.0)
    feed = describe(ctx, no_choice().experts, feed, BUILD)
    for n in range(tl.minimum(tl.cdiv(end_row - row0, M), TILES)):
        address, feed = take(feed, BUILD)
        acc = multiply_rows(address, x, end_row - row0 - n * M, MATRIX)
        feed = release(feed, BUILD)
        leave_dense(feed.scratch, n, acc, TILES)
    y = collect_dense(feed.scratch, TILES * M, x[0].shape[1] // 32)
    if MATRIX.format == "fp8-row":
        y *= scales
    return y, feed
