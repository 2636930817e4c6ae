"""Distribute a vector that all threads of a program loaded together to the threads that multiply its elements.

If each thread loaded its own 32 or 64 bytes, a warp's load would touch 8 or 16 lines of the L1 cache rather than 4: by
that count five vectors and a norm take 4.6 us of the cache's time for E4M3 rows and 1.2 for bfloat16 ones. Through the
shared memory that sums.py uses each element is loaded once.
"""

import triton
import triton.language as tl

from common.sm90 import ptx


@triton.constexpr_function
def spread_words(run: int, threads: int) -> int:
    """Return the least float32 that spread_vector needs: what all sharers, or all threads, have at a time."""
    return max(run, 4 * threads)


@triton.constexpr_function
def _end(k0: int, piece: int, k: int, step: int) -> int:
    """Return where a piece from k0 on ends, in whole steps."""
    return min(k0 + piece, -(-k // step) * step)


@triton.jit
def spread_vector(
    memory,
    x,
    K: tl.constexpr,
    SHARERS: tl.constexpr,
    COPIES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Return x as load_thread_vector loads it for SHARERS threads per row; x is as it loads it for all threads.

    `memory` is the address of WORDS float32, see spread_words, that nobody else uses until this returns. A longer
    vector passes through in pieces.
    """
    THREADS: tl.constexpr = x[0].shape[1]
    MIN_WORDS: tl.constexpr = spread_words(ELEMENTS * SHARERS, THREADS)
    PIECE: tl.constexpr = WORDS // MIN_WORDS * MIN_WORDS
    thread = tl.arange(0, THREADS)[None, :]
    sharer = tl.arange(0, SHARERS)[None, :] + 0 * tl.arange(0, COPIES)[:, None]
    blocks = ()
    for k0 in tl.static_range(0, K, PIECE):
        for k in tl.static_range(k0, _end(k0, PIECE, K, MIN_WORDS), 4 * THREADS):
            address = memory + _byte_of_chunk((k - k0) // 4 + thread)
            if k < 4 * THREADS * (len(x) // 4):
                ptx.store_4_floats(
                    address, x[k // THREADS], x[k // THREADS + 1], x[k // THREADS + 2], x[k // THREADS + 3]
                )
            else:
                zero = tl.zeros_like(x[0])
                ptx.store_4_floats(address, zero, zero, zero, zero)
        tl.debug_barrier()
        for k in tl.static_range(k0, _end(k0, PIECE, K, ELEMENTS * SHARERS), ELEMENTS * SHARERS):
            for i in tl.static_range(ELEMENTS // 4):
                chunk = (k - k0) // 4 + sharer * (ELEMENTS // 4) + i
                blocks = blocks + ptx.load_4_floats(memory + _byte_of_chunk(chunk))
        tl.debug_barrier()
    return blocks


@triton.jit
def _byte_of_chunk(chunk):
    """Return the offset of a 16-byte chunk; eight threads' loads, 2 or 4 chunks apart, then use different banks."""
    return 16 * (chunk ^ (chunk // 8 % 4))
