"""common.grouping against Python's stable sort. Memory that must not be read or written holds telltale numbers."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from common.grouping import cut_blocks, group_pairs, load_block

UNTOUCHED = -7
BLOCKS = [16, 64, 512]


@triton.jit
def group_kernel(chosen_ptr, order_ptr, starts_ptr, n_pairs, BLOCK: tl.constexpr):
    group_pairs(chosen_ptr, order_ptr, starts_ptr, tl.program_id(0), n_pairs, BLOCK)


@triton.jit
def cut_kernel(starts_ptr, blocks_ptr, width, n_blocks, E: tl.constexpr, BLOCK: tl.constexpr):
    cut_blocks(starts_ptr, blocks_ptr, width, n_blocks, E, BLOCK)


@triton.jit
def load_kernel(out_ptr, blocks_ptr):
    """Write out [blocks, 3]."""
    block = tl.program_id(0)
    expert, first, end = load_block(blocks_ptr, block)
    tl.store(out_ptr + 3 * block, expert)
    tl.store(out_ptr + 3 * block + 1, first)
    tl.store(out_ptr + 3 * block + 2, end)


def grouped(chosen: list[int], n_experts: int, block: int) -> tuple[list[int], list[int]]:
    """Return (order, starts), one program an expert. Behind the pairs stand choices that do not count."""
    n = len(chosen)
    memory = torch.tensor([*chosen, *[c % n_experts for c in range(block)]], dtype=torch.int32)
    order = torch.full((n + block,), UNTOUCHED, dtype=torch.int32)
    starts = torch.full((n_experts + 2,), UNTOUCHED, dtype=torch.int32)
    group_kernel[(n_experts,)](memory, order, starts, n, BLOCK=block)
    assert (order[n:] == UNTOUCHED).all()
    assert starts[-1] == UNTOUCHED
    return order[:n].tolist(), starts[:-1].tolist()


def blocks_found(starts: list[int], width: int, n_blocks: int, step: int = 2) -> list[list[int]]:
    """Return [expert, first, end] of each block."""
    blocks = torch.full((n_blocks + step, 4), UNTOUCHED, dtype=torch.int32)
    memory = torch.tensor([*starts, *range(1000, 1000 + len(starts))], dtype=torch.int32)
    cut_kernel[(1,)](memory, blocks, width, n_blocks, E=len(starts) - 1, BLOCK=step)
    assert (blocks[n_blocks:] == UNTOUCHED).all()
    out = torch.full((n_blocks, 3), UNTOUCHED, dtype=torch.int32)
    load_kernel[(n_blocks,)](out, blocks)
    return out.tolist()


def starts_of(chosen: list[int], n_experts: int) -> list[int]:
    return [sum(c < expert for c in chosen) for expert in range(n_experts + 1)]


def assert_grouped(chosen: list[int], n_experts: int, block: int) -> None:
    order, starts = grouped(chosen, n_experts, block)
    assert order == sorted(range(len(chosen)), key=lambda pair: chosen[pair])  # which is stable
    assert starts == starts_of(chosen, n_experts)


def assert_blocks(starts: list[int], width: int) -> None:
    """Assert that blocks cut each expert's places into pieces of `width`, in order, and know the expert's end."""
    expected = [
        [expert, first, end]
        for expert, (start, end) in enumerate(itertools.pairwise(starts))
        for first in range(start, end, width)
    ]
    beyond = 3
    found = blocks_found(starts, width, len(expected) + beyond)
    assert found[: len(expected)] == expected
    assert all(expert == len(starts) - 1 for expert, _, _ in found[len(expected) :])


def random_choices(n: int, n_experts: int, seed: int = 0) -> list[int]:
    return torch.randint(0, n_experts, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 65, 600])
@pytest.mark.parametrize("n_experts", [1, 3, 8, 128])
def test_random_choices_are_grouped(n_experts, n, block):
    assert_grouped(random_choices(n, n_experts), n_experts, block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_one_expert_may_have_all_tokens(expert, block):
    """The order is kept; all other experts begin and end at one of the two ends."""
    order, starts = grouped([expert] * 70, 5, block)
    assert order == list(range(70))
    assert starts == [0] * (expert + 1) + [70] * (5 - expert)


@pytest.mark.parametrize("block", BLOCKS)
def test_experts_without_tokens_have_empty_runs(block):
    """The first expert, one in the middle, and the last have none."""
    assert_grouped([(1, 2, 4)[pair % 3] for pair in range(50)], 6, block)


@pytest.mark.parametrize("block", BLOCKS)
def test_runs_cross_the_borders_of_blocks(block):
    """Each expert's pairs end where a block's do, or one before or after."""
    for length in (block - 1, block, block + 1):
        assert_grouped([3] * length + [0] * length + [1] * 2, 4, block)


def test_tokens_with_several_experts_keep_their_order():
    """A router names no expert twice for a token; within an expert tokens stay in order."""
    generator = torch.Generator().manual_seed(1)
    choices = [torch.randperm(8, generator=generator)[:4].tolist() for _ in range(33)]
    order, starts = grouped([expert for token in choices for expert in token], 8, 64)
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        tokens = [pair // 4 for pair in order[start:end]]
        assert tokens == [t for t, chosen in enumerate(choices) if expert in chosen]
        assert [choices[pair // 4][pair % 4] for pair in order[start:end]] == [expert] * (end - start)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n_experts=st.integers(1, 9), block=st.sampled_from([2, 4, 16]))
def test_any_choices(data, n_experts, block):
    chosen = data.draw(st.lists(st.integers(0, n_experts - 1), min_size=1, max_size=40))
    assert_grouped(chosen, n_experts, block)
    assert_blocks(starts_of(chosen, n_experts), block)


@pytest.mark.parametrize("width", [16, 32, 48, 128])
@pytest.mark.parametrize(
    "counts",
    [
        [5],
        [0, 5],
        [5, 0],
        [0, 0, 33, 0],
        [16, 32, 128, 1],
        [15, 17, 31, 33, 127, 129],
        [0, 400, 0, 0, 1, 0],
        [1] * 128,
    ],
)
def test_blocks_of_experts(counts, width):
    assert_blocks([0, *itertools.accumulate(counts)], width)


@pytest.mark.parametrize("n_experts", [1, 3, 8])
def test_no_pairs_no_blocks(n_experts):
    assert_blocks([0] * (n_experts + 1), 16)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 70)), min_size=1, max_size=20),
    width=st.sampled_from([1, 16, 48, 64]),
)
def test_any_blocks_of_experts(counts, width):
    assert_blocks([0, *itertools.accumulate(counts)], width)
