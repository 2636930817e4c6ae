"""bfloat16 matrices as NVIDIA's tensor cores take them: rows of a matrix times a float32 vector, to its precision.

The instruction is mma.m16n8k16, and everything is laid out as its threads hold it, as in common/fp4_fragments.py. A
block of 8 rows is the right operand: lane 4 n + t of a warp holds columns 8 t .. 8 t + 7 of row n in a window of 32
columns. host/fragments.py packs a matrix in that order. A block's windows are cut into units of the stream.

The vector is the left operand. Its rows 0, 1 and 2 are three bfloat16 vectors that add up to the float32 one, to 24
bits; the others are zeros.
"""

import triton
import triton.language as tl

from common.ring import load_words, store_word

BLOCK_ROWS = tl.constexpr(8)
WINDOW = tl.constexpr(32)  # columns
WINDOW_BYTES = tl.constexpr(512)  # of a block
VECTOR_PARTS = tl.constexpr(3)

# Two products: of a row's four words the first takes two, the second the others. The vector's four words stand in rows
# r and r + 8 of the left operand, so that they need not be moved: half of each product, sums 2 and 3 of the first and
# 0 and 1 of the second, is of no use.
MULTIPLY_WINDOW = tl.constexpr("""
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {$0, $1, $2, $3}, {$16, $17, $18, $19}, {$20, $21}, {$8, $9, $10, $11};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {$4, $5, $6, $7}, {$16, $17, $18, $19}, {$22, $23}, {$12, $13, $14, $15};
""")
CONSTRAINTS = tl.constexpr("=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r")
FLOATS = tl.constexpr((tl.float32,) * 8)


