"""E4M3 weights: dense matrices in a byte an element, with a scale for each row or, in E8M0, for each 32 along it.

Formulas: OCP 8-bit Floating Point (E4M3) and OCP Microscaling Formats v1.0 (E8M0). Scales are chosen such that nothing
saturates: the largest magnitude of a row becomes 448, of a group at most 448.
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
PIECE_BYTES = 1 << 20  # that are quantized at a time, within a CPU's caches


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
    """float32 [..., rows, K] of what quantize_fp8 returns, or a file holds: a scale that is NaN makes NaN."""
    if scales.dtype == torch.float32:
        return elements.float() * scales[..., None]
    factors = torch.exp2(scales.double() - 127).masked_fill(scales == E8M0_NAN, torch.nan)[..., None]
    return (elements.float().unflatten(-1, (-1, GROUP)) * factors).float().flatten(-2)


def quantize_into(
    elements: Tensor,
    scales: Tensor,
    matrix: Tensor,
    piece_bytes: int,
    move: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> None:
    """quantize_fp8 of a matrix [rows, K], a few rows at a time, as that takes several times their bytes.

    elements: of K bytes a row, of any dtype. scales: float32 [rows], or uint8 [rows, K / 32 or more]. `move` brings
    rows to their device.
    """
    dense_format = FP8_ROWS if scales.dim() == 1 else FP8_GROUPS
    step = max(1, piece_bytes // matrix[0].nbytes)
    for target, target_scales, rows in zip(elements.split(step), scales.split(step), matrix.split(step)):
        found, found_scales = quantize_fp8(move(rows), dense_format)
        target.view(torch.uint8).copy_(found.view(torch.uint8))
        target_scales[..., : found_scales.shape[-1]].copy_(found_scales)


class QuantizedCheckpoint:
    """A checkpoint with its dense matrices in given formats, quantized when they are asked for and not kept."""

    def __init__(self, checkpoint, dense: DenseFormats):
        """InputError if the checkpoint has some of them in another FP8 format: see held_formats."""
        self._checkpoint = checkpoint
        self.config = dataclasses.replace(checkpoint.config, dense=held_formats(checkpoint, dense))

    @property
    def name(self) -> str:
        return self._checkpoint.name

    def tensor(self, name: str) -> Tensor:
        """The tensor of this published name, or the scales of one, see scale_name. Raises KeyError."""
        matrix = name.removesuffix(SCALE_ENDING)
        if not self._is_quantized(matrix):
            return self._checkpoint.tensor(name)
        elements, scales = self._quantize(matrix, self._checkpoint.tensor(matrix))
        return elements if name == matrix else scales

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor), in the checkpoint's order, scales behind what they scale."""
        for name, tensor in self._checkpoint.tensors():
            if self._is_quantized(name):
                elements, scales = self._quantize(name, tensor)
                yield name, elements
                yield scale_name(name), scales
                del elements, scales  # before the next one comes
            else:
                yield name, tensor

    def document(self, name: str) -> bytes | None:
        """The checkpoint's."""
        return self._checkpoint.document(name)

    def check_unchanged(self) -> None:
        """The checkpoint's."""
        check_unchanged(self._checkpoint)

    def _is_quantized(self, name: str) -> bool:
        return self.config.dense.of(name) != self._checkpoint.config.dense.of(name)

    def _quantize(self, name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
        rows, k = matrix.shape
        elements = matrix.new_empty(rows, k, dtype=torch.float8_e4m3fn)
        if self.config.dense.of(name) == FP8_ROWS:
            scales = matrix.new_empty(rows, dtype=torch.float32)
        else:
            scales = matrix.new_empty(rows, k // GROUP, dtype=torch.uint8)
        quantize_into(elements, scales, matrix, PIECE_BYTES)
        return elements, scales
