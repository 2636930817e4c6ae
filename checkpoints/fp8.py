"""Quantize dense matrices to E4M3, one byte per element, with a float32 scale per row or an E8M0 scale per 32 elements.

Formulas: OCP 8-bit Floating Point (E4M3) and OCP Microscaling Formats v1.0 (E8M0). Scales are chosen so that nothing
saturates: the largest magnitude becomes 448 in a row, and at most 448 in a group.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from checkpoints.checkpoint import check_unchanged
from checkpoints.config import FP8_GROUPS, FP8_ROWS, SCALE_ENDING, DenseFormats, held_formats, scale_name
from checkpoints.config import MXFP4_GROUP as GROUP
from system.errors import InputError

E4M3_MAX = 448.0
E8M0_NAN = 255
PIECE_BYTES = 1 << 20  # quantized at a time, within a CPU's caches


def quantize_fp8(matrix: Tensor, dense_format: str) -> tuple[Tensor, Tensor]:
    """Return the elements, float8_e4m3fn [..., rows, K], and the scales of a matrix [..., rows, K], on its device.

    Scales are float32 [..., rows] for FP8_ROWS and E8M0 as uint8 [..., rows, K / 32] for FP8_GROUPS. Elements are
    rounded to nearest even. Raise InputError if K is not a multiple of 32 for FP8_GROUPS.
    """
    matrix = matrix.float()
    if dense_format == FP8_ROWS:
        largest = matrix.abs().amax(-1)
        scales = torch.where(largest > 0, _divide_by_448(largest), 1.0)
        return (matrix / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales
    assert dense_format == FP8_GROUPS
    if matrix.shape[-1] % GROUP:
        raise InputError(f"{dense_format}: rows of {matrix.shape[-1]} elements are no whole groups of {GROUP}")
    groups = matrix.unflatten(-1, (-1, GROUP))
    mantissa, exponent = torch.frexp(_divide_by_448(groups.abs().amax(-1)))
    # frexp: x = m 2^e with m in [0.5, 1), so the least power of two not below x is 2^e, or 2^(e - 1) if m = 0.5.
    biased = (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254)
    elements = groups * torch.exp2((127 - biased).double())[..., None]
    elements = elements.masked_fill(elements.isinf(), torch.nan)  # the conversion would turn infinity into 448
    return elements.float().flatten(-2).to(torch.float8_e4m3fn), biased.to(torch.uint8)


def _divide_by_448(x: Tensor) -> Tensor:
    """Divide by a tensor, as a GPU would multiply by a number's reciprocal and give other scales than a CPU."""
    return x / torch.full_like(x, E4M3_MAX)


def dequantize_fp8(elements: Tensor, scales: Tensor) -> Tensor:
    """Return the values, float32 [..., rows, K], of elements and scales as quantize_fp8 returns them.

    A scale that is NaN, which a file may hold, makes its elements NaN.
    """
    if scales.dtype == torch.float32:
        return elements.float() * scales[..., None]
    factors = torch.exp2(scales.double() - 127).masked_fill(scales == E8M0_NAN, torch.nan)[..., None]
    return (elements.float().unflatten(-1, (-1, GROUP)) * factors).float().flatten(-2)


def quantize_into(
    elements: Tensor,
    scales: Tensor,
    matrix: Tensor,
    piece_bytes: int,
    upload: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> None:
    """Quantize a matrix [rows, K] into `elements` and `scales`, a few rows at a time to bound the memory for it.

    elements: any dtype, K bytes per row. scales: float32 [rows] for FP8_ROWS, uint8 [rows, K / 32 or more] for
    FP8_GROUPS. piece_bytes: of the matrix at a time. upload: copies rows to the device of `elements`.
    """
    dense_format = FP8_ROWS if scales.dim() == 1 else FP8_GROUPS
    step = max(1, piece_bytes // matrix[0].nbytes)
    for target, target_scales, rows in zip(elements.split(step), scales.split(step), matrix.split(step)):
        quantized, row_scales = quantize_fp8(upload(rows), dense_format)
        target.view(torch.uint8).copy_(quantized.view(torch.uint8))
        target_scales[..., : row_scales.shape[-1]].copy_(row_scales)


class QuantizedCheckpoint:
    """A checkpoint with its dense matrices in given formats, quantized on request and not kept."""

    def __init__(self, checkpoint, dense: DenseFormats):
        """Wrap a checkpoint. Raise InputError if it holds a matrix in another FP8 format, see held_formats."""
        self._checkpoint = checkpoint
        self.config = dataclasses.replace(checkpoint.config, dense=held_formats(checkpoint, dense))

    @property
    def name(self) -> str:
        return self._checkpoint.name

    def tensor(self, name: str) -> Tensor:
        """Return the tensor of this published name, or a matrix's scales by scale_name. Raise KeyError for others."""
        matrix = name.removesuffix(SCALE_ENDING)
        if not self._is_quantized(matrix):
            return self._checkpoint.tensor(name)
        elements, scales = self._quantize(matrix, self._checkpoint.tensor(matrix))
        return elements if name == matrix else scales

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each (name, tensor) in the checkpoint's order, a matrix's scales right after it."""
        for name, tensor in self._checkpoint.tensors():
            if self._is_quantized(name):
                elements, scales = self._quantize(name, tensor)
                yield name, elements
                yield scale_name(name), scales
                del elements, scales  # frees them before the next matrix is read
            else:
                yield name, tensor

    def document(self, name: str) -> bytes | None:
        """Return the wrapped checkpoint's document of this name, or None if it has none."""
        return self._checkpoint.document(name)

    def check_unchanged(self) -> None:
        """Raise InputError if a file that the wrapped checkpoint reads has changed since it was opened."""
        check_unchanged(self._checkpoint)

    def _is_quantized(self, name: str) -> bool:
        return self.config.dense.format_of(name) != self._checkpoint.config.dense.format_of(name)

    def _quantize(self, name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
        rows, k = matrix.shape
        elements = matrix.new_empty(rows, k, dtype=torch.float8_e4m3fn)
        if self.config.dense.format_of(name) == FP8_ROWS:
            scales = matrix.new_empty(rows, dtype=torch.float32)
        else:
            scales = matrix.new_empty(rows, k // GROUP, dtype=torch.uint8)
        quantize_into(elements, scales, matrix, PIECE_BYTES)
        return elements, scales
