"""Rows of an E4M3 matrix times a float32 vector, accumulated in float32.

As in gemv_bf16.py, but an int32 word holds four elements. A row has a float32 scale (FORMAT "fp8-row"), or each 32
elements along it an E8M0 byte ("fp8-32"); see checkpoints/fp8.py.
"""

import triton
import triton.language as tl

from common.quant import GROUP, e8m0_to_float32

# The exponent's bias is 7 for E4M3 and 127 for float32.
MISSING = tl.constexpr(2.0**120)
NAN = tl.constexpr(0x7F)


@triton.constexpr_function
def scale_stride(k: int, dense_format: str) -> int:
    """Scales from one row's to the next one's: of "fp8-32" padded to 16 bytes."""
    return -(-k // (32 * 16)) * 16 if dense_format == "fp8-32" else 1


@triton.jit
def e4m3_to_float32(words):
    """The four E4M3 elements of each int32, lowest byte first, as float32, by integer operations."""
    return _element(words), _element(words >> 8), _element(words >> 16), _element(words >> 24)


@triton.jit
def _element(words):
    """The one in the lowest byte."""
    bits = ((words & 0x80) << 24) | ((words & 0x7F) << 20)
    return tl.where((words & 0x7F) == NAN, float("nan"), bits.to(tl.float32, bitcast=True) * MISSING)


@triton.jit
def load_whole_vector(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, zero=0):
    """x [K] as float32 blocks [BLOCK_K], zeros beyond K."""
    blocks = ()
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K) + zero
        blocks = blocks + (tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32),)
    return blocks


@triton.jit
def load_fp8_rows(
    w_ptr,
    scales_ptr,
    row0,
    end_row,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    zero=0,
):
    """(int32 blocks [BLOCK_M, BLOCK_K / 4], scales) of rows row0 .. row0 + BLOCK_M of W, int32 [rows, K / 4].

    Scales are [BLOCK_M] or, for each block, [BLOCK_M, BLOCK_K / 32]. Zeros beyond K and from end_row on, where nothing
    is read.
    """
    STRIDE: tl.constexpr = scale_stride(K, FORMAT)
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
        at = row[:, None] * (K // 4) + k[None, :]
        blocks = blocks + (tl.load(w_ptr + at, mask=mask, other=0, eviction_policy="evict_first"),)
        if FORMAT == "fp8-32":
            group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP) + zero
            mask = inside[:, None] & (group < K // GROUP)[None, :]
            at = row[:, None] * STRIDE + group[None, :]
            scales = scales + (tl.load(scales_ptr + at, mask=mask, other=0),)
    return blocks, scales


@triton.jit
def gemv_fp8(tile, x, FORMAT: tl.constexpr, MACHINE: tl.constexpr):
    """tile @ x, float32 [BLOCK_M], of what the two functions above return for the same K and BLOCK_K."""
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
    """Sums over a word or, scaled, over a group."""
    M: tl.constexpr = words.shape[0]
    N: tl.constexpr = 4 * words.shape[1]
    TOGETHER: tl.constexpr = GROUP if FORMAT == "fp8-32" else 4
    w0, w1, w2, w3 = MACHINE.dense.e4m3_to_float32(words)
    # The elements join rather than the vector be taken apart: that would cost it an exchange between threads for each
    # part, and the registers to address them.
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (M, N))
    sums = tl.sum(tl.reshape(w * x[None, :], (M, N // TOGETHER, TOGETHER)), axis=2)
    return sums * e8m0_to_float32(scales) if FORMAT == "fp8-32" else sums
