"""PTX instructions that Triton does not offer: shared memory by address, mbarriers, the copy engine, tensor cores.

Addresses are int32, of shared memory. interpreter/assembly.py says what each text means on a CPU.
"""

import triton
import triton.language as tl

LOAD_WORD = tl.constexpr("ld.shared.b32 $0, [$1];")
LOAD_BYTE = tl.constexpr("ld.shared.u8 $0, [$1];")
LOAD_FLOAT = tl.constexpr("ld.shared.f32 $0, [$1];")
LOAD_4_FLOATS = tl.constexpr("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];")
LOAD_4_WORDS = tl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
LOAD_4_WORDS_IF = tl.constexpr("""{ .reg .pred inside; setp.ne.s32 inside, $5, 0;
mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
@inside ld.shared.v4.b32 {$0, $1, $2, $3}, [$4]; }""")
STORE_FLOAT = tl.constexpr("st.shared.f32 [$1], $2; mov.u32 $0, 0;")
STORE_4_FLOATS = tl.constexpr("st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;")
STORE_4_LONGS_IF = tl.constexpr("""{ .reg .pred inside; setp.ne.s32 inside, $6, 0; mov.u32 $0, 0;
            @inside st.shared.v2.u64 [$1], {$2, $3}; @inside st.shared.v2.u64 [$1+16], {$4, $5}; }""")


@triton.jit
def load_word(address):
    """Return the int32 word at each of `address`."""
    return tl.inline_asm_elementwise(LOAD_WORD, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_byte(address):
    """Return the byte at each of `address`, int32."""
    return tl.inline_asm_elementwise(LOAD_BYTE, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_float(address):
    """Return the float32 at each of `address`."""
    return tl.inline_asm_elementwise(LOAD_FLOAT, "=f,r", [address], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def load_4_floats(address):
    """Return the four float32 at each of `address`, multiples of 16."""
    a, b, c, d = tl.inline_asm_elementwise(
        LOAD_4_FLOATS,
        "=f,=f,=f,=f,r",
        [address],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )
    return a, b, c, d


@triton.jit
def load_4_words(address):
    """Return the four int32 words at each of `address`, multiples of 16."""
    return tl.inline_asm_elementwise(
        LOAD_4_WORDS, "=r,=r,=r,=r,r", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def load_4_words_if(address, mask):
    """Return the four int32 words at each of `address`, multiples of 16; zeros where not `mask`."""
    return tl.inline_asm_elementwise(
        LOAD_4_WORDS_IF,
        "=&r,=&r,=&r,=&r,r,r",
        [address, mask.to(tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_float(address, value):
    """Store float32 at each of `address`."""
    tl.inline_asm_elementwise(STORE_FLOAT, "=r,r,f", [address, value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_4_floats(address, a, b, c, d):
    """Store four float32 at each of `address`, multiples of 16."""
    tl.inline_asm_elementwise(
        STORE_4_FLOATS, "=r,r,f,f,f,f", [address, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def store_4_longs_if(address, a, b, c, d, mask):
    """Store four int64 at each of `address`, multiples of 16, where `mask`."""
    tl.inline_asm_elementwise(
        STORE_4_LONGS_IF,
        "=&r,r,l,l,l,l,r",
        [address, a, b, c, d, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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

# The wait is bounded: copies that never end are a bug, and a trap is better than a GPU that hangs.
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
def copy_tile(barrier, stage, description):
    """Ask the copy engine for the tile that ring.describe_tile described at `description`."""
    tl.inline_asm_elementwise(
        COPY, "=&r,r,r,r,~{memory}", [barrier, stage, description], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_copy(barrier, parity, stage):
    """Wait until the bytes of a stage's phase `parity` have arrived, and return the stage's address."""
    return tl.inline_asm_elementwise(
        WAIT, "=&r,r,r,r,~{memory}", [barrier, parity, stage], dtype=tl.int32, is_pure=False, pack=1
    )


PREFETCH = tl.constexpr("""{
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                setp.ne.and.u32 first, $2, 0, first;
                @first cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, 0;
            }""")


@triton.jit
def prefetch_l2(ptr, n_bytes):
    """Start to bring n_bytes from ptr on into the L2 cache, in whole pieces of 16; nothing waits for them."""
    tl.inline_asm_elementwise(
        PREFETCH,
        "=r,l,r",
        [ptr.to(tl.int64) & -16, tl.cast(n_bytes, tl.int32) & -16],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# One warp polls, and the others wait at the barrier behind the loop: polling by all of them would delay the arrivals
# (2.20 ms per token instead of 2.08). Triton's own atomic would pass each poll's result to all threads through shared
# memory, and acquire by one more trip to memory (2.09 ms).
POLL = tl.constexpr("""{
    .reg .pred polling;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.lt.u32 polling, thread, 32;
    mov.s32 $0, $2;
    @polling ld.acquire.gpu.global.s32 $0, [$1];
}""")


@triton.jit
def poll(counter_ptr, target):
    """Return the int32 at counter_ptr with acquire semantics; warps that do not poll return `target`."""
    return tl.inline_asm_elementwise(
        POLL, "=&r,l,r,~{memory}", [counter_ptr.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1
    )


POLL_RANKS = tl.constexpr(POLL.value.replace("acquire.gpu", "acquire.sys"))


@triton.jit
def poll_ranks(counter_ptr, target):
    """Return the int32 at counter_ptr, which another GPU may change; see poll."""
    return tl.inline_asm_elementwise(
        POLL_RANKS, "=&r,l,r,~{memory}", [counter_ptr.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def acquired(counter_ptr, seen):
    """Return what the last poll saw, as `poll` has acquired."""
    return seen


LOAD_WORD_NOW = tl.constexpr("ld.relaxed.sys.global.b32 $0, [$1];")
LOAD_LONG_NOW = tl.constexpr("ld.relaxed.sys.global.b64 $0, [$1];")


@triton.jit
def load_now(ptr):
    """Return the int32 or int64 at ptr, read where all GPUs see the same. Triton 3.6 hoists even a volatile load."""
    address = [ptr.to(tl.int64)]
    if ptr.dtype.element_ty == tl.int64:
        return tl.inline_asm_elementwise(
            LOAD_LONG_NOW, "=l,l,~{memory}", address, dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            LOAD_WORD_NOW, "=r,l,~{memory}", address, dtype=tl.int32, is_pure=False, pack=1
        )


CLOCK = tl.constexpr("mov.u64 $0, %globaltimer;")


@triton.jit
def clock_ns():
    """Return nanoseconds, int64, of a clock that all programs share."""
    return tl.inline_asm_elementwise(CLOCK, "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def zero():
    """Return 0, as this compiler keeps index vectors out of registers by itself."""
    return 0


E4M3_TO_FLOAT32 = tl.constexpr("""{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 x, y;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 x, low;
            cvt.rn.f16x2.e4m3x2 y, high;
            mov.b32 {a, b}, x;
            mov.b32 {c, d}, y;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""")


@triton.jit
def e4m3_to_float32(words):
    """Return the four E4M3 elements of each int32, lowest byte first, as float32."""
    return tl.inline_asm_elementwise(
        E4M3_TO_FLOAT32,
        "=f,=f,=f,=f,r",
        [words],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
