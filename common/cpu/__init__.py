"""Triton's interpreter on a CPU: rows are read straight from memory when they are multiplied."""

import triton
import triton.language as tl

from common import gemv_fp8, plain_sync, rows
from common.machine import Dense, Feed, Machine, Synchronization
from common.prompt_rows import ROWS

CLOCK = tl.constexpr("clock_ns $0;")  # interpreter/assembly.py implements it


@triton.jit
def no_zero():
    """Return 0, as there are no registers to save."""
    return 0


@triton.jit
def load_now(ptr):
    """Return what is at ptr now, which another program may change."""
    return tl.load(ptr, volatile=True)


@triton.jit
def clock_ns():
    """Return nanoseconds of the host's clock, int64."""
    return tl.inline_asm_elementwise(CLOCK, "=l", [], dtype=tl.int64, is_pure=False, pack=1)


SYNC = Synchronization(
    publish=plain_sync.publish,
    release="release",
    acquire_release="acq_rel",
    poll=plain_sync.poll,
    acquire=plain_sync.acquire,
    clock_ns=clock_ns,
)
CPU = Machine(
    name="cpu",
    opaque_zero=no_zero,
    load_now=load_now,
    sync=SYNC,
    rank_sync=SYNC,
    feed=Feed(
        open=rows.open_feed,
        open_phase=rows.open_phase,
        extend=rows.extend,
        ask_small=rows.ask_nothing_small,
        ask_qkv=rows.ask_nothing,
        ask_part_of_qkv=rows.ask_no_part,
        ask_o=rows.ask_nothing,
        ask_experts=rows.ask_no_experts,
        ask_head=rows.ask_no_head,
    ),
    dense=Dense(
        load_vector=rows.load_vector,
        load_normed=rows.load_normed,
        multiply=rows.multiply,
        e4m3_to_float32=gemv_fp8.e4m3_to_float32,
    ),
    experts=rows.EXPERTS,
    prompts=ROWS,
)
