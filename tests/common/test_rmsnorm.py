"""common.rmsnorm against the formula in float64. NaN stands in all memory that must not be read."""

import math

import pytest
import torch
import triton
import triton.language as tl

from common.gemv_bf16 import load_split_vector
from common.rmsnorm import add_blocks, multiply_blocks, rms_rstd

EPS = 1e-5
BLOCK = 4096
BLOCKS = [32, 1024, BLOCK]
SIZES = [1, 31, 2880]


@triton.jit
def rstd_kernel(out_ptr, x_ptr, SIZE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr, rms_rstd(load_split_vector(x_ptr, SIZE, BLOCK), SIZE, EPS))


@triton.jit
def blocks_kernel(sum_ptr, product_ptr, a_ptr, b_ptr, rstd, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write a + b and a * b * rstd, back in the order of memory."""
    a = load_split_vector(a_ptr, SIZE, BLOCK)
    b = load_split_vector(b_ptr, SIZE, BLOCK)
    sums = add_blocks(a, b)
    products = multiply_blocks(a, b)
    half = tl.arange(0, BLOCK // 2)
    for i in tl.static_range(len(a)):
        at = (i // 2) * BLOCK + 2 * half + i % 2
        tl.store(sum_ptr + at, sums[i])
        tl.store(product_ptr + at, products[i] * rstd)


def before_nan(x: torch.Tensor, count: int = BLOCK) -> torch.Tensor:
    return torch.cat((x, torch.full((count,), torch.nan)))


def rstd_of(x: torch.Tensor, block: int = BLOCK) -> float:
    out = torch.zeros(1)
    rstd_kernel[(1,)](out, before_nan(x), SIZE=len(x), EPS=EPS, BLOCK=block)
    return out.item()


def sum_and_product(
    a: torch.Tensor, b: torch.Tensor, rstd: float = 1.0, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a + b and a * b * rstd. Places beyond their size must stay 0, as rms_rstd assumes."""
    size = len(a)
    out = torch.full((2, triton.cdiv(size, block) * block), torch.nan)
    blocks_kernel[(1,)](out[0], out[1], before_nan(a), before_nan(b), rstd, SIZE=size, BLOCK=block)
    assert (out[:, size:] == 0).all()
    return out[0, :size], out[1, :size]


# The largest keeps a sum of 2880 squares in float32's range; of the smallest the squares are subnormal or zero.
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-21, 1e-3, 1.0, 1e4, 1e17])
@pytest.mark.parametrize("size", SIZES)
def test_rstd(size, magnitude, block):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) * magnitude
    expected = 1 / math.sqrt(x.double().square().mean().item() + EPS)
    # A pairwise sum of 4096 positive terms errs by at most 12 half ulps (7e-7), and the square root halves that.
    assert rstd_of(x, block) == pytest.approx(expected, rel=6e-7)


@pytest.mark.parametrize("block", [2, 16, 32, 64])
def test_rstd_does_not_depend_on_the_block(block):
    x = torch.arange(31.0) - 15  # the sum of the squares is exact
    assert rstd_of(x, block) == rstd_of(x)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("size", SIZES)
def test_add_and_multiply(size, magnitude, block):
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(size, generator=generator) * magnitude
    b = torch.randn(size, generator=generator)
    rstd = 0.37
    total, product = sum_and_product(a, b, rstd, block)
    assert torch.equal(total, (a.double() + b.double()).float())  # float64's own rounding never tips that to float32
    # Three roundings, rstd's own among them.
    torch.testing.assert_close(product.double(), a.double() * b.double() * rstd, rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize("block", BLOCKS)
def test_together_they_are_torchs_rms_norm(block):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2880, generator=generator) * 5, torch.randn(2880, generator=generator)
    _, normed = sum_and_product(x, weight, rstd_of(x, block), block)
    expected = torch.nn.functional.rms_norm(x.double(), (2880,), weight.double(), EPS)
    torch.testing.assert_close(normed.double(), expected, rtol=8e-7, atol=0)
