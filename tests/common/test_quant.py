"""common.quant against exact powers of two, and MXFP8 as written down in OCP Microscaling Formats v1.0."""

import math

import pytest
import torch
import triton
import triton.language as tl

from common.quant import GROUP, e8m0_to_float32, load_mxfp8, quantize_mxfp8

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149


@triton.jit
def e8m0_kernel(out_ptr, e8m0_ptr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, e8m0_to_float32(tl.load(e8m0_ptr + i)))


@triton.jit
def quantize_kernel(element_ptr, scale_ptr, x_ptr, N: tl.constexpr, GROUP: tl.constexpr):
    row = tl.arange(0, N)
    offsets = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    elements, scales = quantize_mxfp8(tl.load(x_ptr + offsets))
    tl.store(element_ptr + offsets, elements)
    tl.store(scale_ptr + row, scales)


@triton.jit
def load_kernel(out_ptr, x_ptr, scale_ptr, offset_ptr, mask_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    offsets, mask = tl.load(offset_ptr + i), tl.load(mask_ptr + i) != 0
    tl.store(out_ptr + i, load_mxfp8(x_ptr, scale_ptr, offsets, mask))


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the elements' bits, uint8 [N, 32], and the scales, uint8 [N]."""
    padded = torch.zeros(triton.next_power_of_2(len(x)), 32)
    padded[: len(x)] = x
    elements = torch.zeros(padded.shape, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(len(padded), dtype=torch.uint8)
    quantize_kernel[(1,)](elements, scales, padded, N=len(padded), GROUP=GROUP)
    return elements.view(torch.uint8)[: len(x)], scales[: len(x)]


def load(elements: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(offsets),), torch.nan)
    load_kernel[(1,)](out, elements.view(torch.float8_e4m3fn), scales, offsets, mask.int(), N=len(offsets))
    return out


def expected_mxfp8(group: list[float]) -> tuple[list[int], int]:
    """Compute the elements' bits and the scale of one group without NaN, in Python's float64."""
    largest = max(abs(x) for x in group)
    exponent = -127 if largest == 0 else max(math.frexp(largest)[1] - 1 - 8, -127)
    scaled = torch.tensor([max(-448.0, min(448.0, math.ldexp(x, -exponent))) for x in group], dtype=torch.float64)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).tolist(), exponent + 127


def assert_quantized(x: torch.Tensor) -> None:
    elements, scales = quantize(x)
    expected_elements, expected_scales = zip(*(expected_mxfp8(group) for group in x.tolist()))
    assert scales.tolist() == list(expected_scales)
    assert elements.tolist() == list(expected_elements)


def test_e8m0_is_exact_for_every_byte():
    for dtype in (torch.uint8, torch.int32):
        out = torch.zeros(256)
        e8m0_kernel[(1,)](out, torch.arange(256).to(dtype))
        assert out.double()[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
        assert out[255].isnan()


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -119, -118, -30, 0, 7, 8, 100, 126])
def test_random_groups_of_any_magnitude(exponent):
    generator = torch.Generator().manual_seed(exponent + 200)
    x = torch.randn(7, 32, generator=generator).double() * 2.0**exponent
    assert_quantized(x.clamp(-LARGEST, LARGEST).float())


def test_groups_of_mixed_magnitudes():
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-149, 125, (64, 32), generator=generator).double()
    assert_quantized((torch.randn(64, 32, generator=generator).double() * exponents.exp2()).float())


def test_zeros_of_either_sign():
    x = torch.zeros(3, 32)
    x[1] = -0.0
    x[2, ::2] = -0.0
    elements, scales = quantize(x)
    assert torch.equal(elements, x.signbit().to(torch.uint8) << 7)
    assert (scales == 0).all()


@pytest.mark.parametrize("power", [-149, -127, -126, -119, -118, -20, 0, 5, 127])
def test_largest_element_around_a_power_of_two(power):
    edge = torch.tensor(2.0**power)
    below, above = (edge.nextafter(torch.tensor(end)) for end in (0.0, math.inf))
    x = torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) * edge * 0.99
    x[:, 11] = torch.stack((below, edge, above, -below, -edge, -above))
    assert_quantized(x)