@triton.constexpr_function
def window_count(k: int) -> int:
    """Windows of a row."""
    return -(-k // 32)


@triton.constexpr_function
def unit_windows(k: int, slot_bytes: int) -> int:
    """Windows of a unit: a block's, or equal parts of them that fit a slot."""
    windows = -(-k // 32)
    units = -(-windows // (slot_bytes // 512))
    return -(-windows // units)


@triton.constexpr_function
def unit_count(k: int, slot_bytes: int) -> int:
    """Units of a block."""
    windows = -(-k // 32)
    units = -(-windows // (slot_bytes // 512))
    each = -(-windows // units)
    return -(-windows // each)


@triton.jit
def load_unit_vector(x_ptr, K: tl.constexpr, SLOT_BYTES: tl.constexpr):
    """x [K] as float32 blocks, one for each unit of a row, zeros beyond K and beyond the unit."""
    COLUMNS: tl.constexpr = unit_windows(K, SLOT_BYTES) * WINDOW
    i = tl.arange(0, triton.next_power_of_2(COLUMNS))
    blocks = ()
    for unit in tl.static_range(unit_count(K, SLOT_BYTES)):
        k = unit * COLUMNS + i
        blocks = blocks + (tl.load(x_ptr + k, mask=(i < COLUMNS) & (k < K), other=0.0),)
    return blocks


@triton.jit
def stage_vector(x, area, K: tl.constexpr, SLOT_BYTES: tl.constexpr, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """What gemv_bf16_fragments takes of load_unit_vector's blocks: words [LANES], a tuple for each unit.

    `area`: shared memory of vector_bytes that no thread reads any more.
    """
    if ARCH == "cuda":
        WINDOWS: tl.constexpr = unit_windows(K, SLOT_BYTES)
        COLUMNS: tl.constexpr = WINDOWS * WINDOW
        STEPS: tl.constexpr = (WINDOWS + WARPS - 1) // WARPS
        PART_BYTES: tl.constexpr = unit_count(K, SLOT_BYTES) * COLUMNS * 2
        pair = tl.arange(0, x[0].shape[0] // 2)
        place = pair // 4 * 4 + pair % 2 * 2 + pair // 2 % 2  # the second and the third of four words change places
        for unit in tl.static_range(len(x)):
            rest = x[unit]
            for part in tl.static_range(VECTOR_PARTS):
                value = rest.to(tl.bfloat16)
                rest -= value.to(tl.float32)
                even, odd = tl.split(tl.reshape(value.to(tl.int16, bitcast=True).to(tl.int32), (x[0].shape[0] // 2, 2)))
                at = area + part * PART_BYTES + unit * (COLUMNS * 2) + place * 4
                store_word(at, (even & 0xFFFF) | (odd << 16), pair < COLUMNS // 2)
        tl.debug_barrier()
        lane = tl.arange(0, 32 * WARPS)
        units = ()
        for unit in tl.static_range(len(x)):
            words = ()
            for step in tl.static_range(STEPS):
                window = step * WARPS + lane // 32
                at = area + lane % 32 // 4 * PART_BYTES + unit * (COLUMNS * 2) + window * (WINDOW * 2) + lane % 4 * 16
                words = words + load_words(at, (lane % 32 // 4 < VECTOR_PARTS) & (window < WINDOWS), True, ARCH)
            units = units + (words,)
        return units
    else:
        return x


@triton.constexpr_function
def vector_bytes(k: int, slot_bytes: int) -> int:
    """Shared memory that stage_vector needs."""
    windows = -(-k // 32)
    units = -(-windows // (slot_bytes // 512))
    each = -(-windows // units)
    return 3 * 64 * each * -(-windows // each)


@triton.jit
def gemv_bf16_fragments(
    sums, address, x, UNIT: tl.constexpr, K: tl.constexpr, SLOT_BYTES: tl.constexpr, WARPS: tl.constexpr, ARCH: tl.constexpr
):
    """Add unit number UNIT of a block, at `address` in a slot of the ring, times the vector to `sums`.

    sums: eight float32 [LANES], begun with zeros; see row_sums.
    """
    WINDOWS: tl.constexpr = unit_windows(K, SLOT_BYTES)
    LANES: tl.constexpr = 32 * WARPS
    lane = tl.arange(0, LANES)
    if ARCH == "cuda":
        STEPS: tl.constexpr = (WINDOWS + WARPS - 1) // WARPS
        LAST: tl.constexpr = min(WINDOWS, window_count(K) - UNIT * WINDOWS) - 1
        for step in tl.static_range(STEPS):
            # Beyond the unit x is zero, but what lies there need not be finite.
            window = tl.minimum(step * WARPS + lane // 32, LAST)
            w = load_words(address + window * WINDOW_BYTES + lane % 32 * 16, lane >= 0, False, ARCH)
            sums = tl.inline_asm_elementwise(
                MULTIPLY_WINDOW,
                CONSTRAINTS,
                [sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7],
                 x[UNIT][4 * step], x[UNIT][4 * step + 1], x[UNIT][4 * step + 2], x[UNIT][4 * step + 3],
                 w[0], w[1], w[2], w[3]],
                dtype=FLOATS,
                is_pure=True,
                pack=1,
            )  # fmt: skip
        return sums
    else:
        # Lane 4 r + t has rows 2 t and 2 t + 1; all of their sums are given to r = 0 of the first warp.
        WORDS: tl.constexpr = x[UNIT].shape[0] // WINDOW * 128
        i = tl.arange(0, WORDS)
        inside = (i < WINDOWS * 128) & (UNIT * WINDOWS * 128 + i < window_count(K) * 128)
        words = tl.load(address.to(tl.pointer_type(tl.int32)) + i, mask=inside, other=0)
        pairs = tl.join((words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True))
        pairs = tl.reshape(pairs, (WORDS // 128, 4, 2, 32))  # window, pair of rows, row, t and column
        products = pairs * tl.reshape(x[UNIT], (WORDS // 128, 1, 1, 32))
        even, odd = tl.split(tl.sum(tl.sum(products, axis=3), axis=0))
        first = tl.reshape(tl.broadcast_to(tl.arange(0, LANES // 4)[:, None] == 0, (LANES // 4, 4)), (LANES,))
        even = tl.reshape(tl.broadcast_to(even[None, :], (LANES // 4, 4)), (LANES,))
        odd = tl.reshape(tl.broadcast_to(odd[None, :], (LANES // 4, 4)), (LANES,))
        even, odd = sums[0] + tl.where(first, even, 0.0), sums[1] + tl.where(first, odd, 0.0)
        return even, odd, sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]


@triton.jit
def row_sums(sums):
    """What each thread has of a block's even and of its odd rows, for sum_blocks."""
    return sums[0] + sums[6], sums[1] + sums[7]


@triton.jit
def sum_blocks(even, odd, WARPS: tl.constexpr):
    """Rows float32 [8 blocks] of what row_sums gave for each, [blocks, LANES] of even and of odd rows."""
    BLOCKS: tl.constexpr = even.shape[0]
    sums = tl.sum(tl.reshape(tl.join(even, odd), (BLOCKS, WARPS, 8, 4, 2)), axis=2)
    return tl.reshape(tl.sum(sums, axis=1), (BLOCKS * BLOCK_ROWS,))
