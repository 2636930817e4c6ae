"""Work dealt out while it is done: whoever is ready takes the next piece, so that no program waits for slower ones.

A ticket is drawn one piece of work ahead, since it takes a trip to memory. `counter_ptr` points to an int32 that counts
the tickets drawn; what is drawn must be read, or a program would go on without having waited for it.
"""

import triton
import triton.language as tl

TICKET_STRIDE = tl.constexpr(32)  # from counter to counter: each on its own 128-byte line
DRAW = tl.constexpr("""{
    .reg .pred first;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    mov.s32 $0, 0;
    @first atom.relaxed.gpu.global.add.s32 $0, [$1], 1;
}""")


@triton.jit
def draw_ticket(counter_ptr, WARPS: tl.constexpr, ARCH: tl.constexpr):
    """A ticket, of which nothing is known before read_ticket: thread 0's, and nothing waits for it yet."""
    if ARCH == "cuda":
        thread = tl.arange(0, 32 * WARPS)
        at = counter_ptr.to(tl.int64) + 0 * thread
        return tl.inline_asm_elementwise(DRAW, "=&r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def read_ticket(ticket, ARCH: tl.constexpr):
    """Its number, from 0."""
    if ARCH == "cuda":
        return tl.max(ticket, axis=0)
    else:
        return ticket
