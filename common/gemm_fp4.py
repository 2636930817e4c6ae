"""Rows of an MXFP4 matrix times many vectors, accumulated in float32.

`gemm_fp4` takes float16 vectors and decodes the matrix to float16: an element times 2^(its scale - BASE), with BASE the
largest scale of the matrix. That is exact for elements within 2^-22 of the largest possible one; smaller ones keep
their absolute precision. `gemm_fp4_fp8` takes MXFP8 vectors to scaled matrix cores.

The matrix stands in rows, [rows, K / 8] int32 words and [rows, K / 32] scales, or in the order of host/fragments.py.
There the even rows of a tile of 16 come before the odd ones, and so they do in a result: see row_of.
"""

import triton
import triton.language as tl

from common.fp4_fragments import PLACES, QUAD, QUAD_BYTES, block_bytes, scale_bytes
from common.quant import GROUP

NAN_SCALE = tl.constexpr(255)
HALF_NAN = tl.constexpr(0x7E00)
# Bits of a float16 that is 2^14 times a scale of BASE: a decoded element lacks 2^14.
TOP = tl.constexpr(29)


def _decode_asm() -> str:
    """PTX that makes eight float16 of a packed word ($8), in their order, times a scale that $9 holds twice."""
    lines = [".reg .b32 x;"]
    for place, (mask, factor) in enumerate(PLACES.value):
        source = "$8"
        if factor & (factor - 1):  # a shift alone needs no mask before it
            lines.append(f"and.b32 x, $8, {mask};")
            source = "x"
        if factor > 1:
            lines.append(f"mul.lo.u32 x, {source}, {factor};")
            source = "x"
        lines += [
            f"and.b32 x, {source}, {PLACES.value[0][0]};",
            "mul.rn.f16x2 x, x, $9;",
            f"mov.b32 {{${2 * place}, ${2 * place + 1}}}, x;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


DECODE = tl.constexpr(_decode_asm())
HALVES = tl.constexpr((tl.float16,) * 8)


@triton.jit
def row_of(m, FRAGMENTS: tl.constexpr):
    """The matrix row that stands at place m of a result."""
    if FRAGMENTS:
        return m // 16 * 16 + m % 8 * 2 + m % 16 // 8
    else:
        return m


@triton.jit
def split_rows(acc, FRAGMENTS: tl.constexpr):
    """(even rows, odd rows), [M / 2, N] each, of a result [M, N] that begins with an even row."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    RUN: tl.constexpr = 8 if FRAGMENTS else 1
    pairs = tl.permute(tl.reshape(acc, (M // (2 * RUN), 2, RUN, N)), (0, 2, 3, 1))
    even, odd = tl.split(pairs)
    return tl.reshape(even, (M // 2, N)), tl.reshape(odd, (M // 2, N))


@triton.jit
def gemm_fp4(
    blocks_ptr,
    scales_ptr,
    base,
    x_ptr,
    m0,
    x_row,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Places m0 .. m0 + BLOCK_M of W times the vectors x_row [N] of x float16 [.., K]: float32 [BLOCK_M, N].

    m0 is a multiple of 16, base the matrix's largest scale, WARPS what the fragments were packed for. The result lacks
    a factor of 2^(base - 127). Places beyond the matrix hold something finite.
    """
    m = m0 + tl.arange(0, BLOCK_M)
    x_ptr += x_row.to(tl.int64)[:, None] * K
    acc = tl.zeros([BLOCK_M, x_row.shape[0]], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        if K % BLOCK_K == 0:
            x = tl.load(x_ptr + k)
        else:
            x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        words = _load_words(blocks_ptr, m, k0, ROWS, K, BLOCK_K, FRAGMENTS)
        scales = _load_scales(scales_ptr, m0, k0, ROWS, K, BLOCK_M, BLOCK_K, WARPS, FRAGMENTS)
        w = _decode(words, _half_scales(scales, base), FRAGMENTS, ARCH)
        acc = tl.dot(w, tl.trans(x), acc)
    return acc


@triton.jit
def _load_words(blocks_ptr, m, k0, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, FRAGMENTS: tl.constexpr):
    """int32 [M, BLOCK_K / 8]; zeros beyond K."""
    word = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    if FRAGMENTS:
        TILE: tl.constexpr = block_bytes(K) // 4
        LAST: tl.constexpr = (ROWS + 15) // 16 * 16 - 1
        place = tl.minimum(m, LAST)[:, None]
        at = place // 16 * TILE + word // 16 * (QUAD_BYTES // 4) + place % 16 * 16 + word % 16
        if TILE % (BLOCK_K * 2) == 0:
            return tl.load(blocks_ptr + at)
        else:
            return tl.load(blocks_ptr + at, mask=word // 16 * 256 < TILE, other=0)
    else:
        row = tl.minimum(m, ROWS - 1)[:, None]
        return tl.load(blocks_ptr + row * (K // 8) + word, mask=word < K // 8, other=0)


@triton.jit
def _load_scales(
    scales_ptr,
    m0,
    k0,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """E8M0, int32 [BLOCK_M, BLOCK_K / 32]; beyond K those of finite numbers."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    group = k0 // GROUP + tl.arange(0, GROUPS)
    if FRAGMENTS:
        # A word has the scales of a group, of an even and an odd row and of two steps.
        TILE: tl.constexpr = scale_bytes(K, WARPS) // 4
        pair = m0 // 2 + tl.arange(0, BLOCK_M // 2)
        tile = tl.minimum(pair // 8, (ROWS + 15) // 16 - 1)
        quad = group // QUAD
        at = (quad // (2 * WARPS) * WARPS + quad % WARPS) * 32 + group % QUAD
        at = tile[:, None] * TILE + pair[:, None] % 8 * QUAD + at[None, :]
        inside = (quad // (2 * WARPS) * WARPS * 32 < TILE)[None, :]
        words = tl.load(scales_ptr + at, mask=inside, other=0)
        shift = (quad // WARPS % 2 * 16)[None, None, None, :] + (tl.arange(0, 2) * 8)[None, :, None, None]
        scales = tl.reshape(words, (BLOCK_M // 16, 1, 8, GROUPS)) >> shift
        return tl.reshape(scales, (BLOCK_M, GROUPS)) & 0xFF
    else:
        row = tl.minimum(m0 + tl.arange(0, BLOCK_M), ROWS - 1)[:, None]
        at = row * (K // GROUP) + group[None, :]
        return tl.load(scales_ptr + at, mask=(group < K // GROUP)[None, :], other=0).to(tl.int32)


@triton.jit
def _half_scales(scales, base):
    """The float16 2^(14 + scale - base), or zero or NaN, twice in an int32."""
    bits = tl.where(scales == NAN_SCALE, HALF_NAN, tl.maximum(scales - base + TOP, 0) << 10)
    return bits | bits << 16


@triton.jit
def _decode(words, scales, FRAGMENTS: tl.constexpr, ARCH: tl.constexpr):
    """float16 [M, 8 W] of int32 words [M, W] and _half_scales [M, W / 4]."""
    M: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    scales = tl.broadcast_to(scales[:, :, None], (M, W // 4, 4))
    scales = tl.reshape(scales, (M, W))
    if FRAGMENTS and ARCH == "cuda":
        e = tl.inline_asm_elementwise(
            DECODE,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [words, scales],
            dtype=HALVES,
            is_pure=True,
            pack=1,
        )
    else:
        e = ()
        scale = _as_half(scales)
        for i in tl.static_range(8):
            if FRAGMENTS:
                place = ((words & PLACES[i // 2][0]) * PLACES[i // 2][1]) & PLACES[0][0]
                bits = place >> (16 * (i % 2))
            else:
                nibble = words >> (4 * i)
                bits = ((nibble & 8) << 12) | ((nibble & 7) << 9)
            e = e + (_as_half(bits) * scale,)
    w = tl.join(_join4(e[0], e[2], e[4], e[6]), _join4(e[1], e[3], e[5], e[7]))
    return tl.reshape(w, (M, 8 * W))


@triton.jit
def _as_half(bits):
    """The float16 in the lower half of each int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _join4(a, b, c, d):
    """Side by side in two last dimensions of two."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def gemm_fp4_fp8(
    blocks_ptr,
    scales_ptr,
    x_ptr,
    x_scale_ptr,
    m0,
    x_row,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same for rows in their order and x float8e4nv [.., K] with x_scale_ptr uint8 [.., K / 32]; lacks nothing."""
    row = tl.minimum(m0 + tl.arange(0, BLOCK_M), ROWS - 1)[:, None]
    bytes_ptr = blocks_ptr.to(tl.pointer_type(tl.uint8)) + row * (K // 2)
    scales_ptr += row * (K // GROUP)
    x_ptr += x_row.to(tl.int64)[:, None] * K
    x_scale_ptr += x_row.to(tl.int64)[:, None] * (K // GROUP)
    acc = tl.zeros([BLOCK_M, x_row.shape[0]], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
        inside = group < K // GROUP
        w = tl.load(bytes_ptr + byte, mask=byte < K // 2, other=0)
        w_scale = tl.load(scales_ptr + group, mask=inside, other=0)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        x_scale = tl.load(x_scale_ptr + group, mask=inside, other=0)
        acc = tl.dot_scaled(w, w_scale, "e2m1", tl.trans(x), x_scale, "e4m3", acc)
    return acc
