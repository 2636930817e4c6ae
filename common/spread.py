"""A vector that all threads of a program loaded together, spread to what each of them multiplies.

Loaded directly, each thread's 32 or 64 bytes stand apart, and a warp's load touches 8 or 16 lines of the L1 cache
rather than 4: by that count five vectors and a norm take 4.6 us of that cache's time for E4M3 rows and 1.2 for bfloat16
ones. Through the memory that sums.py uses each element is loaded once.
"""

import triton
import triton.language as tl

from common.sums import load_float4, store_float4


@triton.constexpr_function
def spread_words(run: int, threads: int) -> int:
    """float32 that spread_vector needs at least: what all lanes, or all threads, have at a time."""
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
    LANES: tl.constexpr,
    COPIES: tl.constexpr,
    EACH: tl.constexpr,
    WORDS: tl.constexpr,
    ARCH: tl.constexpr,
):
    """x as load_lane_vector gives it for LANES, COPIES and EACH; here as it does for all threads, one copy and 4.

    memory: address of WORDS float32, see spread_words, which nobody else uses now. It may be used again when this
    returns. Where the vector is longer it goes through in pieces.
    """
    THREADS: tl.constexpr = x[0].shape[1]
    LEAST: tl.constexpr = spread_words(EACH * LANES, THREADS)
    PIECE: tl.constexpr = WORDS // LEAST * LEAST
    thread = tl.arange(0, THREADS)[None, :]
    lane = tl.arange(0, LANES)[None, :] + 0 * tl.arange(0, COPIES)[:, None]
    blocks = ()
    for k0 in tl.static_range(0, K, PIECE):
        for k in tl.static_range(k0, _end(k0, PIECE, K, LEAST), 4 * THREADS):
            at = memory + _place((k - k0) // 4 + thread)
            if k < 4 * THREADS * (len(x) // 4):
                store_float4(at, x[k // THREADS], x[k // THREADS + 1], x[k // THREADS + 2], x[k // THREADS + 3], ARCH)
            else:
                zero = tl.zeros_like(x[0])
                store_float4(at, zero, zero, zero, zero, ARCH)
        tl.debug_barrier()
        for k in tl.static_range(k0, _end(k0, PIECE, K, EACH * LANES), EACH * LANES):
            for part in tl.static_range(EACH // 4):
                chunk = (k - k0) // 4 + lane * (EACH // 4) + part
                blocks = blocks + load_float4(memory + _place(chunk), ARCH)
        tl.debug_barrier()
    return blocks


@triton.jit
def _place(chunk):
    """Byte of 16-byte chunk number `chunk`: eight threads' loads, 2 or 4 chunks apart, fall into different banks."""
    return 16 * (chunk ^ (chunk // 8 % 4))
