"""common.ring: interpreted, where slots hold addresses, and the PTX for NVIDIA as text."""

import re

import pytest
import torch
import triton
import triton.language as tl

from common.ring import (
    BARRIER_BYTES,
    COPY,
    OPEN,
    UNIT_BYTES,
    WAIT,
    fill_slot,
    load_word,
    load_words,
    open_ring,
    store_unit,
    wait_for_slot,
)
from host.shared_memory import REQUEST

SIZES = [(2, 8192), (3, 33024), (8, 25600), (16, 128)]


@triton.jit
def ring_kernel(out_ptr, first_ptr, second_ptr, units_ptr, n_units, AHEAD: tl.constexpr, SLOTS: tl.constexpr):
    """out [units, 2]: the addresses of each unit's pieces, which are 16 bytes further for each unit."""
    slots = open_ring(SLOTS, 256, 0, "cpu")
    units = units_ptr.to(tl.int64)
    n = tl.arange(0, 64)
    first, second = (first_ptr + 4 * n).to(tl.int64), (second_ptr + 4 * n).to(tl.int64)
    sizes = tl.full([64], 16, tl.int64)
    store_unit(units + n * UNIT_BYTES, first, sizes, second, sizes, n < n_units + AHEAD, "cpu")
    for n in range(AHEAD):
        slots = fill_slot(slots, n, units + n * UNIT_BYTES, SLOTS, 256, "cpu")
    for n in range(n_units):
        pieces = wait_for_slot(slots, n, 128, SLOTS, 256, "cpu")
        tl.store(out_ptr + 2 * n, pieces[0])
        tl.store(out_ptr + 2 * n + 1, pieces[1])
        after = n + AHEAD
        slots = fill_slot(slots, after, units + after * UNIT_BYTES, SLOTS, 256, "cpu")


@triton.jit
def words_kernel(out_ptr, ptr, mask_ptr, N: tl.constexpr):
    """out [5, N]: the four words at each of N places, and the first of them alone."""
    i = tl.arange(0, N)
    address, mask = (ptr + 4 * i).to(tl.int64), tl.load(mask_ptr + i) != 0
    words = load_words(address, mask, True, "cpu")
    for part in tl.static_range(4):
        tl.store(out_ptr + part * N + i, words[part])
    tl.store(out_ptr + 4 * N + i, load_word(address, mask, "cpu"))


def units(n: int, ahead: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(addresses that the ring gives, addresses of the units) [n, 2]."""
    memory = torch.zeros(2, 4, dtype=torch.int32)
    out = torch.zeros(n, 2, dtype=torch.int64)
    described = torch.zeros(64, 4, dtype=torch.int64)
    ring_kernel[(1,)](out, memory[0], memory[1], described, n, AHEAD=ahead, SLOTS=slots)
    assert not described[n + ahead :].any()  # nor written where masked
    starts = torch.tensor([memory[0].data_ptr(), memory[1].data_ptr()])
    return out, starts + 16 * torch.arange(n)[:, None]


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_units_come_back_in_order_however_far_ahead(slots):
    """Several times around the ring."""
    for ahead in range(1, slots + 1):
        found, expected = units(3 * slots + 2, ahead, slots)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_a_unit_too_far_ahead_takes_the_place_of_one_that_waits(slots):
    """So that a stream which asks too early gives wrong results in the interpreter too."""
    found, expected = units(2 * slots, slots + 1, slots)
    assert (found[0] == expected[0] + 16 * slots).all()


def test_words_in_a_slot():
    """Nothing is read where the mask forbids."""
    source = torch.arange(100, 132, dtype=torch.int32)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.int32)
    out = torch.full((5, 8), -1, dtype=torch.int32)
    words_kernel[(1,)](out, source, mask, N=8)
    expected = source.view(8, 4) * mask[:, None]
    assert torch.equal(out, torch.cat((expected, expected[:, :1]), dim=1).T)


@pytest.mark.parametrize("slots, slot_bytes", SIZES)
def test_an_opened_ring_asks_for_its_bytes_and_begins_that_far_before_the_end(slots, slot_bytes):
    ptx = OPEN(slots, slot_bytes)
    ring_bytes = BARRIER_BYTES.value + slots * slot_bytes
    assert REQUEST.findall(ptx) == [str(ring_bytes)]
    order = [
        "mov.u32 $0, global_smem;",
        "%dynamic_smem_size;",
        "add.u32 $0, $0, thread;",
        f"sub.u32 $0, $0, {ring_bytes};",
    ]
    assert [ptx.count(line) for line in order] == [1] * 4
    assert [ptx.index(line) for line in order] == sorted(ptx.index(line) for line in order)


@pytest.mark.parametrize("slots, slot_bytes", SIZES)
def test_each_slot_has_a_barrier_of_one_arrival(slots, slot_bytes):
    """Made by one thread, eight bytes apart, before the slots; the copy engine sees them."""
    ptx = OPEN(slots, slot_bytes)
    made = re.findall(r"@first mbarrier\.init\.shared\.b64 \[\$0\+(\d+)\], 1;", ptx)
    assert ptx.count("mbarrier.init") == len(made) == slots
    assert [int(at) for at in made] == [8 * slot for slot in range(slots)]
    assert 8 * slots <= BARRIER_BYTES.value
    for fence in ("@first fence.mbarrier_init.release.cluster;", "@first fence.proxy.async;"):
        assert ptx.index(fence) > ptx.rindex("mbarrier.init")


def test_one_thread_copies_both_pieces_and_expects_their_bytes():
    ptx = COPY.value
    assert ptx.index("setp.ne.u32 other, place, 0;") < ptx.index("@other bra done;")
    described = ["ld.shared.v2.u64 {from, size}, [$3];", "ld.shared.v2.u64 {more_from, size}, [$3+16];"]
    assert ptx.index("@other bra done;") < ptx.index(described[0]) < ptx.index(described[1])
    expected = ptx.index("mbarrier.arrive.expect_tx.shared.b64 _, [$1], place;")
    assert "add.u32 place, bytes, more_bytes;" in ptx[:expected]
    copies = re.findall(r"(@more )?cp\.async\.bulk\.\S+\s+\[(\S+)\], \[(\S+)\], (\S+), \[(\S+)\], policy;", ptx)
    assert copies == [("", "$2", "from", "bytes", "$1"), ("@more ", "place", "more_from", "more_bytes", "$1")]
    assert ptx.index("cp.async.bulk") > expected
    assert ptx.index("setp.ne.u32 more, more_bytes, 0;") < ptx.index("@more")  # no second piece: no copy of nothing
    assert ptx.index("add.u32 place, $2, bytes;") > ptx.index("cp.async.bulk")


def test_a_wait_is_for_a_phase_and_has_an_end():
    ptx = WAIT.value
    assert "mbarrier.try_wait.parity.shared.b64 done, [$1], $2;" in ptx
    assert ptx.index("setp.lt.u32 done, spins") < ptx.index("@done bra again;") < ptx.index("trap;")
    assert ptx.index("trap;") < ptx.index("arrived:")
