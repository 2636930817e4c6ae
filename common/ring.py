"""A ring of slots in shared memory that the copy engine fills ahead of time, in the order in which a program reads.

On NVIDIA (sm_90) one thread asks for a unit of weights with one instruction (cp.async.bulk), which takes no registers,
and a slot's mbarrier tells when its bytes have arrived. Elsewhere nothing is copied: a slot holds the addresses of its
unit's two pieces, so that the interpreter runs the same order of units.

The slots lie behind Triton's own shared memory. open_ring leaves a note in the PTX from which
host/shared_memory.py makes room for them.
"""

import triton
import triton.language as tl

BARRIER_BYTES = tl.constexpr(128)  # one mbarrier a slot
UNIT_BYTES = tl.constexpr(32)  # of a description, see store_unit


def _open_asm(slots: int, slot_bytes: int, more_bytes: int = 0) -> str:
    """PTX that gives the ring's address and makes its barriers ready, one thread's arrival a phase.

    more_bytes are kept free behind the slots.
    """
    ring_bytes = BARRIER_BYTES.value + slots * slot_bytes + more_bytes
    lines = [
        f"// shared memory behind Triton's own: {ring_bytes} bytes",
        ".reg .pred first; .reg .u32 thread;",
        "mov.u32 thread, %tid.x;",
        "setp.eq.u32 first, thread, 0;",
        "mov.u32 $0, global_smem;",
        "mov.u32 thread, %dynamic_smem_size;",
        "add.u32 $0, $0, thread;",
        f"sub.u32 $0, $0, {ring_bytes};",
        *(f"@first mbarrier.init.shared.b64 [$0+{8 * slot}], 1;" for slot in range(slots)),
        "@first fence.mbarrier_init.release.cluster;",
        "@first fence.proxy.async;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


OPEN = triton.constexpr_function(_open_asm)

# Weights are read once a token: they leave the L2 cache first. The second piece, if any, lands behind the first.
COPY = tl.constexpr("""{
    .reg .pred other, more;
    .reg .u32 place, bytes, more_bytes;
    .reg .u64 policy, from, more_from, size;
    mov.u32 $0, 0;
    mov.u32 place, %tid.x;
    setp.ne.u32 other, place, 0;
    @other bra done;
    ld.shared.v2.u64 {from, size}, [$3];
    cvt.u32.u64 bytes, size;
    ld.shared.v2.u64 {more_from, size}, [$3+16];
    cvt.u32.u64 more_bytes, size;
    createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
    add.u32 place, bytes, more_bytes;
    mbarrier.arrive.expect_tx.shared.b64 _, [$1], place;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
        [$2], [from], bytes, [$1], policy;
    setp.ne.u32 more, more_bytes, 0;
    add.u32 place, $2, bytes;
    @more cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
        [place], [more_from], more_bytes, [$1], policy;
done:
}""")

# Bounded, as every wait here: copies that never end are a bug, and a trap is better than a GPU that hangs.
WAIT = tl.constexpr("""{
    .reg .pred done;
    .reg .u32 spins;
    mov.u32 spins, 0;
again:
    mbarrier.try_wait.parity.shared.b64 done, [$1], $2;
    @done bra arrived;
    add.u32 spins, spins, 1;
    setp.lt.u32 done, spins, 0x1000000;
    @done bra again;
    trap;
arrived:
    mov.u32 $0, $3;
}""")


@triton.jit
def open_ring(SLOTS: tl.constexpr, SLOT_BYTES: tl.constexpr, MORE_BYTES: tl.constexpr, ARCH: tl.constexpr):
    """What the other functions take as `slots`: all of them empty. On NVIDIA MORE_BYTES behind them are free."""
    if ARCH == "cuda":
        ASM: tl.constexpr = OPEN(SLOTS, SLOT_BYTES, MORE_BYTES)
        slots = tl.inline_asm_elementwise(ASM, "=&r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        return slots
    else:
        empty = tl.zeros([triton.next_power_of_2(SLOTS)], tl.int64)
        return empty, empty


@triton.jit
def behind_slots(slots, SLOTS: tl.constexpr, SLOT_BYTES: tl.constexpr):
    """Where the free bytes are, on NVIDIA."""
    return slots + BARRIER_BYTES + SLOTS * SLOT_BYTES


@triton.jit
def fill_slot(slots, n, unit, SLOTS: tl.constexpr, SLOT_BYTES: tl.constexpr, ARCH: tl.constexpr):
    """Ask for unit number n = 0, 1, ..., whose pieces store_unit described at address `unit`.

    All threads must have read what the slot held, and stored the unit, as a barrier tells.
    """
    slot = n % SLOTS
    if ARCH == "cuda":
        tl.inline_asm_elementwise(
            COPY,
            "=&r,r,r,r,~{memory}",
            [slots + slot * 8, slots + BARRIER_BYTES + slot * SLOT_BYTES, unit],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        return slots
    else:
        mine = tl.arange(0, slots[0].shape[0]) == slot
        unit = unit.to(tl.pointer_type(tl.int64))
        return tl.where(mine, tl.load(unit), slots[0]), tl.where(mine, tl.load(unit + 2), slots[1])


@triton.jit
def store_unit(address, ptr, n_bytes, more_ptr, more_bytes, mask, ARCH: tl.constexpr):
    """Describe at each of `address`, UNIT_BYTES, a unit's two pieces, the second of which may have 0 bytes.

    Bytes and addresses are multiples of 16. All int64 but mask, and on NVIDIA `address`, int32.
    """
    if ARCH == "cuda":
        tl.inline_asm_elementwise(
            """{ .reg .pred inside; setp.ne.s32 inside, $6, 0; mov.u32 $0, 0;
            @inside st.shared.v2.u64 [$1], {$2, $3}; @inside st.shared.v2.u64 [$1+16], {$4, $5}; }""",
            "=&r,r,l,l,l,l,r",
            [address, ptr, n_bytes, more_ptr, more_bytes, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        unit = address.to(tl.pointer_type(tl.int64))
        tl.store(unit, ptr, mask=mask)
        tl.store(unit + 1, n_bytes, mask=mask)
        tl.store(unit + 2, more_ptr, mask=mask)
        tl.store(unit + 3, more_bytes, mask=mask)


@triton.jit
def wait_for_slot(slots, n, PLACE: tl.constexpr, SLOTS: tl.constexpr, SLOT_BYTES: tl.constexpr, ARCH: tl.constexpr):
    """Wait for unit number n; returns the addresses of its two pieces, the second PLACE bytes into the slot."""
    slot = n % SLOTS
    if ARCH == "cuda":
        at = slots + BARRIER_BYTES + slot * SLOT_BYTES
        at = tl.inline_asm_elementwise(
            WAIT,
            "=&r,r,r,r,~{memory}",
            [slots + slot * 8, (n // SLOTS) & 1, at],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        return at, at + PLACE
    else:
        mine = tl.arange(0, slots[0].shape[0]) == slot
        return tl.sum(tl.where(mine, slots[0], 0), axis=0), tl.sum(tl.where(mine, slots[1], 0), axis=0)


@triton.jit
def load_words(address, mask, MASKED: tl.constexpr, ARCH: tl.constexpr):
    """The four int32 words at each of `address` in a slot, a multiple of 16.

    Zeros where not `mask`, but on NVIDIA only if MASKED.
    """
    if ARCH == "cuda":
        if MASKED:
            return tl.inline_asm_elementwise(
                "{ .reg .pred inside; setp.ne.s32 inside, $5, 0;\n"
                "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;\n"
                "@inside ld.shared.v4.b32 {$0, $1, $2, $3}, [$4]; }",
                "=&r,=&r,=&r,=&r,r,r",
                [address, mask.to(tl.int32)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=False,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,r",
                [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=False,
                pack=1,
            )
    else:
        ptr = address.to(tl.pointer_type(tl.int32))
        a = tl.load(ptr, mask=mask, other=0)
        b = tl.load(ptr + 1, mask=mask, other=0)
        c = tl.load(ptr + 2, mask=mask, other=0)
        return a, b, c, tl.load(ptr + 3, mask=mask, other=0)


@triton.jit
def load_byte(address, mask, ARCH: tl.constexpr):
    """The byte at each of `address`, int32; elsewhere than on NVIDIA 0 where not `mask`."""
    if ARCH == "cuda":
        return tl.inline_asm_elementwise(
            "ld.shared.u8 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.load(address.to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.int32)


@triton.jit
def load_word(address, mask, ARCH: tl.constexpr):
    """The int32 word at each of `address`; elsewhere than on NVIDIA 0 where not `mask`."""
    if ARCH == "cuda":
        return tl.inline_asm_elementwise(
            "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.load(address.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
