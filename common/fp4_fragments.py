"""MXFP4 matrices as NVIDIA's tensor cores take them: rows of an MXFP4 matrix times a vector, by FP16 products.

The instruction is mma.m16n8k16, and everything is laid out as its threads hold it, so that nothing is exchanged between
them: a tensor [LANES] has one element for each thread of a program. Lane 4 r + t of a warp holds scale group t of a
quad, four groups or 128 columns, of the tile's rows 2 r and 2 r + 1. host/fragments.py packs a matrix in that order.

The vector is the right operand. Of its eight columns lane 4 n + t holds the part of column n that meets group t. That
is zero but for t = n / 2, so that a product leaves one sum for each row and group, to which the scale is applied:
column 2 q gets the vector as FP16, column 2 q + 1 what FP16 leaves of it, times 2^11. Together they carry 22 bits.
"""

import triton
import triton.language as tl

from common.lanes import by_lane
from common.parts import half_unit
from common.quant import GROUP, e8m0_to_float32
from common.ring import load_word, load_words

ROWS = tl.constexpr(16)  # of a tile
PAIRS = tl.constexpr(8)  # of them, an even row and an odd one, that a thread has
QUAD = tl.constexpr(4)  # groups that a warp multiplies at a time
QUAD_BYTES = tl.constexpr(1024)  # of a tile: 16 rows of 128 elements
REST_FACTOR = tl.constexpr(2048.0)
REST_PLACE = tl.constexpr(32)

# A word holds eight elements, two at each of four places: sign and magnitude of the first two in bits 15 and 11..9 of
# either half, of the others in bits 12 and 8..6, 14 and 5..3, 13 and 2..0. Bits 15 and 11..9 alone, as a float16, are
# an element times 2^-14, subnormals included. The factors move sign and magnitude at once, and on another pipe than the
# masks, which are what limits the loop over tiles.
UNPLACED = tl.constexpr(2.0**14)
PLACES = tl.constexpr(((0x8E008E00 - (1 << 32), 1), (0x11C011C0, 8), (0x40384038, 66), (0x20072007, 516)))


