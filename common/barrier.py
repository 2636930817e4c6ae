"""The grid barrier of a persistent kernel: every program waits until all have arrived.

`sync_ptr` is an int32 buffer of SYNC_WORDS zeros. Arrivals only ever count up within a launch, so barrier number i
(from 1) is open once i * n_programs have arrived. The last program to leave the kernel zeroes the counters for the
next launch. No wait is endless: a program that gives up records the barrier's number at ABORT and pushes the arrivals
beyond every target, so that all programs run out of the kernel; the record stays until the host clears it.
"""

import triton
import triton.language as tl

from common.arch import drain_stores, write_back

# Each word on its own 128-byte line: polling one must not slow the others.
ARRIVALS = tl.constexpr(0)
EXITS = tl.constexpr(32)
ABORT = tl.constexpr(64)
SYNC_WORDS = 96

OPEN_ALL = tl.constexpr(1 << 30)


@triton.jit
def grid_barrier(sync_ptr, index, n_programs, SPIN_LIMIT: tl.constexpr, ARCH: tl.constexpr):
    """Wait at barrier `index` (1, 2, ...). All stores before it, of any program, are visible after it."""
    arrive(sync_ptr, ARCH)
    wait(sync_ptr, index, n_programs, SPIN_LIMIT, ARCH)


@triton.jit
def arrive(sync_ptr, ARCH: tl.constexpr):
    """The first half of a barrier. What is read between the halves must not be written by any program."""
    count_arrival(sync_ptr + ARRIVALS, ARCH)


@triton.jit
def wait(sync_ptr, index, n_programs, SPIN_LIMIT: tl.constexpr, ARCH: tl.constexpr):
    """The second half."""
    wait_for(sync_ptr + ARRIVALS, index * n_programs, sync_ptr, index, SPIN_LIMIT, ARCH)


@triton.jit
def count_arrival(counter_ptr, ARCH: tl.constexpr):
    """Count one more at an int32, behind all that this program stored."""
    drain_stores(ARCH)
    tl.debug_barrier()
    write_back(ARCH)
    RELEASE: tl.constexpr = "relaxed" if ARCH == "hip" else "release"
    tl.atomic_add(counter_ptr, 1, sem=RELEASE, scope="gpu")


@triton.jit
def wait_for(counter_ptr, target, sync_ptr, index, SPIN_LIMIT: tl.constexpr, ARCH: tl.constexpr):
    """Wait until `target` arrivals are counted; what they stored before is visible then. Gives up as barrier index."""
    arrived = 0
    spins = 0
    while (arrived < target) & (spins < SPIN_LIMIT):
        arrived = _poll(counter_ptr, target, ARCH)
        spins += 1
    if ARCH != "cuda":
        # The acquire's result must be used, or Triton 3.6 drops the acquire on sm_90.
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    if arrived < target:
        tl.atomic_cas(sync_ptr + ABORT, 0, index, sem="relaxed", scope="gpu")
        tl.atomic_max(sync_ptr + ARRIVALS, OPEN_ALL, sem="relaxed", scope="gpu")
    tl.debug_barrier()


# One warp polls, and the others wait at the barrier behind the loop: were all of them to poll, they would hold up the
# arrivals (2.20 ms a token against 2.08). Triton would hand each poll's result to all threads through shared memory,
# and acquire by one more trip to memory (2.09 ms).
POLL = tl.constexpr("""{
    .reg .pred polling;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.lt.u32 polling, thread, 32;
    mov.s32 $0, $2;
    @polling ld.acquire.gpu.global.s32 $0, [$1];
}""")


@triton.jit
def _poll(counter_ptr, target, ARCH: tl.constexpr):
    """What is counted; `target` for the warps that do not poll."""
    if ARCH == "cuda":
        at = counter_ptr.to(tl.int64)
        return tl.inline_asm_elementwise(POLL, "=&r,l,r,~{memory}", [at, target], dtype=tl.int32, is_pure=False, pack=1)
    else:
        # Relaxed: an acquire per poll would invalidate the cache each time. Triton 3.6 hoists a volatile load.
        return tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu")


@triton.jit
def arrive_last(counter_ptr, n_expected, ARCH: tl.constexpr):
    """Count an arrival; True for the one that completes `n_expected`, which then sees all stores before the others'.

    The last one zeroes the counter again, so the next use must be ordered after this one by a barrier.
    """
    drain_stores(ARCH)
    tl.debug_barrier()
    write_back(ARCH)
    ORDER: tl.constexpr = "acquire" if ARCH == "hip" else "acq_rel"
    is_last = tl.atomic_add(counter_ptr, 1, sem=ORDER, scope="gpu") == n_expected - 1
    tl.debug_barrier()
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def leave_grid(sync_ptr, n_programs, ARCH: tl.constexpr):
    """Called once by each program at its end."""
    if arrive_last(sync_ptr + EXITS, n_programs, ARCH):
        tl.store(sync_ptr + ARRIVALS, 0)
