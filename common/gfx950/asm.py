"""gfx950 instructions that Triton does not offer."""

import triton
import triton.language as tl

DRAIN = tl.constexpr("s_waitcnt vmcnt(0) lgkmcnt(0)\n\tv_mov_b32 $0, 0")
WRITE_BACK = tl.constexpr("buffer_wbl2 sc1\n\ts_waitcnt vmcnt(0)\n\tv_mov_b32 $0, 0")
WRITE_BACK_TO_RANKS = tl.constexpr("buffer_wbl2 sc0 sc1\n\ts_waitcnt vmcnt(0)\n\tv_mov_b32 $0, 0")
LOAD_WORD_NOW = tl.constexpr("global_load_dword $0, $1, off sc0 sc1\n\ts_waitcnt vmcnt(0)")
LOAD_LONG_NOW = tl.constexpr("global_load_dwordx2 $0, $1, off sc0 sc1\n\ts_waitcnt vmcnt(0)")
ZERO = tl.constexpr("s_mov_b32 $0, 0")
CLOCK = tl.constexpr("s_memrealtime $0\n\ts_waitcnt lgkmcnt(0)")
E4M3_TO_FLOAT32 = tl.constexpr("""v_cvt_f32_fp8_sdwa $0, $4 src0_sel:BYTE_0
            v_cvt_f32_fp8_sdwa $1, $4 src0_sel:BYTE_1
            v_cvt_f32_fp8_sdwa $2, $4 src0_sel:BYTE_2
            v_cvt_f32_fp8_sdwa $3, $4 src0_sel:BYTE_3""")

E2M1_TO_FLOAT32 = tl.constexpr("""v_cvt_scalef32_pk_f32_fp4 $0, $4, 1.0
            v_cvt_scalef32_pk_f32_fp4 $1, $4, 1.0 op_sel:[1,0,0]
            v_cvt_scalef32_pk_f32_fp4 $2, $4, 1.0 op_sel:[0,1,0]
            v_cvt_scalef32_pk_f32_fp4 $3, $4, 1.0 op_sel:[1,1,0]""")


@triton.jit
def publish():
    """Wait until this program's stores have left its waves, and write them back to where the whole device sees them.

    `tl.debug_barrier()` is a bare s_barrier here, which waves may pass with stores still in flight. A release atomic
    should write back, but LLVM drops its wait behind buffer_wbl2 if it knows of no other access in flight.
    """
    tl.inline_asm_elementwise(DRAIN, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    tl.inline_asm_elementwise(WRITE_BACK, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def publish_to_ranks():
    """Wait until this program's stores have left its waves, and write them back to where other GPUs see them."""
    tl.inline_asm_elementwise(DRAIN, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    tl.inline_asm_elementwise(WRITE_BACK_TO_RANKS, "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_now(ptr):
    """Return the int32 or int64 at ptr, read where all GPUs see the same. Triton's volatile load may read a cache."""
    address = [ptr.to(tl.int64)]
    if ptr.dtype.element_ty == tl.int64:
        return tl.inline_asm_elementwise(
            LOAD_LONG_NOW, "=&v,v,~{memory}", address, dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            LOAD_WORD_NOW, "=&v,v,~{memory}", address, dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def opaque_zero():
    """Return 0, of which the compiler only knows that it is a multiple of 16.

    Index vectors that contain it are not kept in registers from phase to phase and from layer to layer.
    """
    return 16 * tl.inline_asm_elementwise(ZERO, "=s", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def clock_ns():
    """Return nanoseconds, int64, of a clock of 100 MHz that all programs share."""
    return 10 * tl.inline_asm_elementwise(CLOCK, "=s", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def e4m3_to_float32(words):
    """Return the four E4M3 elements of each int32, lowest byte first, as float32."""
    return tl.inline_asm_elementwise(
        E4M3_TO_FLOAT32,
        "=&v,=&v,=&v,=&v,v",
        [words],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def e2m1_words_to_float32(words):
    """Return the eight E2M1 elements of each int32 as a tuple of float32, lowest bits first."""
    pairs = tl.inline_asm_elementwise(
        E2M1_TO_FLOAT32,
        "=&v,=&v,=&v,=&v,v",
        [words],
        dtype=(tl.int64, tl.int64, tl.int64, tl.int64),
        is_pure=True,
        pack=1,
    )
    x0, x1 = _halves(pairs[0])
    x2, x3 = _halves(pairs[1])
    x4, x5 = _halves(pairs[2])
    x6, x7 = _halves(pairs[3])
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _halves(pair):
    """Return the low and the high half of each int64, as float32."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