def _multiply_quad(first_byte: int) -> str:
    """PTX that adds a quad's products to sums, times the vector's scale and the weights' scales in two bytes.

    $0, $1: the sums of rows 2 r and 2 r + 1; $2, $3: what they were; $4, $8: four words of each row; $12: sixteen of
    the vector; $28: the weights' scales; $29: the vector's. The products are summed in two halves, so that each waits
    for half as many before it.
    """
    lines = [".reg .f32 c<8>, scale, zero;", ".reg .b32 a<8>, w;", "mov.f32 zero, 0f00000000;"]
    for word in range(4):
        for row in range(2):
            for place, (mask, factor) in enumerate(PLACES.value):
                source = f"${4 + 4 * row + word}"
                if factor & (factor - 1):  # a shift alone needs no mask before it
                    lines.append(f"and.b32 w, {source}, {mask};")
                    source = "w"
                lines += [
                    f"mul.lo.u32 w, {source}, {factor};",
                    f"and.b32 a{2 * place + row}, w, {PLACES.value[0][0]};",
                ]
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
def block_bytes(k: int) -> int:
    """Bytes of a tile's blocks."""
    return -(-k // (QUAD.value * GROUP.value)) * QUAD_BYTES.value


@triton.constexpr_function
def scale_bytes(k: int, warps: int) -> int:
    """Bytes of a tile's scales."""
    return -(-k // (256 * warps)) * 128 * warps


@triton.jit
def fragment_unit(largest):
    """(unit, scale): the power of two that brings a vector, `largest` its largest magnitude, to FP16; what undoes it.

    The largest element becomes 2^14 to 2^15. Vectors below 2^-95 are brought no further up: the unit, 2^(141 -
    exponent), stays a float32, and so does what undoes it, times a weight's scale.
    """
    unit, undo = half_unit(largest)
    return unit, undo * UNPLACED


@triton.jit
def split_scale(scale):
    """(scale for load_fragment_vector, factor of the result), whose product is `scale`; usually the factor is 1.

    A group's products times the scale of a large vector could leave float32 before the weights' scales bring them back.
    """
    large = scale > 2.0**64
    return tl.where(large, scale * 2.0**-64, scale), tl.where(large, 2.0**64, 1.0)


@triton.jit
def fragment_parts(x, unit):
    """float32 x -> its float16 value and rest, as load_fragment_vector reads them."""
    x *= unit
    value = x.to(tl.float16)
    return value, ((x - value.to(tl.float32)) * REST_FACTOR).to(tl.float16)


@triton.jit
def fragment_places(k):
    """Where element k of a vector goes among float16 [quads, 4, 2, 4, 8]; its rest goes to REST_PLACE after it.

    In this order a warp's loads are contiguous: eighths of a group, values and rests, groups.
    """
    return k // 128 * 256 + k // 8 % 4 * 64 + k // 32 % QUAD * 8 + k % 8


@triton.jit
def load_fragment_vector(x_ptr, scale, K: tl.constexpr, WARPS: tl.constexpr):
    """A vector as gemv_fp4_fragments takes it, from what fragment_parts gave: (words, scale) of each step.

    x_ptr: int32, two float16 each, see fragment_places. `scale`: see fragment_unit.
    """
    LANES: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = (K + WARPS * QUAD * GROUP - 1) // (WARPS * QUAD * GROUP)
    word = tl.arange(0, 4 * LANES)
    column = word // 16 % 8
    own = word // 4 % QUAD
    scales = tl.full([LANES], 1.0, tl.float32) * scale
    steps = ()
    for step in tl.static_range(STEPS):
        quad = step * WARPS + word // 128
        at = quad * 128 + column % 2 * 16 + word % 16
        mask = (column // 2 == own) & ((quad * QUAD + own) * GROUP < K)
        words = ()
        for i in tl.static_range(4):
            words = words + by_lane(tl.load(x_ptr + at + 32 * i, mask=mask, other=0))
        steps = steps + ((words, scales),)
    return steps


@triton.jit
def gemv_fp4_fragments(pieces, x, K: tl.constexpr, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """What each thread has of a tile times a vector: float32 [LANES] of even rows, and of odd ones.

    pieces: the addresses of the tile's blocks and of its scales in a slot of the ring; x: see load_fragment_vector.
    """
    LANES: tl.constexpr = 32 * WARPS
    lane = tl.arange(0, LANES)
    even = tl.zeros([LANES], tl.float32)
    odd = tl.zeros([LANES], tl.float32)
    for step in tl.static_range(len(x)):
        quad = step * WARPS + lane // 32
        at = pieces[0] + quad * QUAD_BYTES + lane % 32 * 16
        # In shared memory a quad beyond the tile is whatever follows, which is finite and meets zeros of x.
        inside = quad * (QUAD * GROUP) < K
        a = load_words(at, inside, False, ARCH)
        b = load_words(at + QUAD_BYTES // 2, inside, False, ARCH)
        if step % 2 == 0:
            scales = load_word(pieces[1] + step // 2 * (4 * LANES) + 4 * lane, inside, ARCH)
        even, odd = _add_quad(even, odd, a, b, x[step][0], scales, x[step][1], step % 2, WARPS, ARCH)
    return even, odd


@triton.jit
def _add_quad(even, odd, a, b, x, scales, x_scale, STEP: tl.constexpr, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """The sums of even and odd rows and a quad's products. a, b: four words of each row, x: sixteen of the vector."""
    if ARCH == "cuda":
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
    else:
        even_scale = e8m0_to_float32((scales >> (16 * STEP)) & 0xFF)
        odd_scale = e8m0_to_float32((scales >> (16 * STEP + 8)) & 0xFF)
        even += _products(a, x, WARPS) * x_scale * even_scale
        return even, odd + _products(b, x, WARPS) * x_scale * odd_scale


@triton.jit
def _products(words, x, WARPS: tl.constexpr):
    """What the tensor cores make of a row's four words and the vector: the sum in lane 4 r + q is that of group q."""
    w = _stack(words[0], words[1], words[2], words[3])
    places = ()
    for place in tl.static_range(4):
        places = places + (((w & PLACES[place][0]) * PLACES[place][1]) & PLACES[0][0],)
    w = _stack(places[0], places[1], places[2], places[3])  # lanes, word, place
    x0 = _stack(x[0], x[1], x[2], x[3])
    x1 = _stack(x[4], x[5], x[6], x[7])
    x2 = _stack(x[8], x[9], x[10], x[11])
    x3 = _stack(x[12], x[13], x[14], x[15])
    x = tl.permute(_stack(x0, x1, x2, x3), (0, 2, 1))
    return _column_sums(w, x, WARPS) + _column_sums(w >> 16, x >> 16, WARPS)


@triton.jit
def _stack(a, b, c, d):
    """Four tensors side by side in a last dimension of four."""
    both = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(both, a.shape + [4])


@triton.jit
def _column_sums(w, x, WARPS: tl.constexpr):
    """[LANES] of the lower halves of int32 w and x [LANES, 4, 4], as float16."""
    w = tl.reshape(w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), (WARPS, 8, 1, 64))
    x = tl.reshape(x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), (WARPS, 4, 2, 64))
    value, rest = tl.split(tl.permute(x, (0, 1, 3, 2)))
    x = tl.reshape(value + rest / REST_FACTOR, (WARPS, 1, 4, 64))
    return tl.reshape(tl.sum(w * x, axis=3), (WARPS * 32,))
