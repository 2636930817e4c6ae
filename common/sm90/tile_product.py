"""A tile of an MXFP4 matrix (see tiles.py) times a vector, by FP16 products of tensor cores.

Everything is laid out as the threads of mma.m16n8k16 hold it, so that nothing is exchanged between them: a tensor
[THREADS] has one element for each thread of a program.

The vector is the right operand. Of its eight columns thread 4 n + t holds the part of column n that meets group t. That
is zero unless t = n / 2, so that a product leaves one sum for each row and group, to which the scale is applied: column
2 q holds the vector as FP16, column 2 q + 1 its rounding error times 2^11. Together they carry 22 bits.
"""

import triton
import triton.language as tl

from common.operands import half_prescale
from common.sm90 import ptx
from common.sm90.gemv import by_thread
from common.sm90.tiles import GROUP, QUAD, QUAD_BYTES, UNPLACED, place_asm

REST_FACTOR = tl.constexpr(2048.0)
REST_OFFSET = tl.constexpr(32)


def _multiply_quad(first_byte: int) -> str:
    """Return PTX that adds a quad's products to sums, times the vector's scale and the weights' scales in two bytes.

    $0, $1: the new sums of rows 2 r and 2 r + 1; $2, $3: the old ones; $4, $8: four words of each row; $12: sixteen of
    the vector; $28: the weights' scales; $29: the vector's. The products are summed in two halves, so that each product
    waits for half as many before it.
    """
    lines = [".reg .f32 c<8>, scale, zero;", ".reg .b32 a<8>, w;", "mov.f32 zero, 0f00000000;"]
    for word in range(4):
        for row in range(2):
            for place in range(4):
                lines += place_asm(place, f"${4 + 4 * row + word}", "w", f"a{2 * place + row}")
        for half in range(2):
            a = ", ".join(f"a{4 * half + i}" for i in range(4))
            c = ", ".join(f"c{4 * half + i}" for i in range(4))
            x = 12 + 4 * word + 2 * half
            lines.append(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                f"{{{c}}}, {{{a}}}, {{${x}, ${x + 1}}}, {{{c if word else 'zero, zero, zero, zero'}}};"
            )
    for row in range(2):
        shift = 23 - 8 * (first_byte + row)  # brings the byte to a float32's exponent
        value, rest, more_value, more_rest = (f"c{2 * row + i}" for i in (0, 1, 4, 5))
        lines += [
            f"shl.b32 w, $28, {shift};" if shift > 0 else f"shr.u32 w, $28, {-shift};",
            "and.b32 w, w, 0x7F800000;",
            # Byte 0 is 2^-127, a subnormal; byte 255 infinity, which meets elements of 0: see drop_elements_of_nan.
            "max.u32 w, w, 0x00400000;",
            "mov.b32 scale, w;",
            f"add.f32 {value}, {value}, {more_value};",
            f"add.f32 {rest}, {rest}, {more_rest};",
            f"fma.rn.f32 {value}, {rest}, 0f3A000000, {value};",  # 2^-11
            f"mul.f32 {value}, {value}, $29;",  # not the scale, as the scales' product may be beyond float32
            f"fma.rn.f32 ${row}, {value}, scale, ${2 + row};",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


FIRST_STEP = tl.constexpr(_multiply_quad(0))
SECOND_STEP = tl.constexpr(_multiply_quad(2))
CONSTRAINTS = tl.constexpr("=f,=f,f,f," + "r," * 25 + "f")


@triton.constexpr_function
def tile_vector_size(k: int) -> int:
    """Return the float16 elements of a vector's values and rests, see vector_offset."""
    return -(-k // (QUAD.value * GROUP.value)) * 2 * QUAD.value * GROUP.value


@triton.jit
def tile_vector_prescale(largest):
    """Return (prescale, scale): half_prescale of a vector's largest magnitude; the scale of products with the vector.

    The scale undoes the prescale and the weights' 2^-14, and stays float32 also times a weight's scale.
    """
    prescale, undo = half_prescale(largest)
    return prescale, undo * UNPLACED


@triton.jit
def split_scale(scale):
    """Return (scale for load_tile_vector, factor of the result), whose product is `scale`; usually the factor is 1.

    A group's products times the scale of a large vector could leave float32 before the weights' scales bring them back.
    """
    large = scale > 2.0**64
    return tl.where(large, scale * 2.0**-64, scale), tl.where(large, 2.0**64, 1.0)


@triton.jit
def split_vector(x, prescale):
    """Return (value, rest), float16, of float32 x times a prescale, as load_tile_vector reads them."""
    x *= prescale
    value = x.to(tl.float16)
    return value, ((x - value.to(tl.float32)) * REST_FACTOR).to(tl.float16)


@triton.jit
def vector_offset(k):
    """Return the offset of a vector's element k in float16 [quads, 4, 2, 4, 8]; its rest is REST_OFFSET behind it.

    The dimensions are quads, eighths of a group, value or rest, groups and elements: a warp's loads are contiguous.
    """
    return k // 128 * 256 + k // 8 % 4 * 64 + k // 32 % QUAD * 8 + k % 8


@triton.jit
def store_vector(x_ptr, k, inside, x, prescale):
    """Store those elements k of float32 x that are inside as load_tile_vector reads them."""
    value, rest = split_vector(x, prescale)
    x_ptr += vector_offset(k)
    tl.store(x_ptr, value, mask=inside)
    tl.store(x_ptr + REST_OFFSET, rest, mask=inside)


@triton.jit
def as_words(ptr):
    """Return a pointer to pairs of float16 as one to int32."""
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def load_tile_vector(x_ptr, scale, K: tl.constexpr, WARPS: tl.constexpr):
    """Return a vector that store_vector stored as multiply_tile takes it: (words, scale) of each step.

    x_ptr: see as_words; `scale`: see tile_vector_prescale.
    """
    THREADS: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = (K + WARPS * QUAD * GROUP - 1) // (WARPS * QUAD * GROUP)
    word = tl.arange(0, 4 * THREADS)
    column = word // 16 % 8
    group = word // 4 % QUAD
    scales = tl.full([THREADS], 1.0, tl.float32) * scale
    steps = ()
    for step in tl.static_range(STEPS):
        quad = step * WARPS + word // 128
        offset = quad * 128 + column % 2 * 16 + word % 16
        mask = (column // 2 == group) & ((quad * QUAD + group) * GROUP < K)
        words = ()
        for i in tl.static_range(4):
            words = words + by_thread(tl.load(x_ptr + offset + 32 * i, mask=mask, other=0))
        steps = steps + ((words, scales),)
    return steps


@triton.jit
def multiply_tile(blocks, scales, x, WARPS: tl.constexpr):
    """Return each thread's sums of a tile times a vector: float32 [THREADS] of even rows, and of odd ones.

    blocks, scales: their addresses in shared memory; x: see load_tile_vector. The bytes behind a tile are finite as FP4
    and meet zeros of x.
    """
    THREADS: tl.constexpr = 32 * WARPS
    thread = tl.arange(0, THREADS)
    even = tl.zeros([THREADS], tl.float32)
    odd = tl.zeros([THREADS], tl.float32)
    for step in tl.static_range(len(x)):
        quad = step * WARPS + thread // 32
        address = blocks + quad * QUAD_BYTES + thread % 32 * 16
        a = ptx.load_4_words(address)
        b = ptx.load_4_words(address + QUAD_BYTES // 2)
        if step % 2 == 0:
            scale_words = ptx.load_word(scales + step // 2 * (4 * THREADS) + 4 * thread)
        even, odd = _add_quad(even, odd, a, b, x[step][0], scale_words, x[step][1], step % 2)
    return even, odd


@triton.jit
def _add_quad(even, odd, a, b, x, scales, x_scale, STEP: tl.constexpr):
    """Return the sums of even and odd rows plus a quad's products. a, b: four words of each row; x: 16 of a vector."""
    ASM: tl.constexpr = SECOND_STEP if STEP else FIRST_STEP
    return tl.inline_asm_elementwise(
        ASM,
        CONSTRAINTS,
        [even, odd, a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7],
         x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15], scales, x_scale],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )  # fmt: skip
