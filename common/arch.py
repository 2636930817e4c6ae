"""What differs between targets below Triton's own abstraction. ARCH is "cuda", "hip" or "cpu" (the interpreter)."""

import triton
import triton.language as tl


@triton.jit
def drain_stores(ARCH: tl.constexpr):
    """Wait until this wave's stores have left it.

    On gfx950 `tl.debug_barrier()` is a bare s_barrier, which waves may pass with stores still in flight. On NVIDIA
    bar.sync orders them.
    """
    if ARCH == "hip":
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0) lgkmcnt(0)\n\tv_mov_b32 $0, 0",
            "=v,~{memory}",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def clock_ns(ARCH: tl.constexpr):
    """Nanoseconds of a clock that all programs share, int64.

    %globaltimer on NVIDIA, s_memrealtime (100 MHz) on AMD; the interpreter answers NVIDIA's with the host's clock.
    """
    if ARCH == "hip":
        ticks = tl.inline_asm_elementwise(
            "s_memrealtime $0\n\ts_waitcnt lgkmcnt(0)", "=s", [], dtype=tl.int64, is_pure=False, pack=1
        )
        return ticks * 10
    else:
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
