"""E4M3 weights: dense matrices in a byte an element, with a scale for each row or, in E8M0, for each 32 along it.

Formulas: OCP 8-bit Floating Point (E4M3) and OCP Microscaling Formats v1.0 (E8M0). Scales are chosen such that nothing
saturates: the largest magnitude of a row becomes 448, of a group at most 448.
"""

import torch
from torch import Tensor

from host.config import FP8_GROUPS, FP8_ROWS
from host.config import MXFP4_GROUP as GROUP
from host.errors import InputError

E4M3_MAX = 448.0


def quantize_fp8(matrix: Tensor, dense_format: str) -> tuple[Tensor, Tensor]:
    """[..., rows, K] -> elements float8_e4m3fn [..., rows, K] and scales, all on the matrix's device.

    Scales are float32 [..., rows] for FP8_ROWS, uint8 [..., rows, K / 32], E8M0, for FP8_GROUPS. Elements are rounded
    to nearest even. InputError if rows are no whole groups.
    """
    matrix = matrix.float()
    if dense_format == FP8_ROWS:
        largest = matrix.abs().amax(-1)
        scales = torch.where(largest > 0, _parts_of_448(largest), 1.0)
        return (matrix / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales
    assert dense_format == FP8_GROUPS
    if matrix.shape[-1] % GROUP:
        raise InputError(f"{dense_format}: rows of {matrix.shape[-1]} elements are no whole groups of {GROUP}")
    groups = matrix.unflatten(-1, (-1, GROUP))
    exponent = torch.frexp(_parts_of_448(groups.abs().amax(-1)))
    # frexp: x = m 2^e with m in [0.5, 1), so 2^e is the least power of two above x, but 2^(e - 1) where that is x.
    exact = exponent.mantissa == 0.5
    biased = (exponent.exponent - exact.int() + 127).clamp(0, 254)
    elements = groups * torch.exp2((127 - biased).double())[..., None]
    elements = elements.masked_fill(elements.isinf(), torch.nan)  # which the conversion makes 448
    return elements.float().flatten(-2).to(torch.float8_e4m3fn), biased.to(torch.uint8)


def _parts_of_448(x: Tensor) -> Tensor:
    """By a tensor, as a GPU multiplies by a number's reciprocal: other scales would round other elements."""
    return x / torch.full_like(x, E4M3_MAX)


def dequantize_fp8(elements: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., rows, K] of what quantize_fp8 returns."""
    if scales.dtype == torch.float32:
        return elements.float() * scales[..., None]
    factors = torch.exp2(scales.double() - 127)[..., None]
    return (elements.float().unflatten(-1, (-1, GROUP)) * factors).float().flatten(-2)
