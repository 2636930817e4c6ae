"""Rows of a dense matrix times a float32 vector, whatever the matrix's FORMAT: "bf16", "fp8-row" or "fp8-32"."""

import triton
import triton.language as tl

from common.gemv_bf16 import gemv_bf16, load_bf16_rows, load_split_vector
from common.gemv_fp8 import gemv_fp8, load_fp8_rows, load_whole_vector, scale_stride


@triton.constexpr_function
def item_bytes(dense_format: str) -> int:
    """Return the bytes of an element."""
    return 2 if dense_format == "bf16" else 1


@triton.constexpr_function
def vector_prescale(dense_format: str) -> float:
    """Return the power of two by which a vector is multiplied before a product, and by which the product is too large.

    E4M3 elements are up to 448 times as large as the numbers that they and their scales stand for. Without it the sum
    of a row of up to 37,000 elements could leave float32 before the scales bring it back.
    """
    return 1.0 if dense_format == "bf16" else 2.0**-24


@triton.constexpr_function
def row_scale_bytes(k: int, dense_format: str) -> int:
    """Return the bytes of a row's scales that come with it through the ring."""
    return scale_stride(k, dense_format) if dense_format == "fp8-32" else 0


@triton.jit
def matrix_at(w_ptr, layer, ROWS: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """Return the pointer to a layer's matrix [ROWS, K] among those of all layers, given as int32."""
    return w_ptr + layer * ROWS * (K * item_bytes(FORMAT) // 4)


@triton.jit
def scales_at(scales_ptr, layer, ROWS: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """Return the pointer to the scales of a layer's matrix [ROWS, K] among those of all layers."""
    return scales_ptr + layer * ROWS * scale_stride(K, FORMAT)


@triton.jit
def load_row_vector(x_ptr, MATRIX: tl.constexpr, zero):
    """Return x [k] as gemv_rows takes it for a common.build.Matrix."""
    if MATRIX.format == "bf16":
        return load_split_vector(x_ptr, MATRIX.k, MATRIX.k_block, zero)
    else:
        return load_whole_vector(x_ptr, MATRIX.k, MATRIX.k_block, zero)


@triton.jit
def load_rows(matrix, row0, end_row, MATRIX: tl.constexpr, zero):
    """Return a tile of an Operand from row0 on as gemv_rows takes it; rows from end_row on are zeros."""
    FORMAT: tl.constexpr = MATRIX.format
    if FORMAT == "bf16":
        return load_bf16_rows(matrix.ptr, row0, end_row, MATRIX.k, MATRIX.tile_rows, MATRIX.k_block, zero)
    else:
        return load_fp8_rows(matrix, row0, end_row, MATRIX, zero)


@triton.jit
def gemv_rows(tile, x, MATRIX: tl.constexpr, MACHINE: tl.constexpr):
    """Return tile @ x, float32 [tile_rows], of what load_rows and load_row_vector return."""
    FORMAT: tl.constexpr = MATRIX.format
    if FORMAT == "bf16":
        return gemv_bf16(tile, x)
    else:
        return gemv_fp8(tile, x, FORMAT, MACHINE)
