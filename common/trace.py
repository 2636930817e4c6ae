"""Timestamps of a launch, taken by every program at every barrier.

`trace_ptr` is int64 [2 + 2 * barriers, n_programs]. Event 0 is a program's start, event 2 b - 1 its arrival at barrier
b (1, 2, ...), event 2 b its leaving it, and the last one its end.
"""

import triton
import triton.language as tl


@triton.jit
def mark(ctx, event, BUILD: tl.constexpr):
    """Note the time of an event; nothing at all unless the build traces."""
    if BUILD.trace:
        tl.debug_barrier()  # the time at which all warps are here
        tl.store(ctx.s.trace + event * ctx.n_programs + ctx.program, BUILD.machine.sync.clock_ns())
