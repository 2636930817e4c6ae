"""Rows of an MXFP4 matrix times a vector, accumulated in float32.

Blocks are int32 words [rows, K / 8], eight E2M1 elements each; scales are E8M0 bytes [rows, K / 32].
`gemv_fp4` takes float32 activations, `gemv_fp4_fp8` MXFP8 ones. The latter computes the same numbers in two ways:
`tl.dot_scaled`, which gfx950 runs on its scaled matrix cores, or dequantized float32 products, which are exact too.
"""

import triton
import triton.language as tl

from common.quant import GROUP, e8m0_halves, e8m0_to_float32

MAX_MAGNITUDE = tl.constexpr(2.0**60)  # of a float32 vector, so that its elements times 2^63 are finite
DOWN = tl.constexpr(2.0**-68)  # brings the largest float32 below MAX_MAGNITUDE
DOT_N, DOT_K = tl.constexpr(16), tl.constexpr(128)  # columns and depth of the smallest scaled MFMA


@triton.jit
def fp4_vector_prescale(largest):
    """Return (prescale, undo): the power of two, usually 1, that gemv_fp4 needs such a vector times; its inverse."""
    return tl.where(largest > MAX_MAGNITUDE, DOWN, 1.0), tl.where(largest > MAX_MAGNITUDE, 1.0 / DOWN, 1.0)


