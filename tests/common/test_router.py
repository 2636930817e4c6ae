"""common.router against a stable sort and a softmax in float64. NaN stands in all memory that must not be read."""

import math

import pytest
import torch
import triton
import triton.language as tl

from common.experts import pick
from common.router import top_k_softmax

CASES = [(n, k) for n in (5, 31, 128, 200) for k in (1, 3, 4, 8) if k <= n]


@pytest.fixture(params=[1, 4], ids=["1 copy", "4 copies"])
def copies(request) -> int:
    """Copy the logits once for each warp, or once for all."""
    return request.param


@triton.jit
def top_k_kernel(
    index_ptr, weight_ptr, logits_ptr, N: tl.constexpr, TOP_K: tl.constexpr, COPIES: tl.constexpr, PLACES: tl.constexpr
):
    n = tl.arange(0, triton.next_power_of_2(N))[None, :]
    logits = tl.load(logits_ptr + n + 0 * tl.arange(0, COPIES)[:, None])
    index, weight = top_k_softmax(logits, N, TOP_K)
    place = tl.arange(0, PLACES)
    tl.store(index_ptr + place, index)
    tl.store(weight_ptr + place, weight)


@triton.jit
def pick_kernel(out_ptr, x_ptr, i, N: tl.constexpr):
    tl.store(out_ptr, pick(tl.load(x_ptr + tl.arange(0, N)), i))


def route(logits: torch.Tensor, top_k: int, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices and weights of all places."""
    places = triton.next_power_of_2(top_k)
    index, weight = torch.full((places,), -1, dtype=torch.int32), torch.full((places,), torch.nan)
    padded = torch.cat((logits, torch.full((triton.next_power_of_2(len(logits)),), torch.nan)))
    top_k_kernel[(1,)](index, weight, padded, N=len(logits), TOP_K=top_k, COPIES=copies, PLACES=places)
    return index, weight


def assert_routed(logits: torch.Tensor, top_k: int, copies: int) -> None:
    index, weight = route(logits, top_k, copies)
    chosen = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:top_k]  # stable
    exponentials = [math.exp(logits[i].item() - logits[chosen[0]].item()) for i in chosen]
    assert index[:top_k].tolist() == chosen
    # The difference of two logits is rounded to 2^-24 of itself, which is at most 104 where its exponential is not 0.
    expected = torch.tensor(exponentials, dtype=torch.float64) / sum(exponentials)
    torch.testing.assert_close(weight[:top_k].double(), expected, rtol=7e-6, atol=2e-45)
    assert (weight[top_k:] == 0).all()
    assert ((index >= 0) & (index < len(logits))).all()


@pytest.mark.parametrize("n, top_k", CASES)
def test_random_logits(n, top_k, copies):
    generator = torch.Generator().manual_seed(n)
    for scale in (1, 30):
        assert_routed(torch.randn(n, generator=generator) * scale, top_k, copies)


@pytest.mark.parametrize("n, top_k", CASES)
def test_the_lower_index_comes_first_on_ties(n, top_k, copies):
    generator = torch.Generator().manual_seed(n)
    assert_routed(torch.randint(-2, 2, (n,), generator=generator).float(), top_k, copies)
    assert_routed(torch.zeros(n), top_k, copies)


def test_zeros_of_either_sign_tie(copies):
    assert_routed(torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0]), 3, copies)


@pytest.mark.parametrize("top_k", [3, 5, 6, 7])
def test_more_places_than_experts_chosen(top_k, copies):
    assert_routed(torch.randn(31, generator=torch.Generator().manual_seed(0)), top_k, copies)
    assert_routed(torch.full((31,), -torch.finfo(torch.float32).max), top_k, copies)


def test_all_logits_are_chosen(copies):
    assert_routed(torch.tensor([0.5, -1.0, 3.0, 2.0]), 4, copies)


def test_large_magnitudes_do_not_overflow(copies):
    largest = torch.finfo(torch.float32).max
    assert_routed(torch.tensor([-largest, -1e30, 88.0, 90.0, 89.5]), 3, copies)
    assert_routed(torch.tensor([1e30, 2.0, 1e30, -1e30, 5.0]), 4, copies)
    assert_routed(torch.full((5,), -largest), 4, copies)


@pytest.mark.parametrize("n, top_k", [(5, 4), (128, 4), (200, 8)])
@pytest.mark.parametrize(
    "fill, places, value",
    [
        (torch.nan, [], 0.0),
        (0.0, [1, 3], torch.nan),
        (torch.nan, [2], 1.0),
        (-torch.inf, [], 0.0),
        (-torch.inf, [3], 1.0),
        (torch.inf, [], 0.0),
        (0.0, [0, 4], torch.inf),
        (-torch.inf, [0, 1], torch.nan),
        (torch.inf, [0, 1], torch.nan),
    ],
)
def test_indices_are_in_range_whatever_the_logits_hold(n, top_k, fill, places, value, copies):
    logits = torch.full((n,), fill)
    logits[places] = value
    index, weight = route(logits, top_k, copies)
    assert ((index >= 0) & (index < n)).all()
    assert len(set(index[:top_k].tolist())) == top_k
    assert (weight[top_k:] == 0).all() or weight.isnan().all()


@pytest.mark.parametrize("n, top_k", [(5, 5), (31, 4)])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, -0x3FFFFF, -0x400000])
def test_nan_of_any_bits_keeps_the_indices_in_range(n, top_k, bits, copies):
    """Read as an integer, one of these NaNs is below all other floats."""
    index, weight = route(torch.full((n,), bits, dtype=torch.int32).view(torch.float32), top_k, copies)
    assert index[:top_k].tolist() == list(range(top_k))
    assert weight.isnan().all()


def test_a_lone_finite_logit_takes_all_weight(copies):
    logits = torch.full((31,), -torch.inf)
    logits[17] = -3.0
    index, weight = route(logits, 4, copies)
    assert index[0] == 17
    assert weight.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("n, top_k", [(31, 4), (128, 4)])
def test_weights_of_nan_are_nan(n, top_k, copies):
    """A hidden state of NaN makes all logits NaN and must show in the output."""
    assert route(torch.full((n,), torch.nan), top_k, copies)[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_pick(dtype):
    vector = torch.tensor([7, -3, 0, 5]).to(dtype)
    for i, expected in enumerate(vector.tolist()):
        out = torch.full((1,), 99, dtype=dtype)
        pick_kernel[(1,)](out, vector, i, N=4)
        assert out.item() == expected
