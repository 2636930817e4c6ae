"""Ask for bytes ahead of time."""

import triton
import triton.language as tl


@triton.jit
def prefetch_l2(ptr, n_bytes, ARCH: tl.constexpr):
    """Start to bring n_bytes from ptr on into the L2 cache, as far as they fill pieces of 16; nothing waits for them.

    On NVIDIA (sm_90) one instruction of one thread. Elsewhere nothing happens: the reader fetches what it needs.
    """
    if ARCH == "cuda":
        tl.inline_asm_elementwise(
            """{
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                setp.ne.and.u32 first, $2, 0, first;
                @first cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [ptr.to(tl.int64) & -16, tl.cast(n_bytes, tl.int32) & -16],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