def test_extreme_groups():
    x = torch.zeros(6, 32)
    x[0] = LARGEST
    x[1, 5], x[1, 6] = -LARGEST, 1.0
    x[2] = SMALLEST
    x[3, 31] = -SMALLEST
    x[4] = 2.0**-126
    x[5, 0], x[5, 1] = LARGEST, SMALLEST
    assert_quantized(x)


@pytest.mark.parametrize("scale", [2.0**-127, 2.0**-60, 1.0, 2.0**100])
def test_ties_round_to_even(scale):
    codes = torch.arange(0x7F, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).double()
    ties = (codes[1:] + codes[:-1]) / 2  # each exact in float32, and of its group the largest is 256 .. 511
    ties = torch.cat((ties, -ties, torch.full((-2 * len(ties) % 31,), 0.0))).view(-1, 31)
    x = (torch.cat((ties, torch.full((len(ties), 1), 300.0)), 1) * scale).float()
    assert_quantized(x)
    # Spelled out: halfway between 16 and 18 is the even code's 16, between 18 and 20 the even code's 20.
    spelled = torch.zeros(1, 32)
    spelled[0, :4] = torch.tensor([17.0, 19.0, -17.0, 256.0]) * scale
    elements, _ = quantize(spelled)
    assert elements.view(torch.float8_e4m3fn)[0, :4].tolist() == [16.0, 20.0, -16.0, 256.0]


def test_beyond_448_saturates():
    x = torch.zeros(1, 32)
    x[0, :8] = torch.tensor([448.0, 449.0, 463.9, 464.0, 480.0, 511.9, -500.0, 447.9])
    elements, scales = quantize(x)
    assert scales.item() == 127
    assert elements.view(torch.float8_e4m3fn)[0, :8].tolist() == [448.0] * 6 + [-448.0, 448.0]


def test_nan_stays_nan_alone():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    x[1, 7] = torch.nan
    x[2] = torch.nan
    elements, scales = quantize(x)
    assert torch.equal(elements.view(torch.float8_e4m3fn).float().isnan(), x.isnan())
    assert (elements[0].tolist(), scales[0].item()) == expected_mxfp8(x[0].tolist())


def test_load_gives_every_element_with_every_scale():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    elements = codes.repeat(256)
    scales = codes.repeat_interleave(8)
    size = len(elements)
    actual = load(elements, scales, torch.arange(size, dtype=torch.int32), torch.ones(size, dtype=torch.bool))
    factors = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [math.nan], dtype=torch.float64)
    products = elements.view(torch.float8_e4m3fn).double() * factors[scales.int()].repeat_interleave(32)
    # Four significant bits times a power of two: exact, but for the overflow.
    torch.testing.assert_close(actual, products.float(), rtol=0, atol=0, equal_nan=True)


def test_load_at_offsets_and_masked():
    generator = torch.Generator().manual_seed(0)
    elements = torch.randint(0, 0x7F, (96,), generator=generator).to(torch.uint8)
    scales = torch.tensor([120, 127, 130], dtype=torch.uint8)
    offsets = torch.randint(0, 96, (64,), generator=generator, dtype=torch.int32)
    mask = torch.rand(64, generator=generator) < 0.6
    offsets[~mask] = 1 << 30  # nothing is there
    actual = load(elements, scales, offsets, mask)
    read = offsets[mask]
    expected = elements.view(torch.float8_e4m3fn).double()[read] * torch.exp2(scales.double() - 127)[read // 32]
    assert torch.equal(actual[mask].double(), expected)
    assert (actual[~mask] == 0).all()


def test_a_round_trip_errs_by_half_a_step_at_most():
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 3
    elements, scales = quantize(x)
    size = x.numel()
    loaded = load(elements.flatten(), scales, torch.arange(size, dtype=torch.int32), torch.ones(size, dtype=torch.bool))
    # E4M3 keeps 4 bits: 2^-4 of the element; below 2^-6 steps are 2^-9; what saturates loses up to 64 of 512.
    largest = x.abs().amax(1, keepdim=True)
    step = torch.exp2(scales.float() - 127)[:, None]
    bound = torch.where(x.abs() > 448 * step, largest / 8, torch.maximum(x.abs() * 2**-4, step * 2**-10))
    assert ((loaded.view(32, 32) - x).abs() <= bound).all()
