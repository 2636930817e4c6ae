"""Rows of an MXFP4 matrix times many vectors, accumulated in float32.

`gemm_fp4` takes float16 vectors and decodes the matrix to float16: an element times 2^(its scale - BASE), with BASE the
largest scale of the matrix. That is exact for elements within 2^-22 of the largest possible one; smaller ones keep
their absolute precision. `gemm_fp4_fp8` takes MXFP8 vectors to scaled matrix cores.

The matrix stands in rows, [rows, K / 8] int32 words and [rows, K / 32] scales, or in the order of host/fragments.py.
There the even rows of a tile of 16 come before the odd ones, and so they do in a result: see in_rows. In that order
each thread decodes what it holds as an operand of the tensor cores, so that nothing is exchanged between threads, which
took 16 barriers a step. For that the columns of every 128 stand in another order, also in the vectors: see column_of.
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


@triton.constexpr_function
def vector_stride(k: int, fragments: bool) -> int:
    """Elements from one vector's to the next one's."""
    return -(-k // 128) * 128 if fragments else k


@triton.jit
def column_of(k, FRAGMENTS: tl.constexpr):
    """Where a vector's element k stands.

    A thread holds elements 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each 16 of a row of the left operand, t being one of
    four. Its share of 128 is 32 that follow each other, four packed words.
    """
    if FRAGMENTS:
        return k // 128 * 128 + k // 4 % 8 * 16 + k // 2 % 2 * 8 + k // 32 % 4 * 2 + k % 2
    else:
        return k


@triton.jit
def in_columns(x, i0, FRAGMENTS: tl.constexpr):
    """(x, columns): elements i0 .. of vectors, x [N, M], in an order of rising columns; i0 is a multiple of M, M of 32.

    Of each 128 elements' 32 columns that lie together (see column_of) M may have some: runs of up to 8.
    """
    N: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    at = tl.arange(0, M)
    if FRAGMENTS:
        QUARTERS: tl.constexpr = min(M // 32, 4)
        RUN: tl.constexpr = 2 * QUARTERS
        quarters = tl.reshape(x, (N, M // (32 * QUARTERS), QUARTERS, 16, 2))
        x = tl.reshape(tl.permute(quarters, (0, 1, 3, 2, 4)), (N, M))
        # What column_of gives, written so that the compiler sees the runs and stores them whole.
        first = i0 // 128 * 128 + i0 // (32 * QUARTERS) % (4 // QUARTERS) * RUN
        return x, first + at // RUN * 8 + at % RUN
    else:
        return x, i0 + at


@triton.jit
def in_rows(acc, FRAGMENTS: tl.constexpr):
    """A result [M, N] in the order of the matrix's rows."""
    if FRAGMENTS:
        M: tl.constexpr = acc.shape[0]
        N: tl.constexpr = acc.shape[1]
        return tl.reshape(tl.permute(tl.reshape(acc, (M // 16, 2, 8, N)), (0, 2, 1, 3)), (M, N))
    else:
        return acc


@triton.jit
def split_rows(acc, FRAGMENTS: tl.constexpr):
    """(even rows, odd rows), [M / 2, N] each, of a result [M, N] that begins with an even row."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(in_rows(acc, FRAGMENTS), (M // 2, 2, N)), (0, 2, 1)))


@triton.jit
def gemm_fp4(
    blocks_ptr,
    scales_ptr,
    base,
    x_ptr,
    m0,
    x_rows,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PACKED_WARPS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Places m0 .. m0 + BLOCK_M of W times vectors of x: a tuple of float32 [BLOCK_M, N] for x_rows, a tuple of [N].

    x_ptr float16 [.., vector_stride(K)], see column_of, zeros beyond K; m0 is a multiple of 16, base the matrix's
    largest scale, NUM_WARPS those of the kernel, PACKED_WARPS those that the fragments were packed for, whose BLOCK_M
    is a multiple of 16 NUM_WARPS, BLOCK_K of 128. The result lacks a factor of 2^(base - 127). Places beyond the matrix
    hold something finite.
    """
    STRIDE: tl.constexpr = vector_stride(K, FRAGMENTS)
    accs = _zeros(BLOCK_M, x_rows)
    for k0 in tl.range(0, STRIDE, BLOCK_K, num_stages=STAGES):
        if FRAGMENTS:
            words, scales = _load_fragments(
                blocks_ptr, scales_ptr, m0, k0, ROWS, K, BLOCK_M, BLOCK_K, NUM_WARPS, PACKED_WARPS
            )
            w = _decode_fragments(words, _half_scales(scales, base), NUM_WARPS, ARCH)
        else:
            words, scales = _load_rows(blocks_ptr, scales_ptr, m0, k0, ROWS, K, BLOCK_M, BLOCK_K)
            w = _decode_rows(words, _half_scales(scales, base))
        sums = ()
        for i in tl.static_range(len(x_rows)):
            x = _load_vectors(x_ptr, x_rows[i], k0, STRIDE, BLOCK_K)
            sums = sums + (tl.dot(w, tl.trans(x), accs[i]),)
        accs = sums
    return accs


@triton.jit
def _zeros(M: tl.constexpr, x_rows):
    """A sum for each of the vectors."""
    sums = ()
    for i in tl.static_range(len(x_rows)):
        sums = sums + (tl.zeros([M, x_rows[i].shape[0]], tl.float32),)
    return sums


@triton.jit
def _load_vectors(x_ptr, row, k0, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Elements k0 .. k0 + BLOCK_K of rows of x: [N, BLOCK_K]."""
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    at = row[:, None] * STRIDE + k
    if STRIDE % BLOCK_K == 0:
        return tl.load(x_ptr + at)
    else:
        return tl.load(x_ptr + at, mask=k < STRIDE, other=0.0)


@triton.jit
def _load_rows(
    blocks_ptr, scales_ptr, m0, k0, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(int32 words [BLOCK_M, BLOCK_K / 8], scales int32 [BLOCK_M, BLOCK_K / 32]), zeros beyond K."""
    row = tl.minimum(m0 + tl.arange(0, BLOCK_M), ROWS - 1)[:, None]
    word = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
    words = tl.load(blocks_ptr + row * (K // 8) + word, mask=word < K // 8, other=0)
    scales = tl.load(scales_ptr + row * (K // GROUP) + group, mask=group < K // GROUP, other=0)
    return words, scales.to(tl.int32)


@triton.jit
def _load_fragments(
    blocks_ptr,
    scales_ptr,
    m0,
    k0,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PACKED_WARPS: tl.constexpr,
):
    """The same, its rows in the order in which warps load them.

    Of eight after eight rows: each warp's first eight, then each warp's second eight, of the 16 NUM_WARPS that are
    multiplied together.
    """
    TILE: tl.constexpr = block_bytes(K) // 4
    LAST: tl.constexpr = (ROWS + 15) // 16 - 1  # of the tiles
    i = tl.arange(0, BLOCK_M)
    warp, half, turn = i // 8 % NUM_WARPS, i // (8 * NUM_WARPS) % 2, i // (16 * NUM_WARPS)
    tile = tl.minimum(m0 // 16 + turn * NUM_WARPS + warp, LAST)
    word = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    at = (tile * TILE + (8 * half + i % 8) * 16)[:, None] + (word // 16 * (QUAD_BYTES // 4) + word % 16)[None, :]
    if TILE % (2 * BLOCK_K) == 0:
        words = tl.load(blocks_ptr + at)
    else:
        words = tl.load(blocks_ptr + at, mask=(word // 16 * (QUAD_BYTES // 4) < TILE)[None, :], other=0)
    # A word has the scales of a group, of an even and an odd row and of two steps.
    SCALES: tl.constexpr = scale_bytes(K, PACKED_WARPS) // 4
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    group = k0 // GROUP + tl.arange(0, GROUPS)
    quad = group // QUAD
    pair = tl.arange(0, BLOCK_M // 2)
    tile = tl.minimum(m0 // 16 + pair // 8, LAST)
    first = quad // (2 * PACKED_WARPS) * (32 * PACKED_WARPS)
    at = (tile * SCALES + pair % 8 * QUAD)[:, None] + (first + quad % PACKED_WARPS * 32 + group % QUAD)[None, :]
    scales = tl.load(scales_ptr + at, mask=(first < SCALES)[None, :], other=0)
    TURNS: tl.constexpr = BLOCK_M // (16 * NUM_WARPS)
    odd = (tl.arange(0, 2) * 8)[None, :, None, None]
    later = (quad // PACKED_WARPS % 2 * 16)[None, None, None, :]
    scales = tl.reshape(scales, (TURNS, 1, 8 * NUM_WARPS, GROUPS)) >> (odd + later)
    return words, tl.reshape(scales, (BLOCK_M, GROUPS)) & 0xFF


@triton.jit
def _half_scales(scales, base):
    """The float16 2^(14 + scale - base), or zero or NaN, twice in an int32."""
    bits = tl.where(scales == NAN_SCALE, HALF_NAN, tl.maximum(scales - base + TOP, 0) << 10)
    return bits | bits << 16


@triton.jit
def _decode_rows(words, scales):
    """float16 [M, 8 W] of int32 words [M, W] and _half_scales [M, W / 4]."""
    scale = _as_half(_for_words(scales))
    e = ()
    for i in tl.static_range(8):
        nibble = words >> (4 * i)
        e = e + (_as_half(((nibble & 8) << 12) | ((nibble & 7) << 9)) * scale,)
    return tl.reshape(_join8(e), (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _decode_fragments(words, scales, NUM_WARPS: tl.constexpr, ARCH: tl.constexpr):
    """The same of what _load_fragments gave: rows in the order of places, columns in that of column_of."""
    M: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    scales = _for_words(scales)
    if ARCH == "cuda":
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
            place = ((words & PLACES[i // 2][0]) * PLACES[i // 2][1]) & PLACES[0][0]
            e = e + (_as_half(place >> (16 * (i % 2))) * scale,)
    # turn, half, warp, row of eight, 128 columns, thread of four, its word, and of that three bits of the element
    w = tl.reshape(_join8(e), (M // (16 * NUM_WARPS), 2, NUM_WARPS, 8, W // 16, 4, 4, 2, 2, 2))
    return tl.reshape(tl.permute(w, (0, 2, 1, 3, 4, 6, 7, 8, 5, 9)), (M, 8 * W))


@triton.jit
def _for_words(scales):
    """[M, G] -> [M, 4 G]: each scale for the four words of its group."""
    M: tl.constexpr = scales.shape[0]
    G: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (M, G, 4)), (M, 4 * G))


@triton.jit
def _as_half(bits):
    """The float16 in the lower half of each int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _join8(e):
    """Eight tensors side by side in three last dimensions of two."""
    a, b = tl.join(e[0], e[4]), tl.join(e[2], e[6])
    c, d = tl.join(e[1], e[5]), tl.join(e[3], e[7])
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def gemm_fp4_fp8(
    blocks_ptr,
    scales_ptr,
    x_ptr,
    x_scale_ptr,
    m0,
    x_rows,
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
    accs = _zeros(BLOCK_M, x_rows)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
        inside = group < K // GROUP
        w = tl.load(bytes_ptr + byte, mask=byte < K // 2, other=0)
        w_scale = tl.load(scales_ptr + group, mask=inside, other=0)
        sums = ()
        for i in tl.static_range(len(x_rows)):
            x = tl.load(x_ptr + x_rows[i][:, None] * K + k, mask=k < K, other=0.0)
            x_scale = tl.load(x_scale_ptr + x_rows[i][:, None] * (K // GROUP) + group, mask=inside, other=0)
            sums = sums + (tl.dot_scaled(w, w_scale, "e2m1", tl.trans(x), x_scale, "e4m3", accs[i]),)
        accs = sums
    return accs
