"""A vector that all threads of a program loaded together, spread to what each of them multiplies.

Loaded directly, each thread's 32 or 64 bytes stand apart, and a warp's load touches 8 or 16 lines of the L1 cache
rather than 4: by that count five vectors and a norm take 4.6 us of that cache's time for E4M3 rows and 1.2 for bfloat16
ones. Through the memory that sums.py uses each element is loaded once.
"""

import triton
import triton.language as tl

from common.sm90 import ptx


@triton.constexpr_function
def spread_words(run: int, threads: int) -> int:
    """float32 that spread_vector needs at least: what all sharers, or all threads, have at a time."""
    return max(run, 4 * threads)


@triton.constexpr_function
def _end(k0: int, piece: int, k: int, step: int) -> int:
    """Where a piece from k0 on ends, in whole steps."""
    return min(k0 + piece, -(-k // step) * step)


@triton.jit
def spread_vector(
    memory,
    x,
    K: tl.constexpr,
    SHARERS: tl.constexpr,
    COPIES: tl.constexpr,
    EACH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """x as load_thread_vector gives it for SHARERS threads a row, COPIES and EACH, from what it gives for all threads.

    memory: address of WORDS float32, see spread_words, which nobody else uses now. It may be used again when this
    returns. Where the vector is longer it goes through in pieces.
    """
    THREADS: tl.constexpr = x[0].shape[1]
    LEAST: tl.constexpr = spread_words(EACH * SHARERS, THREADS)
    PIECE: tl.constexpr = WORDS // LEAST * LEAST
    thread = tl.arange(0, THREADS)[None, :]
    sharer = tl.arange(0, SHARERS)[None, :] + 0 * tl.arange(0, COPIES)[:, None]
    blocks = ()
    for k0 in tl.static_range(0, K, PIECE):
        for k in tl.static_range(k0, _end(k0, PIECE, K, LEAST), 4 * THREADS):
            at = memory + _place((k - k0) // 4 + thread)
            if k < 4 * THREADS * (len(x) // 4):
                ptx.store_4_floats(at, x[k // THREADS], x[k // THREADS + 1], x[k // THREADS + 2], x[k // THREADS + 3])
            else:
                zero = tl.zeros_like(x[0])
                ptx.store_4_floats(at, zero, zero, zero, zero)
        tl.debug_barrier()
        for k in tl.static_range(k0, _end(k0, PIECE, K, EACH * SHARERS), EACH * SHARERS):
            for part in tl.static_range(EACH // 4):
                chunk = (k - k0) // 4 + sharer * (EACH // 4) + part
                blocks = blocks + ptx.load_4_floats(memory + _place(chunk))
        tl.debug_barrier()
    return blocks


@triton.jit
def _place(chunk):
    """Byte of 16-byte chunk number `chunk`: eight threads' loads, 2 or 4 chunks apart, fall into different banks."""
    return 16 * (chunk ^ (chunk // 8 % 4))
