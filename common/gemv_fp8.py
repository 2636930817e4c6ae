"""Rows of an E4M3 matrix times a float32 vector, accumulated in float32.

Loading is a step of its own, as in gemv_bf16.py; an int32 word holds four elements. A row has a float32 scale (FORMAT
"fp8-row"), or every 32 elements of it an E8M0 byte ("fp8-32"); see checkpoints/fp8.py.
"""

import triton
import triton.language as tl

from common.quant import GROUP, e8m0_to_float32

# The exponent's bias is 7 for E4M3 and 127 for float32.
REBIAS = tl.constexpr(2.0**120)
NAN = tl.constexpr(0x7F)


@triton.constexpr_function
def scale_stride(k: int, dense_format: str) -> int:
    """Return the distance in scales from one row to the next; rows of "fp8-32" are padded to 16 bytes."""
    return -(-k // (32 * 16)) * 16 if dense_format == "fp8-32" else 1


@triton.jit
def e4m3_to_float32(words):
    """Return the four E4M3 elements of each int32, lowest byte first, as float32, by integer operations."""
    return _element(words), _element(words >> 8), _element(words >> 16), _element(words >> 24)


@triton.jit
def _element(words):
    """Return the E4M3 element in the lowest byte of each int32 as float32."""
    bits = ((words & 0x80) << 24) | ((words & 0x7F) << 20)
    return tl.where((words & 0x7F) == NAN, float("nan"), bits.to(tl.float32, bitcast=True) * REBIAS)


@triton.jit
def load_whole_vector(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, zero=0):
    """Return x [K] as float32 blocks [BLOCK_K], zeros beyond K."""
    blocks = ()
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K) + zero
        blocks = blocks + (tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32),)
    return blocks


@triton.jit
def load_fp8_rows(matrix, row0, end_row, MATRIX: tl.constexpr, zero=0):
    """Return (int32 blocks [tile_rows, k_block / 4], scales) of the tile of an Operand, int32 [rows, k / 4], at row0.

    Scales are [tile_rows] or, for each block, [tile_rows, k_block / 32]. Beyond k and from end_row on nothing is read,
    and zeros stand there.
    """
    K: tl.constexpr = MATRIX.k
    BLOCK_M: tl.constexpr = MATRIX.tile_rows
    BLOCK_K: tl.constexpr = MATRIX.k_block
    FORMAT: tl.constexpr = MATRIX.format
    STRIDE: tl.constexpr = scale_stride(K, FORMAT)
    w_ptr, scales_ptr = matrix.ptr, matrix.scales_ptr
    row = tl.arange(0, BLOCK_M)
    inside = row0 + row < end_row
    w_ptr += tl.cast(row0, tl.int64) * (K // 4)
    blocks, scales = (), ()
    if FORMAT == "fp8-row":
        scales = (tl.load(scales_ptr + (row0 + row), mask=inside, other=0.0),)
    else:
        scales_ptr += tl.cast(row0, tl.int64) * STRIDE
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 // 4 + tl.arange(0, BLOCK_K // 4) + zero
        mask = inside[:, None] & (k < K // 4)[None, :]
        offset = row[:, None] * (K // 4) + k[None, :]
        blocks = blocks + (tl.load(w_ptr + offset, mask=mask, other=0, eviction_policy="evict_first"),)
        if FORMAT == "fp8-32":
            group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP) + zero
            mask = inside[:, None] & (group < K // GROUP)[None, :]
            offset = row[:, None] * STRIDE + group[None, :]
            scales = scales + (tl.load(scales_ptr + offset, mask=mask, other=0),)
    return blocks, scales


@triton.jit
def gemv_fp8(tile, x, FORMAT: tl.constexpr, MACHINE: tl.constexpr):
    """Return tile @ x, float32 [BLOCK_M], of what load_fp8_rows and load_whole_vector return for the same blocks."""
    blocks, scales = tile
    acc = _scaled_products(blocks[0], x[0], scales[0], FORMAT, MACHINE)
    for i in tl.static_range(1, len(blocks)):
        acc += _scaled_products(blocks[i], x[i], scales[i if FORMAT == "fp8-32" else 0], FORMAT, MACHINE)
    y = tl.sum(acc, axis=1)
    if FORMAT == "fp8-row":
        y *= scales[0]
    return y


@triton.jit
def _scaled_products(words, x, scales, FORMAT: tl.constexpr, MACHINE: tl.constexpr):
    """Return the products of words and x summed over each word or, scaled, over each group."""
    M: tl.constexpr = words.shape[0]
    N: tl.constexpr = 4 * words.shape[1]
    SUMMED: tl.constexpr = GROUP if FORMAT == "fp8-32" else 4
    w0, w1, w2, w3 = MACHINE.dense.e4m3_to_float32(words)
    # The elements are joined rather than the vector taken apart, which would cost an exchange between threads for each
    # piece, and the registers to address them.
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (M, N))
    sums = tl.sum(tl.reshape(w * x[None, :], (M, N // SUMMED, SUMMED)), axis=2)
    return sums * e8m0_to_float32(scales) if FORMAT == "fp8-32" else sums
