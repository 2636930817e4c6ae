"""common.sm90.ring: interpreted, where copies are made at once, and the PTX for NVIDIA as text."""

import re

import pytest
import torch
import triton
import triton.language as tl

from common.sm90 import ptx
from common.sm90.ptx import COPY, WAIT
from common.sm90.ring import (
    BARRIER_BYTES,
    DESCRIPTION_BYTES,
    OPEN,
    TilePieces,
    behind_stages,
    describe_tile,
    fill_stage,
    open_ring,
    wait_for_stage,
)
from host.shared_memory import REQUEST

SIZES = [(2, 8192), (3, 33024), (8, 25600), (16, 128)]
KNOWN = tl.constexpr(64)  # places for descriptions
UNWRITTEN = -1  # int32 and int64 of shared memory that nobody has written


@triton.jit
def ring_kernel(out_ptr, described_ptr, first_ptr, second_ptr, n_tiles, AHEAD: tl.constexpr, STAGES: tl.constexpr):
    """Write out [tiles, 8]: each tile's two pieces of 16 bytes, from first and second [tiles, 4]; and descriptions."""
    ring = open_ring(STAGES, 256, KNOWN * DESCRIPTION_BYTES)
    descriptions = behind_stages(ring, STAGES, 256)
    n = tl.arange(0, KNOWN)
    first, second = (first_ptr + 4 * n).to(tl.int64), (second_ptr + 4 * n).to(tl.int64)
    sizes = tl.full([KNOWN], 16, tl.int64)
    describe_tile(descriptions + n * DESCRIPTION_BYTES, TilePieces(first, sizes, second, sizes), n < n_tiles + AHEAD)
    for n in range(AHEAD):
        fill_stage(ring, n, descriptions + n * DESCRIPTION_BYTES, STAGES, 256)
    word = tl.arange(0, 8)
    for n in range(n_tiles):
        at = wait_for_stage(ring, n, STAGES, 256)
        tl.store(out_ptr + 8 * n + word, ptx.load_word(at + 4 * word))
        after = n + AHEAD
        fill_stage(ring, after, descriptions + after * DESCRIPTION_BYTES, STAGES, 256)
    word = tl.arange(0, KNOWN * DESCRIPTION_BYTES // 4)
    tl.store(described_ptr + word, ptx.load_word(descriptions + 4 * word))


@triton.jit
def words_kernel(out_ptr, ptr, mask_ptr, N: tl.constexpr):
    """Write out [5, N], of ptr [4 N]: the four words at each of N places in shared memory, and the first word alone."""
    memory = open_ring(0, 0, 16 * N) + BARRIER_BYTES
    i = tl.arange(0, N)
    for part in tl.static_range(4):
        ptx.store_float(memory + 16 * i + 4 * part, tl.load(ptr + 4 * i + part).to(tl.float32, bitcast=True))
    mask = tl.load(mask_ptr + i) != 0
    words = ptx.load_4_words_if(tl.where(mask, memory + 16 * i, 1 << 20), mask)
    for part in tl.static_range(4):
        tl.store(out_ptr + part * N + i, words[part])
    tl.store(out_ptr + 4 * N + i, ptx.load_word(memory + 16 * i))


def tiles(n: int, ahead: int, stages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tiles that the ring gives [n, 8], all tiles [64, 8])."""
    first, second = torch.arange(2 * KNOWN.value * 4, dtype=torch.int32).view(2, -1, 4)
    out = torch.zeros(n, 8, dtype=torch.int32)
    described = torch.zeros(KNOWN.value, DESCRIPTION_BYTES.value // 8, dtype=torch.int64)
    ring_kernel[(1,)](out, described.view(torch.int32), first, second, n, AHEAD=ahead, STAGES=stages)
    addresses = [torch.arange(KNOWN.value) * 16 + piece.data_ptr() for piece in (first, second)]
    sizes = torch.full_like(addresses[0], 16)
    expected = torch.stack((addresses[0], sizes, addresses[1], sizes), dim=1)
    assert torch.equal(described[: n + ahead], expected[: n + ahead])
    assert (described[n + ahead :] == UNWRITTEN).all()  # nor written where masked
    return out, torch.cat((first, second), dim=1)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
def test_tiles_come_back_in_order_however_far_ahead(stages):
    """The tiles go around the ring several times."""
    for ahead in range(1, stages + 1):
        found, expected = tiles(3 * stages + 2, ahead, stages)
        assert torch.equal(found, expected[: len(found)])


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
def test_a_tile_too_far_ahead_takes_the_place_of_one_that_waits(stages):
    """A feed that asks too early thus gives wrong results in the interpreter too."""
    found, expected = tiles(2 * stages, stages + 1, stages)
    assert torch.equal(found[0], expected[stages])


def test_words_in_a_stage_are_read_where_the_mask_allows():
    """Masked words are not read."""
    source = torch.arange(100, 132, dtype=torch.int32)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.int32)
    out = torch.full((5, 8), -1, dtype=torch.int32)
    words_kernel[(1,)](out, source, mask, N=8)
    expected = source.view(8, 4)
    assert torch.equal(out, torch.cat((expected * mask[:, None], expected[:, :1]), dim=1).T)


@pytest.mark.parametrize("stages, stage_bytes", SIZES)
def test_an_opened_ring_asks_for_its_bytes_and_begins_that_far_before_the_end(stages, stage_bytes):
    text = OPEN(stages, stage_bytes)
    ring_bytes = BARRIER_BYTES.value + stages * stage_bytes
    assert REQUEST.findall(text) == [str(ring_bytes)]
    order = [
        "mov.u32 $0, global_smem;",
        "%dynamic_smem_size;",
        "add.u32 $0, $0, thread;",
        f"sub.u32 $0, $0, {ring_bytes};",
    ]
    assert [text.count(line) for line in order] == [1] * 4
    assert [text.index(line) for line in order] == sorted(text.index(line) for line in order)


@pytest.mark.parametrize("stages, stage_bytes", SIZES)
def test_each_stage_has_a_barrier_of_one_arrival(stages, stage_bytes):
    """One thread makes the barriers, eight bytes apart, before the stages; the copy engine sees them."""
    text = OPEN(stages, stage_bytes)
    made = re.findall(r"@first mbarrier\.init\.shared\.b64 \[\$0\+(\d+)\], 1;", text)
    assert text.count("mbarrier.init") == len(made) == stages
    assert [int(at) for at in made] == [8 * stage for stage in range(stages)]
    assert 8 * stages <= BARRIER_BYTES.value
    for fence in ("@first fence.mbarrier_init.release.cluster;", "@first fence.proxy.async;"):
        assert text.index(fence) > text.rindex("mbarrier.init")


def test_one_thread_copies_both_pieces_and_expects_their_bytes():
    text = COPY.value
    assert text.index("setp.ne.u32 other, place, 0;") < text.index("@other bra done;")
    described = ["ld.shared.v2.u64 {from, size}, [$3];", "ld.shared.v2.u64 {more_from, size}, [$3+16];"]
    assert text.index("@other bra done;") < text.index(described[0]) < text.index(described[1])
    expected = text.index("mbarrier.arrive.expect_tx.shared.b64 _, [$1], place;")
    assert "add.u32 place, bytes, more_bytes;" in text[:expected]
    copies = re.findall(r"(@more )?cp\.async\.bulk\.\S+\s+\[(\S+)\], \[(\S+)\], (\S+), \[(\S+)\], policy;", text)
    assert copies == [("", "$2", "from", "bytes", "$1"), ("@more ", "place", "more_from", "more_bytes", "$1")]
    assert text.index("cp.async.bulk") > expected
    assert text.index("setp.ne.u32 more, more_bytes, 0;") < text.index("@more")  # no second piece: no copy of nothing
    assert text.index("add.u32 place, $2, bytes;") > text.index("cp.async.bulk")


def test_a_wait_is_for_a_phase_and_has_an_end():
    text = WAIT.value
    assert "mbarrier.try_wait.parity.shared.b64 done, [$1], $2;" in text
    assert text.index("setp.lt.u32 done, spins") < text.index("@done bra again;") < text.index("trap;")
    assert text.index("trap;") < text.index("arrived:")
