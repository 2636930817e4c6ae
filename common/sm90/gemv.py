"""Rows of a dense matrix, in a stage of the ring, times a float32 vector, accumulated in float32.

A thread reads 16 bytes of a row at a time. `threads` threads share a row: thread t reads bytes 16 t .. 16 t + 15 of
each run of 16 `threads` bytes, and holds the elements of the vector that are multiplied by them. A program of more
threads holds several copies of the vector, each for rows of its own:

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
    """Return how many threads share a row of a tile: threads_per_row, or half of them if too many would be idle.

    2,880 columns of E4M3 keep 94% of 64 threads busy and 70% of 128.
    """

    def busy_share(threads: int) -> float:
        run = threads * (8 if dense_format == "bf16" else 16)
        return k / (-(-k // run) * run)

    threads = dense_tuning.threads_per_row
    should_halve = dense_format != "bf16" and threads > 32 and busy_share(threads // 2) > 1.1 * busy_share(threads)
    return threads // 2 if should_halve else threads


@triton.jit
def by_thread(x):
    """Return x [..., 4 N] as four [..., N]; thread i holds elements 4 i .. 4 i + 3."""
    N: tl.constexpr = x.shape[len(x.shape) - 1] // 4
    even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [N, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return (a, b, c, d)


@triton.jit
def load_thread_vector(x_ptr, K: tl.constexpr, THREADS: tl.constexpr, COPIES: tl.constexpr, ELEMENTS: tl.constexpr = 8):
    """Return x [K] as multiply_rows takes it, zeros beyond K: ELEMENTS float32 [COPIES, THREADS] per run of a row.

    ELEMENTS: see elements_per_load.
    """
    i = tl.arange(0, 4 * THREADS)[None, :] + 0 * tl.arange(0, COPIES)[:, None]
    blocks = ()
    for k0 in tl.static_range(0, K, ELEMENTS * THREADS):
        for j in tl.static_range(ELEMENTS // 4):
            k = k0 + i // 4 * ELEMENTS + 4 * j + i % 4
            blocks = blocks + by_thread(tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32))
    return blocks


@triton.jit
def multiply_rows(address, x, n_rows, MATRIX: tl.constexpr):
    """Return each thread's sums of the tile at `address` times a vector, float32 [tile_rows / COPIES, COPIES, THREADS].

    Their sum over THREADS is the product. Rows from n_rows on are whatever the stage holds. Scales of whole rows
    ("fp8-row") are left to the caller.
    """
    FORMAT: tl.constexpr = MATRIX.format
    if FORMAT == "bf16":
        return multiply_bf16_rows(address, x, MATRIX.k, MATRIX.tile_rows)
    else:
        return multiply_fp8_rows(address, x, n_rows, MATRIX.k, MATRIX.tile_rows, FORMAT)


@triton.jit
def multiply_bf16_rows(address, x, K: tl.constexpr, ROWS: tl.constexpr):
    """Return multiply_rows of bfloat16, whose K is a multiple of 8."""
    COPIES: tl.constexpr = x[0].shape[0]
    THREADS: tl.constexpr = x[0].shape[1]
    ROWS_PER_COPY: tl.constexpr = ROWS // COPIES
    thread = tl.arange(0, THREADS)[None, None, :]
    row = tl.arange(0, ROWS_PER_COPY)[:, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None]
    row_address = address + row * (2 * K) + thread * 16
    acc = tl.zeros([ROWS_PER_COPY, COPIES, THREADS], tl.float32)
    for run in tl.static_range(len(x) // 8):
        element = run * 8 * THREADS + 8 * thread
        words = load_run(row_address + run * 16 * THREADS, (element < K) & (row >= 0), (run + 1) * 8 * THREADS > K)
        for i in tl.static_range(4):
            even, odd = x[8 * run + 2 * i], x[8 * run + 2 * i + 1]
            low, high = halves_to_float32(words[i])
            acc += low * even[None, :, :]
            acc += high * odd[None, :, :]
    return acc


@triton.jit
def load_run(address, inside, IS_LAST: tl.constexpr):
    """Return a thread's four words of a run; the last run may reach beyond the row, with zeros there."""
    if IS_LAST:
        return ptx.load_4_words_if(address, inside)
    else:
        return ptx.load_4_words(address)


@triton.jit
def multiply_fp8_rows(address, x, n_rows, K: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr):
    """Return multiply_rows of E4M3, whose K is a multiple of 16; with "fp8-32" scales lie behind the n_rows rows."""
    COPIES: tl.constexpr = x[0].shape[0]
    THREADS: tl.constexpr = x[0].shape[1]
    ROWS_PER_COPY: tl.constexpr = ROWS // COPIES
    STRIDE: tl.constexpr = scale_stride(K, FORMAT)
    thread = tl.arange(0, THREADS)[None, None, :]
    row = tl.arange(0, ROWS_PER_COPY)[:, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None]
    row_address = address + row * K + thread * 16
    scales_address = address + tl.minimum(n_rows, ROWS) * K
    acc = tl.zeros([ROWS_PER_COPY, COPIES, THREADS], tl.float32)
    for run in tl.static_range(len(x) // 16):
        element = run * 16 * THREADS + 16 * thread
        inside = (element < K) & (row >= 0)
        words = load_run(row_address + run * 16 * THREADS, inside, (run + 1) * 16 * THREADS > K)
        run_sum = tl.zeros([ROWS_PER_COPY, COPIES, THREADS], tl.float32)
        for i in tl.static_range(4):
            w = ptx.e4m3_to_float32(words[i])
            for j in tl.static_range(4):
                run_sum += w[j] * x[16 * run + 4 * i + j][None, :, :]
        if FORMAT == "fp8-32":
            scale = ptx.load_byte(scales_address + row * STRIDE + element // GROUP)
            if (run + 1) * 16 * THREADS > K:
                scale = tl.where(inside, scale, 0)  # another tile's NaN may be there
            run_sum *= e8m0_to_float32(scale)
        acc += run_sum
    return acc


@triton.constexpr_function
def elements_per_load(dense_format: str) -> int:
    """Return the elements in 16 bytes of a row, which a thread loads at a time."""
    return 16 // item_bytes(dense_format)
