"""Noise of the kernel's sampling against Philox in plain Python, and drawn tokens against softmax."""

import math

import pytest
import torch
import triton
import triton.language as tl
from gumbel import expected_noise, philox

from common.argmax import keep_larger
from common.sampling import gumbel_noise, scores_of

# Known answers of Random123 for Philox4x32-10: (counter, key) -> first word.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
]
SEEDS = [0, 1, 12345, 2**31, 2**32 + 7, 2**63 - 1, -1]


@triton.jit
def noise_kernel(out_ptr, seed_ptr, position, first_row, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, gumbel_noise(tl.load(seed_ptr), position, first_row + i))


@triton.jit
def draw_kernel(tokens_ptr, logits_ptr, inverse_temperature_ptr, seed_ptr, n, P: tl.constexpr, STEP: tl.constexpr):
    """tokens[position] = the token drawn at it; a program takes P positions, and STEP rows at a time."""
    position = tl.program_id(0) * P + tl.arange(0, P)
    sampling = (tl.load(inverse_temperature_ptr), tl.load(seed_ptr))
    best, best_index = tl.full([P, STEP], float("-inf"), tl.float32), tl.zeros([P, STEP], tl.int32)
    for row0 in range(0, n, STEP):
        row = row0 + tl.arange(0, STEP)[None, :] + tl.zeros([P, STEP], tl.int32)
        scores = scores_of(tl.load(logits_ptr + row, mask=row < n, other=0.0), sampling, position[:, None], row)
        best, best_index = keep_larger(best, best_index, tl.where(row < n, scores, float("-inf")), row)
    top = tl.max(best, axis=1)
    tl.store(tokens_ptr + position, tl.min(tl.where(best == top[:, None], best_index, 0x7FFFFFFF), axis=1))


POSITIONS = 1024  # of a program


def drawn(logits: torch.Tensor, temperature: float, seed: int, n: int, step: int = 32) -> torch.Tensor:
    """Return the tokens drawn at positions 0 to n - 1."""
    n_programs = -(-n // POSITIONS)
    tokens = torch.zeros(n_programs * POSITIONS, dtype=torch.int32)
    inverse = torch.tensor([1 / temperature if temperature else 0.0])
    arguments = (tokens, logits, inverse, torch.tensor([seed]), len(logits))
    draw_kernel[(n_programs,)](*arguments, P=POSITIONS, STEP=step)
    return tokens[:n]


@pytest.mark.parametrize("counter, key, word", KNOWN)
def test_the_model_of_philox_gives_the_known_answers(counter, key, word):
    assert philox(counter, key) == word


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("position, first_row", [(0, 0), (7, 201_024), (131_071, 64)])
def test_noise(seed, position, first_row):
    found = torch.zeros(64)
    noise_kernel[(1,)](found, torch.tensor([seed]), position, first_row, N=64)
    expected = torch.tensor([expected_noise(seed, position, first_row + n) for n in range(64)], dtype=torch.float64)
    assert (found.double() - expected).abs().max() < 2e-6  # float32 of values up to 6, and of (bits + 1/2) / 2^32


def chi_square_limit(n_cells: int) -> float:
    """Return what chi-square exceeds once in 10,000 times, by Wilson and Hilferty's approximation."""
    degrees = n_cells - 1
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", [1, 2])
def test_20_000_draws_follow_softmax(temperature, seed):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    expected = torch.softmax(logits.double() / temperature, 0) * 20_000
    counts = torch.bincount(drawn(logits, temperature, seed, 20_000), minlength=50).double()
    common = expected >= 5
    cells = torch.stack([counts, expected])
    cells = torch.cat([cells[:, common], cells[:, ~common].sum(1, keepdim=True)], 1)
    cells = cells[:, cells[1] > 0]
    chi_square = float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
    assert chi_square < chi_square_limit(cells.shape[1])


def test_draws_with_another_temperature_do_not_follow_softmax():
    """The test above can fail: draws at 1.1 are not those of 1.0."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    expected = torch.softmax(logits.double(), 0) * 20_000
    counts = torch.bincount(drawn(logits, 1.1, 1, 20_000), minlength=50).double()
    common = expected >= 5
    assert float(((counts - expected) ** 2 / expected)[common].sum()) > chi_square_limit(int(common.sum()))


@pytest.mark.parametrize("step", [8, 64, 256])
def test_the_steps_do_not_matter(step):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn(logits, 0.8, 9, 50, step), drawn(logits, 0.8, 9, 50, 16))


def test_without_a_temperature_the_largest_wins():
    logits = torch.randn(200, generator=torch.Generator().manual_seed(4))
    assert set(drawn(logits, 0, 9, 5).tolist()) == {int(logits.argmax())}


def test_neighbours_draw_independently():
    """Pairs of draws at neighbouring positions, and with neighbouring seeds, fill all cells alike."""
    logits, n = torch.zeros(8), 6400
    first = drawn(logits, 1.0, 5, n + 1)
    for other in (first[1:], drawn(logits, 1.0, 6, n)):
        counts = torch.bincount(first[:n] * 8 + other, minlength=64).double()
        assert float(((counts - n / 64) ** 2 / (n / 64)).sum()) < chi_square_limit(64)
