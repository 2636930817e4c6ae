"""Rows of a bfloat16 matrix times a float32 vector, accumulated in float32.

Loading is a step of its own, so that a kernel can load the next tile's weights while it multiplies. A matrix is read as
int32 words of two elements, each of which is a float32 after one shift or mask (as bfloat16 they would take a register
each where they live from one iteration of a loop to the next). A vector, and a tile's rows, are tuples of blocks over
K, so that K need not be near a power of two; a vector has two blocks for each of a tile: even elements and odd ones.
"""

import triton
import triton.language as tl


@triton.jit
def load_split_vector(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, zero=0):
    """Return x [K] as float32 blocks [BLOCK_K / 2]: even elements, odd, even, ... and zeros beyond K.

    `zero`: see Machine.opaque_zero.
    """
    blocks = ()
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K) + zero
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (BLOCK_K // 2, 2)))
        blocks = blocks + (even, odd)
    return blocks


@triton.jit
def load_bf16_rows(w_ptr, row0, end_row, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, zero=0):
    """Return rows row0 .. of W, bfloat16 [rows, K] given as int32, as int32 blocks [BLOCK_M, BLOCK_K / 2].

    Beyond K and from end_row on nothing is read, and zeros stand there.
    """
    row = tl.arange(0, BLOCK_M)
    w_ptr += tl.cast(row0, tl.int64) * (K // 2)
    blocks = ()
    for k0 in tl.static_range(0, K // 2, BLOCK_K // 2):
        k = k0 + tl.arange(0, BLOCK_K // 2) + zero
        mask = (row0 + row < end_row)[:, None] & (k < K // 2)[None, :]
        blocks = blocks + (
            tl.load(w_ptr + row[:, None] * (K // 2) + k[None, :], mask=mask, other=0, eviction_policy="evict_first"),
        )
    return blocks


@triton.jit
def gemv_bf16(tile, x):
    """Return tile @ x, float32 [BLOCK_M], of what load_bf16_rows and load_split_vector return for the same blocks."""
    acc = _products(tile[0], x[0][None, :], x[1][None, :])
    for i in tl.static_range(1, len(tile)):
        acc += _products(tile[i], x[2 * i][None, :], x[2 * i + 1][None, :])
    return tl.sum(acc, axis=1)


@triton.jit
def _products(words, even, odd):
    low, high = halves_to_float32(words)
    return low * even + high * odd


@triton.jit
def halves_to_float32(words):
    """Return the two bfloat16 of each int32, the lower half first, as float32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
