"""Synchronization with Triton's own barrier among threads and its atomics."""

import triton
import triton.language as tl


@triton.jit
def publish():
    """Order this program's stores before a releasing atomic of one of its threads."""
    tl.debug_barrier()


@triton.jit
def poll(counter_ptr, target):
    """Return the int32 at counter_ptr; `target` is not used.

    The atomic is relaxed, as an acquire per poll would invalidate the cache each time. It is not a load, as Triton 3.6
    hoists even a volatile one.
    """
    return tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu")


@triton.jit
def poll_ranks(counter_ptr, target):
    """Return the int32 at counter_ptr, which another GPU may change; see poll."""
    return tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="sys")


@triton.jit
def acquire_from_ranks(counter_ptr, seen):
    """Return the int32 at counter_ptr; what a GPU stored before it wrote there is visible afterwards."""
    return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys")


@triton.jit
def acquire(counter_ptr, seen):
    """Return the int32 at counter_ptr; what the programs that counted there stored before is visible afterwards."""
    return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
