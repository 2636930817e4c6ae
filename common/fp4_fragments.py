"""MXFP4 matrices as NVIDIA's tensor cores take them: rows of an MXFP4 matrix times a vector, by FP16 products.

host/fragments.py packs a matrix so that the 16 bytes which a thread loads are its own part of the left operands of
mma.m16n8k16, without any exchange between threads. The vector becomes the right operand: each column of a block holds
one group of 32 elements, so that a product leaves one sum per row and scale group, to which the scale is applied. There
are two columns a group: the vector's FP16 value, and what FP16 leaves of it, which together carry 22 bits.
"""

import triton
import triton.language as tl

from common.quant import GROUP, dequantize_mxfp8, e8m0_to_float32, quantize_mxfp8

ROWS = tl.constexpr(16)  # of a tile
UNIT_K = tl.constexpr(64)  # elements of each row in the 512 bytes that a warp loads at once
UNIT_BYTES = tl.constexpr(512)
DOT_K = tl.constexpr(128)  # of each warp in a step: two units, four groups in two columns each

# A byte is s'MMM'mmm's'... two elements: bits 7, 3..1 and bits 0, 6..4 are sign and magnitude. The upper byte of a
# float16 with bits 7 and 3..1 of it alone is the element times 2^-14, subnormals included.
MISSING_EXPONENT = tl.constexpr(14)
SPLIT_WORD = tl.constexpr("""{
    .reg .b32 first, second, sign, low, high;
    and.b32 first, $8, 0x8E8E8E8E;
    shr.u32 second, $8, 3;
    shl.b32 sign, $8, 7;
    and.b32 sign, sign, 0x80808080;
    lop3.b32 second, second, 0x0E0E0E0E, sign, 0xEA;
    prmt.b32 low, first, 0, 0x1404;
    prmt.b32 high, first, 0, 0x3424;
    mov.b32 {$0, $1}, low;
    mov.b32 {$2, $3}, high;
    prmt.b32 low, second, 0, 0x1404;
    prmt.b32 high, second, 0, 0x3424;
    mov.b32 {$4, $5}, low;
    mov.b32 {$6, $7}, high;
}""")


