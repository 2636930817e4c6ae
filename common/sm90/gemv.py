"""Rows of a dense matrix, in a stage of the ring, times a float32 vector, accumulated in float32.

A thread reads 16 bytes of a row at a time. `threads` threads share a row: thread t has bytes 16 t .. 16 t + 15 of each
run of 16 `threads` bytes, and holds the elements of the vector that meet them. A program of more threads holds as many
copies of the vector, each of which meets rows of its own:

    row 0   | t0 | t1 | ... | t(threads - 1) | t0 | t1 | ...      copy 0
    row 1   | t0 | t1 | ... | t(threads - 1) | t0 | t1 | ...      copy 1
"""

import triton
import triton.language as tl

from common.gemv_bf16 import halves_to_float32
from common.gemv_dense import item_bytes, scale_stride
from common.quant import GROUP, e8m0_to_float32
from common.sm90 import ptx


@triton.constexpr_function
def row_threads(k: int, dense_format: str, dense_tuning) -> int:
    """Threads that share a row of a tile: threads_per_row, or half of them where too many have nothing to read.

    2,880 columns of E4M3 keep 94% of 64 threads busy and 70% of 128.
    """

    def busy(threads: int) -> float:
        run = threads * (8 if dense_format == "bf16" else 16)
        return k / (-(-k // run) * run)

    threads = dense_tuning.threads_per_row
    halves = dense_format != "bf16" and threads > 32 and busy(threads // 2) > 1.1 * busy(threads)
    return threads // 2 if halves else threads


@triton.jit
def by_thread(x):
    """[..., 4 N] -> four [..., N]: what is in places 4 i .. 4 i + 3 is thread i's own."""
    N: tl.constexpr = x.shape[len(x.shape) - 1] // 4
    even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [N, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return (a, b, c, d)


@triton.jit
def load_thread_vector(x_ptr, K: tl.constexpr, THREADS: tl.constexpr, COPIES: tl.constexpr, EACH: tl.constexpr = 8):
    """x [K] as the products below take it, zeros beyond K: EACH float32 [COPIES, THREADS] for each run of a row.

    EACH is how many elements 16 bytes of a row are.
    """
    i = tl.arange(0, 4 * THREADS)[None, :] + 0 * tl.arange(0, COPIES)[:, None]
    blocks = ()
    for k0 in tl.static_range(0, K, EACH * THREADS):
        for part in tl.static_range(EACH // 4):
            k = k0 + i // 4 * EACH + 4 * part + i % 4
            blocks = blocks + by_thread(tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32))
    return blocks


@triton.jit
def multiply_rows(address, x, n_rows, MATRIX: tl.constexpr):
    """What each thread has of the tile at `address`, times a vector.

    float32 [tile_rows / COPIES, COPIES, THREADS], to be summed over THREADS. Rows from n_rows on are whatever the stage
    holds. Scales of whole rows ("fp8-row") are left to the caller.
    """
    FORMAT: tl.constexpr = MATRIX.format
    if FORMAT == "bf16":
        return multiply_bf16_rows(address, x, MATRIX.k, MATRIX.tile_rows)
    else:
        return multiply_fp8_rows(address, x, n_rows, MATRIX.k, MATRIX.tile_rows, FORMAT)


@triton.jit
def multiply_bf16_rows(address, x, K: tl.constexpr, ROWS: tl.constexpr):
    """multiply_rows of bfloat16, whose K is a multiple of 8."""
    COPIES: tl.constexpr = x[0].shape[0]
    THREADS: tl.constexpr = x[0].shape[1]
    PART: tl.constexpr = ROWS // COPIES
    thread = tl.arange(0, THREADS)[None, None, :]
    row = tl.arange(0, PART)[:, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None]
    at = address + row * (2 * K) + thread * 16
    acc = tl.zeros([PART, COPIES, THREADS], tl.float32)
    for run in tl.static_range(len(x) // 8):
        element = run * 8 * THREADS + 8 * thread
        words = load_run(at + run * 16 * THREADS, (element < K) & (row >= 0), (run + 1) * 8 * THREADS > K)
        for i in tl.static_range(4):
            even, odd = x[8 * run + 2 * i], x[8 * run + 2 * i + 1]
            low, high = halves_to_float32(words[i])
            acc += low * even[None, :, :]
            acc += high * odd[None, :, :]
    return acc


@triton.jit
def load_run(address, inside, IS_LAST: tl.constexpr):
    """A thread's four words of a run, of which the last one may reach beyond the row: zeros there."""
    if IS_LAST:
        return ptx.load_4_words_if(address, inside)
    else:
        return ptx.load_4_words(address)


@triton.jit
def multiply_fp8_rows(address, x, n_rows, K: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr):
    """multiply_rows of E4M3, whose K is a multiple of 16; with "fp8-32" scales stand behind the n_rows rows."""
    COPIES: tl.constexpr = x[0].shape[0]
    THREADS: tl.constexpr = x[0].shape[1]
    PART: tl.constexpr = ROWS // COPIES
    STRIDE: tl.constexpr = scale_stride(K, FORMAT)
    thread = tl.arange(0, THREADS)[None, None, :]
    row = tl.arange(0, PART)[:, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None]
    at = address + row * K + thread * 16
    scales_at = address + tl.minimum(n_rows, ROWS) * K
    acc = tl.zeros([PART, COPIES, THREADS], tl.float32)
    for run in tl.static_range(len(x) // 16):
        element = run * 16 * THREADS + 16 * thread
        inside = (element < K) & (row >= 0)
        words = load_run(at + run * 16 * THREADS, inside, (run + 1) * 16 * THREADS > K)
        part = tl.zeros([PART, COPIES, THREADS], tl.float32)
        for i in tl.static_range(4):
            w = ptx.e4m3_to_float32(words[i])
            for j in tl.static_range(4):
                part += w[j] * x[16 * run + 4 * i + j][None, :, :]
        if FORMAT == "fp8-32":
            scale = ptx.load_byte(scales_at + row * STRIDE + element // GROUP)
            if (run + 1) * 16 * THREADS > K:
                scale = tl.where(inside, scale, 0)  # there may be the NaN of another tile
            part *= e8m0_to_float32(scale)
        acc += part
    return acc


@triton.constexpr_function
def elements_each(dense_format: str) -> int:
    """Elements of a row that 16 bytes are."""
    return 16 // item_bytes(dense_format)
