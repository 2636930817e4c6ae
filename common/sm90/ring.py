"""A ring of stages in shared memory that the copy engine fills ahead of time, in the order in which a program reads.

    Triton's own | mbarriers, 8 bytes per stage | stage 0 | stage 1 | ... | MORE_BYTES for the caller
                 ^ ring                         ^ ring + BARRIER_BYTES

One thread asks for a tile of weights with one instruction (cp.async.bulk), which takes no registers, and a stage's
mbarrier tells when its bytes have arrived. open_ring writes a comment into the PTX, by which host/shared_memory.py
extends Triton's own shared memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from common.sm90 import ptx

BARRIER_BYTES = tl.constexpr(128)  # one mbarrier per stage
DESCRIPTION_BYTES = tl.constexpr(32)  # per tile, see describe_tile


class TilePieces(NamedTuple):
    """Where the two pieces of a tile lie: addresses in memory and bytes, int64, multiples of 16."""

    ptr: Any
    n_bytes: Any
    more_ptr: Any
    more_bytes: Any  # may be 0


def _open_asm(stages: int, stage_bytes: int, more_bytes: int = 0) -> str:
    """Return PTX that gives the ring's address and initializes its mbarriers for one thread's arrival per phase."""
    ring_bytes = BARRIER_BYTES.value + stages * stage_bytes + more_bytes
    lines = [
        f"// shared memory behind Triton's own: {ring_bytes} bytes",
        ".reg .pred first; .reg .u32 thread;",
        "mov.u32 thread, %tid.x;",
        "setp.eq.u32 first, thread, 0;",
        "mov.u32 $0, global_smem;",
        "mov.u32 thread, %dynamic_smem_size;",
        "add.u32 $0, $0, thread;",
        f"sub.u32 $0, $0, {ring_bytes};",
        *(f"@first mbarrier.init.shared.b64 [$0+{8 * stage}], 1;" for stage in range(stages)),
        "@first fence.mbarrier_init.release.cluster;",
        "@first fence.proxy.async;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


OPEN = triton.constexpr_function(_open_asm)


@triton.jit
def open_ring(STAGES: tl.constexpr, STAGE_BYTES: tl.constexpr, MORE_BYTES: tl.constexpr):
    """Return the address of a ring whose stages are all empty."""
    ASM: tl.constexpr = OPEN(STAGES, STAGE_BYTES, MORE_BYTES)
    ring = tl.inline_asm_elementwise(ASM, "=&r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    return ring


@triton.jit
def behind_stages(ring, STAGES: tl.constexpr, STAGE_BYTES: tl.constexpr):
    """Return the address of the ring's MORE_BYTES."""
    return ring + BARRIER_BYTES + STAGES * STAGE_BYTES


@triton.jit
def fill_stage(ring, n, description, STAGES: tl.constexpr, STAGE_BYTES: tl.constexpr):
    """Ask for tile number n = 0, 1, ..., which describe_tile described at the address `description`.

    A barrier must make sure that all threads have read what the stage held, and stored the description.
    """
    stage = n % STAGES
    ptx.copy_tile(ring + stage * 8, ring + BARRIER_BYTES + stage * STAGE_BYTES, description)


@triton.jit
def describe_tile(address, pieces, mask):
    """Store TilePieces at each `address` in shared memory where `mask` holds, DESCRIPTION_BYTES each."""
    ptx.store_4_longs_if(address, pieces.ptr, pieces.n_bytes, pieces.more_ptr, pieces.more_bytes, mask)


@triton.jit
def wait_for_stage(ring, n, STAGES: tl.constexpr, STAGE_BYTES: tl.constexpr):
    """Wait until the bytes of tile number n have arrived, and return its address."""
    stage = n % STAGES
    address = ring + BARRIER_BYTES + stage * STAGE_BYTES
    return ptx.wait_for_copy(ring + stage * 8, (n // STAGES) & 1, address)
