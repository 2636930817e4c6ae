"""Ordering by what Triton itself gives: its barrier among threads and its atomics."""

import triton
import triton.language as tl


@triton.jit
def publish():
    """Order this program's stores before an atomic of one of its threads that releases."""
    tl.debug_barrier()


@triton.jit
def poll(counter_ptr, target):
    """What is counted at an int32; `target` plays no part.

    Relaxed, as an acquire per poll would invalidate the cache each time, and no load, as Triton 3.6 hoists a volatile
    one.
    """
    return tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu")


@triton.jit
def acquire(counter_ptr, seen):
    """What is counted at an int32, behind which the stores of those who counted are visible."""
    return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
