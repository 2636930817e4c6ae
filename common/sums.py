"""Rows' sums over the warps of a program, through memory that each program has for itself.

Triton's own reductions exchange between warps with two or three barriers each and, as layouts differ, several times for
one sum; here each warp leaves its part, and after one barrier whoever needs a row adds its parts up. That memory is
shared memory behind the ring on NVIDIA, a piece of State elsewhere.
"""

import triton
import triton.language as tl

from common.fp4_fragments import PAIRS


@triton.constexpr_function
def sum_words(tuning) -> int:
    """float32 that a program needs for the tiles of one batch."""
    dense = tuning.dense_batch * max(tuning.qkv_m, tuning.o_m, tuning.head_m) * tuning.dense_lanes // 32
    return max(dense, tuning.expert_batch * 2 * PAIRS.value * tuning.num_warps)


@triton.jit
def leave_dense(sums, number, acc, BATCH: tl.constexpr, ARCH: tl.constexpr):
    """Leave tile number 0 .. BATCH - 1's rows, as gemv_bf16_slot has them in acc [PART, COPIES, LANES]."""
    PART: tl.constexpr = acc.shape[0]
    COPIES: tl.constexpr = acc.shape[1]
    WARPS: tl.constexpr = acc.shape[2] // 32
    ROWS: tl.constexpr = PART * COPIES
    parts = tl.sum(tl.reshape(acc, (PART, COPIES, WARPS, 32)), axis=3, keep_dims=True)
    row = tl.arange(0, PART)[:, None, None, None] * COPIES + tl.arange(0, COPIES)[None, :, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None]
    # By all lanes of a warp: in this shape Triton has the sums, in a smaller one it would exchange them first.
    lane = tl.arange(0, 32)[None, None, None, :]
    at = sums + 4 * ((warp * BATCH + number) * ROWS + row + 0 * lane)
    store_word(at, parts + tl.zeros([PART, COPIES, WARPS, 32], tl.float32), ARCH)


@triton.jit
def collect_dense(sums, N: tl.constexpr, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """The rows of a batch, float32 [N]; WARPS shared each of them."""
    tl.debug_barrier()
    at = sums + 4 * tl.arange(0, N)
    y = load_float(at, ARCH)
    for warp in tl.static_range(1, WARPS):
        y += load_float(at + 4 * N * warp, ARCH)
    return y


@triton.jit
def leave_fragments(sums, number, even, odd, BATCH: tl.constexpr, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """Leave tile number 0 .. BATCH - 1's rows, as gemv_fp4_fragments has them."""
    even = tl.sum(tl.reshape(even, (WARPS, PAIRS, 4)), axis=2)
    odd = tl.sum(tl.reshape(odd, (WARPS, PAIRS, 4)), axis=2)
    N: tl.constexpr = BATCH * PAIRS
    warp, pair = tl.arange(0, WARPS)[:, None], tl.arange(0, PAIRS)[None, :]
    at = sums + 4 * (warp * 2 * N + number * PAIRS + pair)
    store_word(at, even, ARCH)
    store_word(at + 4 * N, odd, ARCH)


@triton.jit
def collect_fragments(sums, BATCH: tl.constexpr, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """(even, odd) rows of a batch, float32 [8 BATCH] each: 0, 2, ... 14 of the first tile, of the next one, ..."""
    tl.debug_barrier()
    N: tl.constexpr = BATCH * PAIRS
    at = sums + 4 * tl.arange(0, N)
    even, odd = load_float(at, ARCH), load_float(at + 4 * N, ARCH)
    for warp in tl.static_range(1, WARPS):
        even += load_float(at + 4 * N * 2 * warp, ARCH)
        odd += load_float(at + 4 * N * (2 * warp + 1), ARCH)
    return even, odd


@triton.jit
def store_word(address, value, ARCH: tl.constexpr):
    """float32 to each of `address`."""
    if ARCH == "cuda":
        tl.inline_asm_elementwise(
            "st.shared.f32 [$1], $2; mov.u32 $0, 0;",
            "=r,r,f",
            [address, value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)), value)


@triton.jit
def load_float(address, ARCH: tl.constexpr):
    """The float32 at each of `address`."""
    if ARCH == "cuda":
        return tl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        return tl.load(address.to(tl.pointer_type(tl.float32)))


@triton.jit
def store_float4(address, a, b, c, d, ARCH: tl.constexpr):
    """Four float32 to each of `address`, multiples of 16."""
    if ARCH == "cuda":
        tl.inline_asm_elementwise(
            "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;",
            "=r,r,f,f,f,f",
            [address, a, b, c, d],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        ptr = address.to(tl.pointer_type(tl.float32))
        tl.store(ptr, a)
        tl.store(ptr + 1, b)
        tl.store(ptr + 2, c)
        tl.store(ptr + 3, d)


@triton.jit
def load_float4(address, ARCH: tl.constexpr):
    """The four float32 at each of `address`, multiples of 16."""
    if ARCH == "cuda":
        return tl.inline_asm_elementwise(
            "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,r",
            [address],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        ptr = address.to(tl.pointer_type(tl.float32))
        return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
