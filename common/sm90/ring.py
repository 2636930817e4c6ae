"""A ring of stages in shared memory that the copy engine fills ahead of time, in the order in which a program reads.

    Triton's own | mbarriers, 8 bytes a stage | stage 0 | stage 1 | ... | more_bytes for who asks for them
                 ^ ring                       ^ ring + BARRIER_BYTES

One thread asks for a tile of weights with one instruction (cp.async.bulk), which takes no registers, and a stage's
mbarrier tells when its bytes have arrived. open_ring leaves a note in the PTX from which host/shared_memory.py makes
room behind Triton's own shared memory.
"""

import triton
import triton.language as tl

from common.sm90 import ptx

BARRIER_BYTES = tl.constexpr(128)  # one mbarrier a stage
DESCRIPTION_BYTES = tl.constexpr(32)  # of a tile, see describe_tile


def _open_asm(stages: int, stage_bytes: int, more_bytes: int = 0) -> str:
    """PTX that gives the ring's address and makes its mbarriers ready for one thread's arrival a phase."""
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
    """The address of a ring whose stages are all empty."""
    ASM: tl.constexpr = OPEN(STAGES, STAGE_BYTES, MORE_BYTES)
    ring = tl.inline_asm_elementwise(ASM, "=&r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    return ring


@triton.jit
def behind_stages(ring, STAGES: tl.constexpr, STAGE_BYTES: tl.constexpr):
    """The address of the MORE_BYTES."""
    return ring + BARRIER_BYTES + STAGES * STAGE_BYTES


@triton.jit
def fill_stage(ring, n, description, STAGES: tl.constexpr, STAGE_BYTES: tl.constexpr):
    """Ask for tile number n = 0, 1, ..., which describe_tile described at the address `description`.

    All threads must have read what the stage held, and stored the description, as a barrier tells.
    """
    stage = n % STAGES
    ptx.copy_tile(ring + stage * 8, ring + BARRIER_BYTES + stage * STAGE_BYTES, description)


@triton.jit
def describe_tile(address, ptr, n_bytes, more_ptr, more_bytes, mask):
    """Store at each of `address`, DESCRIPTION_BYTES, where a tile's two pieces lie; the second may have 0 bytes.

    Bytes and addresses in memory are int64, multiples of 16.
    """
    ptx.store_4_longs_if(address, ptr, n_bytes, more_ptr, more_bytes, mask)


@triton.jit
def wait_for_stage(ring, n, STAGES: tl.constexpr, STAGE_BYTES: tl.constexpr):
    """The address of tile number n in its stage, when its bytes have arrived."""
    stage = n % STAGES
    at = ring + BARRIER_BYTES + stage * STAGE_BYTES
    return ptx.wait_for_copy(ring + stage * 8, (n // STAGES) & 1, at)
