"""common.swiglu against the formula in float64, branch by branch."""

import math

import pytest
import torch
import triton
import triton.language as tl

from common.swiglu import swiglu

LIMIT, ALPHA = 7.0, 1.702
LARGEST = torch.finfo(torch.float32).max


@triton.jit
def swiglu_kernel(out_ptr, gate_ptr, up_ptr, N: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, swiglu(tl.load(gate_ptr + i), tl.load(up_ptr + i), LIMIT, ALPHA))


def swiglu_of(gate: torch.Tensor, up: torch.Tensor, limit: float = LIMIT, alpha: float = ALPHA) -> torch.Tensor:
    """Apply swiglu elementwise to flat float32 tensors of any size."""
    size, block = len(gate), triton.next_power_of_2(len(gate))
    padded = [torch.cat((x, torch.zeros(block - size))) for x in (gate, up)]
    out = torch.full((block,), torch.nan)
    swiglu_kernel[(1,)](out, *padded, N=block, LIMIT=limit, ALPHA=alpha)
    return out[:size]


def expected_swiglu(gate: float, up: float, limit: float, alpha: float) -> float:
    gate = limit if gate > limit else gate
    up = limit if up > limit else -limit if up < -limit else up
    return gate / (1 + math.exp(min(-alpha * gate, 700))) * (up + 1)


def assert_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float = LIMIT, alpha: float = ALPHA) -> None:
    expected = [expected_swiglu(g, u, limit, alpha) for g, u in zip(gate.tolist(), up.tolist())]
    # The exponent -alpha * gate, of at most 89, is rounded to 2^-24 of itself: 6e-6 of its exponential. Where that
    # overflows float32 the result is 0 instead of up to 8 * 53 / 3.4e38.
    actual = swiglu_of(gate, up, limit, alpha).double()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=2e-36)


def pairs(gates: list[float], ups: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cartesian_prod(torch.tensor(gates), torch.tensor(ups)).T.contiguous())


def test_ordinary_values():
    generator = torch.Generator().manual_seed(0)
    assert_swiglu(torch.randn(999, generator=generator) * 4, torch.randn(999, generator=generator) * 4)


@pytest.mark.parametrize("limit, alpha", [(LIMIT, ALPHA), (1.5, 1.0)])
def test_around_the_clamps(limit, alpha):
    below, above = (math.nextafter(limit, end) for end in (0, math.inf))
    edges = [0.0, limit, limit * (1 - 2**-23), limit * (1 + 2**-22), below, above, limit + 1, 100 * limit]
    assert_swiglu(*pairs(edges + [-e for e in edges], edges + [-e for e in edges]), limit, alpha)


def test_the_gate_is_not_clamped_from_below():
    # In float64 -20 * sigmoid(-34.04) is -3.3e-14; clamped to -7 it would be -4.7e-5.
    assert swiglu_of(torch.tensor([-20.0]), torch.tensor([0.0])).item() == pytest.approx(-3.29e-14, rel=1e-2)


def test_huge_and_infinite_values():
    gates = [math.inf, LARGEST, 1e30, -30.0, -51.0, -53.0, -60.0, -1e4, -1e30, -LARGEST]
    ups = [math.inf, -math.inf, LARGEST, -LARGEST, -1.0, 0.0]
    assert_swiglu(*pairs(gates, ups))


def test_nan_stays_nan():
    """torch.clamp keeps NaN too: a broken weight must show."""
    gate, up = torch.tensor([torch.nan, 1.0, torch.nan]), torch.tensor([1.0, torch.nan, torch.nan])
    assert swiglu_of(gate, up).isnan().all()
