"""Timestamps of a launch, taken by every program at every barrier.

State.trace is int64 [2 + 2 * barriers, n_programs]. Event 0 is a program's start, event 2 b - 1 its arrival at barrier
b (1, 2, ...), event 2 b its departure from it, and the last event its end.
"""

import triton
import triton.language as tl


@triton.jit
def mark(ctx, event, BUILD: tl.constexpr):
    """Store the time of an event if the build traces; else this compiles to nothing."""
    if BUILD.trace:
        tl.debug_barrier()  # so that the time is that of the last warp
        tl.store(ctx.s.trace + event * ctx.n_programs + ctx.program, BUILD.machine.sync.clock_ns())
