"""checkpoints.fp8: E4M3 weights against the formats' definitions in float64, with each bfloat16 number."""

import math

import pytest
import torch

from checkpoints.config import FP8_GROUPS, FP8_ROWS
from checkpoints.fp8 import dequantize_fp8, quantize_fp8
from system.errors import InputError

FORMATS = [FP8_ROWS, FP8_GROUPS]
GROUP = 32
ALL = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE = ALL[ALL.isfinite()]
SMALL = FINITE[FINITE.abs() <= 448]


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round float64 to the nearest E4M3 number, ties to even: three bits behind the first, none below 2^-9."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-6)))
    step = torch.exp2(exponent - 3)
    return torch.round(x / step) * step  # which rounds half to even


def beside(values: torch.Tensor, other: float) -> torch.Tensor:
    """Make a row or group for each value: the other value first, then the value, then zeros."""
    matrix = torch.zeros(len(values), GROUP, dtype=torch.bfloat16)
    matrix[:, 0], matrix[:, 1] = other, values
    return matrix


def group_factors(scales: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scales.double() - 127)


def random_matrix(rows: int, k: int) -> torch.Tensor:
    """Make a matrix whose magnitudes span many binades, with different ones in each row and group."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 3, (rows, k), generator=generator) + torch.randint(-30, 30, (rows, 1))
    return (torch.randn(rows, k, generator=generator) * torch.exp2(exponents.float())).bfloat16()


@pytest.mark.parametrize("dense_format", FORMATS)
def test_each_bfloat16_number_rounds_to_the_nearest(dense_format):
    """A 448 beside each number makes the scale 1, so that the element is the number rounded, as by torch and `e4m3`."""
    elements, scales = quantize_fp8(beside(SMALL, 448.0), dense_format)
    assert (scales == (1 if dense_format == FP8_ROWS else 127)).all()
    assert (elements[:, 0].float() == 448).all()
    assert (elements[:, 2:].float() == 0).all()
    assert torch.equal(elements[:, 1].view(torch.uint8), SMALL.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(elements[:, 1].double(), e4m3(SMALL.double()))


def test_a_row_s_scale_makes_its_largest_448():
    """This holds for any largest value. Below 2^-126 * 448 the scale is a subnormal float32, with its precision."""
    values = FINITE[FINITE != 0]
    elements, scales = quantize_fp8(values[:, None], FP8_ROWS)
    assert torch.equal(scales, (values.double().abs() / 448).float())
    assert torch.equal(elements[:, 0].double(), 448 * values.double().sign())
    normal = values.double().abs() >= 448 * 2.0**-126
    error = (dequantize_fp8(elements, scales)[:, 0].double() - values.double()).abs()
    assert (error[normal] <= 2.0**-23 * values.double().abs()[normal]).all()
    assert (error <= 448 * 2.0**-149 + 2.0**-23 * values.double().abs()).all()


def test_a_group_s_scale_is_the_least_that_saturates_nothing():
    values = FINITE[FINITE != 0]
    matrix = torch.zeros(len(values), GROUP, dtype=torch.bfloat16)
    matrix[torch.arange(len(values)), torch.arange(len(values)) % GROUP] = values
    elements, scales = quantize_fp8(matrix, FP8_GROUPS)
    factors, largest = group_factors(scales)[:, 0], values.double().abs()
    assert (largest <= 448 * factors).all()
    least = scales[:, 0] == 0
    assert least.any()
    assert ((largest > 448 * factors / 2) | least).all()
    assert torch.equal(elements.double(), e4m3(matrix.double() / factors[:, None]))


@pytest.mark.parametrize("shape", [(5, 96), (3, 2, 64), (7, 2880)])
def test_rows(shape):
    matrix = random_matrix(math.prod(shape[:-1]), shape[-1]).view(shape)
    elements, scales = quantize_fp8(matrix, FP8_ROWS)
    assert (elements.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (elements.shape, scales.shape) == (shape, shape[:-1])
    exact = matrix.double()
    assert torch.equal(scales, (exact.abs().amax(-1) / 448).float())
    quotients = (exact / scales.double()[..., None]).float()  # one rounding, as float64 is wide enough
    assert torch.equal(elements.double(), e4m3(quotients.double()))
    expected = (elements.double() * scales.double()[..., None]).float()
    assert torch.equal(dequantize_fp8(elements, scales), expected)


@pytest.mark.parametrize("shape", [(5, 96), (7, 2880)])
def test_groups(shape):
    matrix = random_matrix(*shape)
    elements, scales = quantize_fp8(matrix, FP8_GROUPS)
    assert (elements.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.uint8)
    assert (elements.shape, scales.shape) == (shape, (shape[0], shape[1] // GROUP))
    exact = matrix.double()
    for row in range(shape[0]):
        for group in range(shape[1] // GROUP):
            part = slice(group * GROUP, (group + 1) * GROUP)
            factor = group_factors(scales[row, group])
            largest = exact[row, part].abs().max()
            assert 448 * factor / 2 < largest <= 448 * factor
            assert torch.equal(elements[row, part].double(), e4m3(exact[row, part] / factor))
    expected = elements.double() * group_factors(scales).repeat_interleave(GROUP, 1)
    assert torch.equal(dequantize_fp8(elements, scales).double(), expected)


@pytest.mark.parametrize("dense_format", FORMATS)
def test_errors_are_bounded(dense_format):
    """A normal number errs by at most half a step of three bits, 2^-4 of it; a subnormal by half of the least one."""
    matrix = random_matrix(40, 960)
    elements, scales = quantize_fp8(matrix, dense_format)
    exact, found = matrix.double(), dequantize_fp8(elements, scales).double()
    unit = scales.double()[:, None] if dense_format == FP8_ROWS else group_factors(scales).repeat_interleave(GROUP, 1)
    error, rounding = (found - exact).abs(), 2.0**-22 * exact.abs()  # of the quotient, and of its product
    normal = exact.abs() >= unit * 2.0**-6
    assert normal.any()
    assert not normal.all()
    assert (error <= 2.0**-4 * exact.abs() + rounding)[normal].all()
    assert (error <= 2.0**-10 * unit + rounding)[~normal].all()


@pytest.mark.parametrize("dense_format", FORMATS)
def test_zeros_stay_zeros(dense_format):
    """A row or group of zeros keeps its zeros, of both signs, and gets a scale of 1."""
    matrix = torch.zeros(2, 64, dtype=torch.bfloat16)
    matrix[0, 40], matrix[1, 3] = 3.0, -0.0
    elements, scales = quantize_fp8(matrix, dense_format)
    found = dequantize_fp8(elements, scales)
    assert torch.equal(found, matrix.float())
    assert torch.equal(found.signbit(), matrix.signbit())
    assert (scales[1] == (1 if dense_format == FP8_ROWS else 127)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dense_format", FORMATS)
def test_what_is_no_number_stays_visible(dense_format, value):
    """NaN and infinity become NaN in their place; other rows and groups do not change."""
    matrix = random_matrix(3, 96)
    expected = dequantize_fp8(*quantize_fp8(matrix, dense_format))
    matrix[1, 40] = value
    found = dequantize_fp8(*quantize_fp8(matrix, dense_format))
    assert found[1, 40].isnan()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    if dense_format == FP8_GROUPS:
        assert torch.equal(found[1, [*range(32), *range(64, 96)]], expected[1, [*range(32), *range(64, 96)]])


def test_scales_that_a_file_may_hold_besides_are_factors():
    """Scales that the quantizer never makes are data: NaN makes its group or row NaN, the others are factors."""
    elements = torch.tensor([[1.0] * 32 + [-2.0] * 32] * 4).to(torch.float8_e4m3fn)
    elements.view(torch.uint8)[2, 3] = 0x7F
    found = dequantize_fp8(elements, torch.tensor([[255, 0], [254, 127], [127, 127], [127, 255]], dtype=torch.uint8))
    assert found.isnan().nonzero().tolist() == [[0, k] for k in range(32)] + [[2, 3]] + [[3, k] for k in range(32, 64)]
    assert (found[0, 32:] == -(2.0**-126)).all()
    assert (found[1, :32] == 2.0**127).all()
    found = dequantize_fp8(elements, torch.tensor([math.nan, -3.0, 0.0, math.inf]))
    assert found[0].isnan().all()
    assert found[1].tolist() == [-3.0] * 32 + [6.0] * 32
    assert found[2].isnan().nonzero().flatten().tolist() == [3]
    assert found[3].isinf().all()


def test_groups_must_be_whole():
    with pytest.raises(InputError, match="fp8-32: rows of 48 elements are no whole groups of 32"):
        quantize_fp8(torch.ones(2, 48), FP8_GROUPS)
