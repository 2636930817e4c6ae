"""Timestamps of a launch, taken by every program at every barrier.

`trace_ptr` is int64 [2 + 2 * barriers, n_programs]. Event 0 is a program's start, event 2 b - 1 its arrival at barrier
b (1, 2, ...), event 2 b its leaving it, and the last one its end.
"""

import triton
import triton.language as tl

from common.arch import clock_ns


@triton.jit
def mark(trace_ptr, event, pid, n_programs, TRACE: tl.constexpr, ARCH: tl.constexpr):
    """Note the time of an event; nothing at all without TRACE."""
    if TRACE:
        tl.debug_barrier()  # the time at which all warps are here
        tl.store(trace_ptr + event * n_programs + pid, clock_ns(ARCH))
