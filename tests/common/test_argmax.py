"""common.argmax against numpy: a running argmax over tiles, as the LM head uses it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from common.argmax import keep_larger, reduce_argmax

N = 16


@triton.jit
def argmax_kernel(value_ptr, index_ptr, x_ptr, size, N: tl.constexpr):
    best = tl.full([N], float("-inf"), tl.float32)
    best_index = tl.zeros([N], tl.int32)
    for start in range(0, size, N):
        index = start + tl.arange(0, N)
        x = tl.load(x_ptr + index, mask=index < size, other=float("-inf"))
        best, best_index = keep_larger(best, best_index, x, index)
    value, index = reduce_argmax(best, best_index)
    tl.store(value_ptr, value)
    tl.store(index_ptr, index)


@triton.jit
def reduce_kernel(value_ptr, index_ptr, x_ptr, indices_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    value, index = reduce_argmax(tl.load(x_ptr + i), tl.load(indices_ptr + i))
    tl.store(value_ptr, value)
    tl.store(index_ptr, index)


def argmax(values: np.ndarray) -> tuple[float, int]:
    value, index = torch.full((1,), torch.nan), torch.full((1,), -1, dtype=torch.int32)
    argmax_kernel[(1,)](value, index, torch.from_numpy(values.astype(np.float32)), len(values), N=N)
    return value.item(), index.item()


def reduce(values: list[float], indices: list[int]) -> tuple[float, int]:
    value, index = torch.full((1,), torch.nan), torch.full((1,), -1, dtype=torch.int32)
    x, lanes = torch.tensor(values), torch.tensor(indices, dtype=torch.int32)
    reduce_kernel[(1,)](value, index, x, lanes, N=len(values))
    return value.item(), index.item()


@pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 131])
@pytest.mark.parametrize("seed", range(4))
def test_random_values(size, seed):
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    assert argmax(values) == (values.max(), values.argmax())
    assert argmax(-np.abs(values)) == (-np.abs(values).min(), np.abs(values).argmin())


@pytest.mark.parametrize("seed", range(8))
def test_the_lowest_index_wins_a_tie(seed):
    values = np.random.default_rng(seed).integers(-3, 3, 131).astype(np.float32)
    assert argmax(values) == (values.max(), values.argmax())


@pytest.mark.parametrize("first, second", [(0, 130), (3, 4), (15, 16), (14, 17), (5, 21), (20, 35)])
def test_a_tie_of_two(first, second):
    values = np.full(131, -1e30, np.float32)
    values[[first, second]] = 2.5
    assert argmax(values) == (2.5, first)


def test_zeros_of_either_sign_tie():
    values = np.full(20, -1.0, np.float32)
    values[3], values[17] = -0.0, 0.0
    assert argmax(values) == (0.0, 3)


@pytest.mark.parametrize("size", [1, 17])
def test_nothing_but_minus_infinity(size):
    assert argmax(np.full(size, -np.inf)) == (-np.inf, 0)


def test_infinity_wins():
    values = np.random.default_rng(0).standard_normal(131)
    values[[77, 99]] = np.inf
    assert argmax(values) == (np.inf, 77)


def test_nan_never_wins_and_the_index_stays_in_range():
    values = np.random.default_rng(0).standard_normal(131)
    values[[0, 50, 130, values.argmax()]] = np.nan
    assert argmax(values) == (np.float32(np.nanmax(values)), np.nanargmax(values))
    assert argmax(np.full(131, np.nan)) == (-np.inf, 0)


def test_reduced_lanes_need_not_be_in_order():
    assert reduce([1.0, 3.0, 2.0, 3.0], [40, 30, 20, 10]) == (3.0, 10)
    assert reduce([-np.inf] * 4, [9, 8, 0x7FFFFFFF, 7]) == (-np.inf, 7)
    assert reduce([-np.inf, 5.0, -np.inf, -np.inf], [0, 200_000, 0x7FFFFFFF, 0]) == (5.0, 200_000)
