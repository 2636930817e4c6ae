"""The grid barrier of a persistent kernel: every program waits until all have arrived.

`sync_ptr` is an int32 buffer of SYNC_WORDS zeros. Arrivals only ever count up within a launch, so barrier number i
(from 1) is open once i * n_programs have arrived. The last program to leave the kernel zeroes the counters for the
next launch. No wait is endless: a program that gives up records the barrier's number at ABORT and raises the arrivals
beyond every target, so that all programs leave the kernel; the record stays until the host clears it.
"""

import triton
import triton.language as tl

# Each word on its own 128-byte line: polling one must not slow the others.
ARRIVALS = tl.constexpr(0)
EXITS = tl.constexpr(32)
ABORT = tl.constexpr(64)
SYNC_WORDS = 96

OPEN_ALL = tl.constexpr(1 << 30)
LAYER_BARRIERS = tl.constexpr(6)  # of a layer in the megakernel: one behind each of host/phases.py's PHASES


@triton.jit
def grid_barrier(sync_ptr, index, n_programs, SPIN_LIMIT: tl.constexpr, MACHINE: tl.constexpr):
    """Wait at barrier `index` (1, 2, ...). All stores before it, of any program, are visible after it."""
    arrive(sync_ptr, MACHINE)
    wait(sync_ptr, index, n_programs, SPIN_LIMIT, MACHINE)


@triton.jit
def arrive(sync_ptr, MACHINE: tl.constexpr):
    """Arrive at a barrier. Until `wait` a program may read only memory that no program writes."""
    count_arrival(sync_ptr + ARRIVALS, MACHINE)


@triton.jit
def wait(sync_ptr, index, n_programs, SPIN_LIMIT: tl.constexpr, MACHINE: tl.constexpr):
    """Wait until all programs have arrived at barrier `index`."""
    SYNC: tl.constexpr = MACHINE.sync
    wait_for(sync_ptr + ARRIVALS, index * n_programs, sync_ptr, index, SPIN_LIMIT, SYNC)


@triton.jit
def count_arrival(counter_ptr, MACHINE: tl.constexpr):
    """Add one to an int32, ordered after all that this program stored."""
    MACHINE.sync.publish()
    tl.atomic_add(counter_ptr, 1, sem=MACHINE.sync.release, scope="gpu")


@triton.jit
def wait_for(counter_ptr, target, sync_ptr, index, SPIN_LIMIT: tl.constexpr, SYNC: tl.constexpr):
    """Wait until `target` arrivals are counted and what they stored before is visible; give up as barrier `index`."""
    if poll_until(counter_ptr, target, SPIN_LIMIT, SYNC) < target:
        give_up(sync_ptr, index)
    tl.debug_barrier()


@triton.jit
def poll_until(counter_ptr, target, SPIN_LIMIT: tl.constexpr, SYNC: tl.constexpr):
    """Return a counter that has reached `target`, or what it is after SPIN_LIMIT polls."""
    arrived = 0
    spins = 0
    while (arrived < target) & (spins < SPIN_LIMIT):
        arrived = SYNC.poll(counter_ptr, target)
        spins += 1
    return SYNC.acquire(counter_ptr, arrived)


@triton.jit
def give_up(sync_ptr, index):
    """Record the barrier that gave up first, and open all barriers."""
    tl.atomic_cas(sync_ptr + ABORT, 0, index, sem="relaxed", scope="gpu")
    tl.atomic_max(sync_ptr + ARRIVALS, OPEN_ALL, sem="relaxed", scope="gpu")


@triton.jit
def arrive_last(counter_ptr, n_expected, MACHINE: tl.constexpr):
    """Count an arrival and return whether it is the last of `n_expected`; the last sees what the others stored before.

    The last one zeroes the counter, so a barrier must order the next use after this one.
    """
    MACHINE.sync.publish()
    is_last = tl.atomic_add(counter_ptr, 1, sem=MACHINE.sync.acquire_release, scope="gpu") == n_expected - 1
    tl.debug_barrier()
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def leave_grid(sync_ptr, n_programs, MACHINE: tl.constexpr):
    """Leave the kernel; each program calls this once at its end, and the last one zeroes the counters."""
    if arrive_last(sync_ptr + EXITS, n_programs, MACHINE):
        tl.store(sync_ptr + ARRIVALS, 0)