@triton.jit
def gemv_fp4(matrix, x_ptr, row0, MATRIX: tl.constexpr, EXPERTS: tl.constexpr, x_scales_ptr=None):
    """Return rows row0 .. row0 + tile_rows of W @ x, float32 [tile_rows]; rows beyond the matrix give 0.

    `matrix` is W's Operand. x_ptr is float32 [k], times fp4_vector_prescale, or float8e4nv [k] with x_scales_ptr uint8
    [k / 32]. EXPERTS, a common.machine.Experts, decodes. Activations below 1e-19 lose precision (see common/fp4.py).
    """
    K: tl.constexpr = MATRIX.k
    BLOCK_M: tl.constexpr = MATRIX.tile_rows
    BLOCK_K: tl.constexpr = MATRIX.k_block
    HALF_BIAS: tl.constexpr = EXPERTS.e2m1_half_bias
    rows = _rows_inside(row0, MATRIX.rows, BLOCK_M)
    blocks_ptr = matrix.ptr + tl.cast(row0, tl.int64) * (K // 8)
    scales_ptr = matrix.scales_ptr + tl.cast(row0, tl.int64) * (K // GROUP)
    acc = tl.zeros([BLOCK_M, BLOCK_K // GROUP], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=2):  # the next block's loads before this one's products
        word = tl.arange(0, BLOCK_K // 8) + k0 // 8
        words = tl.load(blocks_ptr + rows * (K // 8) + _inside(word, K // 8, 4)[None, :])
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        products = tl.zeros([BLOCK_M, BLOCK_K // 8], tl.float32)
        elements, eighths = EXPERTS.e2m1_words_to_float32(words), _eighths(x * HALF_BIAS)
        for i in tl.static_range(8):
            products += elements[i] * eighths[i][None, :]
        group = tl.arange(0, BLOCK_K // GROUP) + k0 // GROUP
        scales = tl.load(scales_ptr + rows * (K // GROUP) + _inside(group, K // GROUP, 2)[None, :])
        sums = tl.sum(tl.reshape(products, (BLOCK_M, BLOCK_K // GROUP, GROUP // 8)), axis=2)
        if x_scales_ptr is None:
            acc += sums * HALF_BIAS * e8m0_to_float32(scales)
        else:
            x_scales = tl.load(x_scales_ptr + group, mask=group < K // GROUP, other=0)
            first, second = e8m0_halves(scales, x_scales[None, :])
            acc += sums * HALF_BIAS * first * second
    return _zero_beyond(tl.sum(acc, axis=1), row0, MATRIX.rows)


@triton.jit
def _rows_inside(row0, n_rows, BLOCK_M: tl.constexpr):
    """Return 0, 1, ... [BLOCK_M, 1], where row0 + the last ones stop at the last row."""
    return tl.minimum(tl.arange(0, BLOCK_M), n_rows - 1 - row0)[:, None]


@triton.jit
def _inside(i, SIZE: tl.constexpr, RUN: tl.constexpr):
    """Return i where it is below SIZE, else an index among the last RUN below it; runs of RUN stay whole.

    What is loaded there meets activations that are 0. A mask would be a branch on gfx950, which may end in a wait for
    all loads in flight.
    """
    STEP: tl.constexpr = RUN if SIZE % RUN == 0 else 1
    return tl.where(i < SIZE, i, SIZE - STEP + i % STEP)


@triton.jit
def _zero_beyond(y, row0, n_rows):
    """Return y with zeros for rows from n_rows on."""
    return tl.where(row0 + tl.arange(0, y.shape[0]) < n_rows, y, 0.0)


@triton.jit
def _eighths(x):
    """Return every eighth element of x [8 n] from 0 on, from 1 on, ... from 7 on."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0] // 8, 2, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    x0, x4 = tl.split(x0)
    x1, x5 = tl.split(x1)
    x2, x6 = tl.split(x2)
    x3, x7 = tl.split(x3)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def gemv_fp4_fp8(matrix, x, row0, MATRIX: tl.constexpr, EXPERTS: tl.constexpr, DOT_SCALED: tl.constexpr):
    """Return gemv_fp4 of x in MXFP8, an Operand, with DOT_SCALED on scaled matrix cores."""
    if DOT_SCALED:
        M: tl.constexpr = MATRIX.tile_rows
        PARTS: tl.constexpr = max(1, min(MATRIX.k_block // DOT_K, DOT_N))
        acc = tl.zeros([M * PARTS, DOT_N], tl.float32)
        for k0 in tl.range(0, MATRIX.k, MATRIX.k_block, num_stages=2):
            acc = _dot_scaled(acc, matrix, x, row0, k0, MATRIX, PARTS)
        is_own = tl.arange(0, DOT_N)[None, :] == (tl.arange(0, M * PARTS) % PARTS)[:, None]
        sums = tl.reshape(tl.sum(tl.where(is_own, acc, 0.0), axis=1), (M, PARTS))
        return _zero_beyond(tl.sum(sums, axis=1), row0, MATRIX.rows)
    else:
        return gemv_fp4(matrix, x.ptr, row0, MATRIX, EXPERTS, x.scales_ptr)


@triton.jit
def _dot_scaled(acc, matrix, x, row0, k0, MATRIX: tl.constexpr, PARTS: tl.constexpr):
    """Return acc [tile_rows * PARTS, DOT_N] + W[:, k0 : k0 + k_block] @ x, where a row is cut into PARTS.

             column 0    1    2 ...
    row 0, part 0   *                   part p of each row meets column p, which holds part p of x: the sums
    row 0, part 1        *              marked * are wanted. Every wave gets rows of its own, however few a tile has,
    row 0, part 2             *         and x goes through shared memory once, not once for each part.
    """
    K: tl.constexpr = MATRIX.k
    M: tl.constexpr = MATRIX.tile_rows
    BYTES: tl.constexpr = MATRIX.k_block // PARTS // 2  # of a part
    GROUPS: tl.constexpr = MATRIX.k_block // PARTS // GROUP
    rows = tl.minimum(tl.arange(0, M * PARTS) // PARTS, MATRIX.rows - 1 - row0)[:, None]
    part = (tl.arange(0, M * PARTS) % PARTS)[:, None]
    byte = _inside(k0 // 2 + part * BYTES + tl.arange(0, BYTES)[None, :], K // 2, 16)
    bytes_ptr = matrix.ptr.to(tl.pointer_type(tl.uint8)) + tl.cast(row0, tl.int64) * (K // 2)
    w = tl.load(bytes_ptr + rows * (K // 2) + byte)
    group = k0 // GROUP + part * GROUPS + tl.arange(0, GROUPS)[None, :]
    scales_ptr = matrix.scales_ptr + tl.cast(row0, tl.int64) * (K // GROUP)
    w_scale = tl.load(scales_ptr + rows * (K // GROUP) + _inside(group, K // GROUP, 2))
    column = tl.arange(0, DOT_N)
    k = k0 + column[None, :] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[:, None]
    elements = tl.load(x.ptr + k, mask=(k < K) & (column < PARTS)[None, :], other=0.0)
    group = k0 // GROUP + column[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    x_scale = tl.load(x.scales_ptr + group, mask=(group < K // GROUP) & (column < PARTS)[:, None], other=0)
    return tl.dot_scaled(w, w_scale, "e2m1", elements, x_scale, "e4m3", acc)
