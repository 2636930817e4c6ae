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
def write_back(ARCH: tl.constexpr):
    """On gfx950 make this workgroup's drained stores visible to the device, and wait until they are.

    A release atomic is meant to do so, but LLVM drops its wait behind buffer_wbl2 where it knows of no other access in
    flight. Elsewhere nothing: the atomic that follows must release.
    """
    if ARCH == "hip":
        tl.inline_asm_elementwise(
            "buffer_wbl2 sc1\n\ts_waitcnt vmcnt(0)\n\tv_mov_b32 $0, 0",
            "=v,~{memory}",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def opaque_zero(ARCH: tl.constexpr):
    """0, a multiple of 16, of which gfx950's compiler does not know that it is 0.

    Index vectors that contain it are not kept in registers from phase to phase and from layer to layer.
    """
    if ARCH == "hip":
        return 16 * tl.inline_asm_elementwise("s_mov_b32 $0, 0", "=s", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return 0


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
