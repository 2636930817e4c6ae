"""common.rmsnorm against the formula in float64. NaN stands in all memory that must not be read."""

import math

import pytest
import torch
import triton
import triton.language as tl

from common import load_normed, rms_rstd

EPS = 1e-5
BLOCK = 4096
SIZES = [1, 31, 2880]


@triton.jit
def rstd_kernel(out_ptr, x_ptr, SIZE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr, rms_rstd(x_ptr, SIZE, EPS, BLOCK))


@triton.jit
def normed_kernel(out_ptr, x_ptr, weight_ptr, mask_ptr, rstd, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, load_normed(x_ptr, weight_ptr, rstd, offsets, tl.load(mask_ptr + offsets) != 0))


def in_block(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    return torch.cat((x, torch.full((block - len(x),), torch.nan)))


def rstd_of(x: torch.Tensor, block: int = BLOCK) -> float:
    out = torch.zeros(1)
    rstd_kernel[(1,)](out, in_block(x, block), SIZE=len(x), EPS=EPS, BLOCK=block)
    return out.item()


# The largest keeps a sum of 2880 squares in float32's range; of the smallest the squares are subnormal or zero.
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-21, 1e-3, 1.0, 1e4, 1e17])
@pytest.mark.parametrize("size", SIZES)
def test_rstd(size, magnitude):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) * magnitude
    expected = 1 / math.sqrt(x.double().square().mean().item() + EPS)
    # A pairwise sum of 4096 positive terms errs by at most 12 half ulps (7e-7), and the square root halves that.
    assert rstd_of(x) == pytest.approx(expected, rel=6e-7)


@pytest.mark.parametrize("block", [32, 64])
def test_rstd_does_not_depend_on_the_block(block):
    x = torch.arange(31.0) - 15  # the sum of the squares is exact
    assert rstd_of(x, block) == rstd_of(x)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("size", SIZES)
def test_normed(size, magnitude):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator) * magnitude
    weight = torch.randn(size, generator=generator)
    taken = torch.rand(size, generator=generator) < 0.7
    rstd = 0.37
    mask = torch.zeros(BLOCK, dtype=torch.int32)
    mask[:size] = taken
    out = torch.full((BLOCK,), torch.nan)
    x[~taken] = torch.nan
    normed_kernel[(1,)](out, in_block(x), in_block(weight), mask, rstd, BLOCK=BLOCK)
    expected = (x.double() * rstd * weight.double())[taken]
    # Three roundings, rstd's own among them.
    torch.testing.assert_close(out[:size][taken].double(), expected, rtol=3 * 2**-24, atol=0)
    assert (out[:size][~taken] == 0).all()
    assert (out[size:] == 0).all()


def test_together_they_are_torchs_rms_norm():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2880, generator=generator) * 5, torch.randn(2880, generator=generator)
    out = torch.zeros(BLOCK)
    mask = (torch.arange(BLOCK) < 2880).int()
    normed_kernel[(1,)](out, in_block(x), in_block(weight), mask, rstd_of(x), BLOCK=BLOCK)
    expected = torch.nn.functional.rms_norm(x.double(), (2880,), weight.double(), EPS)
    torch.testing.assert_close(out[:2880].double(), expected, rtol=8e-7, atol=0)