@triton.jit
def load_fp4_fragments(blocks_ptr, scales_ptr, K: tl.constexpr, WARPS: tl.constexpr, valid=True):
    """(blocks, scales) of one tile of 16 rows: tuples of int32 tensors; zeros if not `valid`, and nothing is read.

    Words, as bytes that live across a loop's turns would take a register each.
    """
    UNIT_WORDS: tl.constexpr = UNIT_BYTES // 4
    WORDS: tl.constexpr = (K + UNIT_K - 1) // UNIT_K * UNIT_WORDS
    STEP_WORDS: tl.constexpr = 2 * WARPS * UNIT_WORDS
    STEPS: tl.constexpr = (K + WARPS * DOT_K - 1) // (WARPS * DOT_K)
    word = tl.arange(0, STEP_WORDS)
    lane = tl.arange(0, WARPS * 32)
    blocks = ()
    scales = ()
    for step in tl.static_range(STEPS):
        mask = (word < WORDS - step * STEP_WORDS) & valid
        # Read once a token, if at all: leaves the cache to what is fetched ahead.
        words = tl.load(blocks_ptr + step * STEP_WORDS + word, mask=mask, other=0, eviction_policy="evict_first")
        blocks = blocks + (words,)
    for pair in tl.static_range((STEPS + 1) // 2):  # a word has the scales of two steps
        scales = scales + (tl.load(scales_ptr + pair * (WARPS * 32) + lane, mask=(lane >= 0) & valid, other=0),)
    return blocks, scales


@triton.jit
def load_fragment_vector(x_ptr, K: tl.constexpr, WARPS: tl.constexpr):
    """float32 x [K] as fragment_vector takes it: blocks [groups, 32], zeros beyond K."""
    STEPS: tl.constexpr = (K + WARPS * DOT_K - 1) // (WARPS * DOT_K)
    i = tl.arange(0, WARPS * DOT_K)
    blocks = ()
    for step in tl.static_range(STEPS):
        k = step * (WARPS * DOT_K) + i
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        blocks = blocks + (tl.reshape(x, (WARPS * DOT_K // GROUP, GROUP)),)
    return blocks


@triton.jit
def fragment_vector(loaded, WARPS: tl.constexpr, QUANT: tl.constexpr):
    """(operands, scale) of a vector: a tuple of float16 [WARPS, DOT_K, 8], and what to multiply results by.

    With QUANT x is rounded to MXFP8 first.
    """
    blocks = ()
    largest = tl.zeros([WARPS * DOT_K // GROUP, GROUP], tl.float32)
    for step in tl.static_range(len(loaded)):
        x = loaded[step]
        if QUANT:
            elements, e8m0 = quantize_mxfp8(x)
            x = dequantize_mxfp8(elements, e8m0)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        blocks = blocks + (x,)
    # The largest element becomes 2^14 to 2^15 as a float16. The bound keeps 2^(141 - exponent) a normal float32.
    exponent = (tl.max(tl.reshape(largest, (WARPS * DOT_K,)), axis=0).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.maximum(exponent, 32)
    unit = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    operands = ()
    for step in tl.static_range(len(blocks)):
        x = blocks[step] * unit
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        operands = operands + (_diagonal(high, low, WARPS),)
    return operands, ((exponent - 141 + 127 + MISSING_EXPONENT) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _diagonal(high, low, WARPS: tl.constexpr):
    """[groups, 32] twice -> [WARPS, DOT_K, 8]: columns 2 j and 2 j + 1 hold group j of each warp, zeros elsewhere."""
    # Both parts in one word, so that there is half as much to select.
    low = low.to(tl.int16, bitcast=True).to(tl.int32) << 16
    words = (high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | low
    words = tl.reshape(words, (2, WARPS, 2, GROUP, 1))  # unit, warp, group in unit, element, -
    words = tl.reshape(tl.permute(words, (1, 0, 2, 3, 4)), (WARPS, 4, GROUP, 1))
    group = tl.arange(0, 4)
    words = tl.where(group[None, :, None, None] == group[None, None, None, :], words, 0)
    high = words.to(tl.int16).to(tl.float16, bitcast=True)
    low = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(high, low), (WARPS, DOT_K, 8))


@triton.jit
def gemv_fp4_fragments(tile, vector, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """tile @ x, float32 [16], of what load_fp4_fragments and fragment_vector return."""
    blocks, scales = tile
    operands, scale = vector
    acc = tl.zeros([WARPS, ROWS, 4], tl.float32)
    for step in tl.static_range(len(operands)):
        products = tl.dot(_decode(blocks[step], WARPS, ARCH), operands[step], out_dtype=tl.float32)
        sums = tl.sum(tl.reshape(products, (WARPS, ROWS, 4, 2)), axis=3)
        acc += sums * _scales(scales[step // 2], step % 2, WARPS)
    return tl.sum(tl.sum(acc, axis=2), axis=0) * scale


@triton.jit
def _scales(words, STEP: tl.constexpr, WARPS: tl.constexpr):
    """float32 [WARPS, 16, 4] of the first or second step of a pair."""
    first = e8m0_to_float32((words >> (16 * STEP)) & 0xFF)
    second = e8m0_to_float32((words >> (16 * STEP + 8)) & 0xFF)
    both = tl.reshape(tl.join(first, second), (WARPS, 8, 4, 2))  # warp, row, group, row / 8
    return tl.reshape(tl.permute(both, (0, 3, 1, 2)), (WARPS, ROWS, 4))


@triton.jit
def _decode(words, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """int32 [WARPS * 256] -> float16 [WARPS, 16, DOT_K]: the elements times 2^-14."""
    if ARCH == "cuda":
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            SPLIT_WORD,
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        a0, b0 = _split_byte(words)
        a1, b1 = _split_byte(words >> 8)
        a2, b2 = _split_byte(words >> 16)
        a3, b3 = _split_byte(words >> 24)
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    x = tl.join(even, odd)  # words, row / 8, i / 2, i % 2
    x = tl.reshape(x, (2, WARPS, 8, 4, 2, 2, 2, 2, 2))  # unit, warp, row, t, group, half, row / 8, i / 2, i % 2
    return tl.reshape(tl.permute(x, (1, 6, 2, 0, 4, 5, 3, 7, 8)), (WARPS, ROWS, DOT_K))


@triton.jit
def _split_byte(words):
    """The two elements in the lowest byte."""
    first = (words & 0x8E) << 8
    second = (((words >> 3) & 0x0E) | ((words << 7) & 0x80)) << 8
    return first.to(tl.int16).to(tl.float16, bitcast=True), second.to(tl.int16).to(tl.float16, bitcast=True)
