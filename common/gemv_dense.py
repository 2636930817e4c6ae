"""Rows of a dense matrix times a float32 vector, whatever the matrix's FORMAT: "bf16", "fp8-row" or "fp8-32"."""

import triton
import triton.language as tl

from common.gemv_bf16 import gemv_bf16, gemv_bf16_slot, load_bf16_rows, load_vector
from common.gemv_fp8 import gemv_fp8, gemv_fp8_slot, load_fp8_rows, load_whole_vector, scale_stride


@triton.constexpr_function
def item_bytes(dense_format: str) -> int:
    """Bytes of an element."""
    return 2 if dense_format == "bf16" else 1


@triton.constexpr_function
def vector_unit(dense_format: str) -> float:
    """The power of two that a vector comes times, and its products leave with.

    E4M3 elements are up to 448 times as large as what they stand for with their scales. Without it the sum of a row,
    here of up to 37,000 elements, could leave float32 before the scales bring it back.
    """
    return 1.0 if dense_format == "bf16" else 2.0**-24


@triton.constexpr_function
def row_scale_bytes(k: int, dense_format: str) -> int:
    """Bytes of a row's scales that come with it through the ring."""
    return scale_stride(k, dense_format) if dense_format == "fp8-32" else 0


@triton.constexpr_function
def row_lanes(k: int, dense_format: str, tuning) -> int:
    """Threads that share a row of a tile: dense_lanes, or half of them where of those too many have nothing to read.

    2,880 columns of E4M3 keep 94% of 64 threads busy and 70% of 128.
    """

    def busy(lanes: int) -> float:
        run = lanes * (8 if dense_format == "bf16" else 16)
        return k / (-(-k // run) * run)

    lanes = tuning.dense_lanes
    halves = dense_format != "bf16" and lanes > 32 and busy(lanes // 2) > 1.1 * busy(lanes)
    return lanes // 2 if halves else lanes


@triton.jit
def matrix_at(w_ptr, layer, ROWS: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """A layer's matrix [ROWS, K] in a stack of them given as int32."""
    return w_ptr + layer * ROWS * (K * item_bytes(FORMAT) // 4)


@triton.jit
def scales_of(scales_ptr, layer, ROWS: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """A layer's scales."""
    return scales_ptr + layer * ROWS * scale_stride(K, FORMAT)


@triton.jit
def load_row_vector(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr, zero):
    """x [K] as gemv_rows takes it."""
    if FORMAT == "bf16":
        return load_vector(x_ptr, K, BLOCK_K, zero)
    else:
        return load_whole_vector(x_ptr, K, BLOCK_K, zero)


@triton.jit
def load_rows(
    w_ptr,
    scales_ptr,
    row0,
    end_row,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    zero,
):
    """Rows row0 .. row0 + M of a matrix [rows, K] as gemv_rows takes them; from end_row on they are zeros."""
    if FORMAT == "bf16":
        return load_bf16_rows(w_ptr, row0, end_row, K, M, BLOCK_K, zero)
    else:
        return load_fp8_rows(w_ptr, scales_ptr, row0, end_row, K, M, BLOCK_K, FORMAT, zero)


@triton.jit
def gemv_rows(tile, x, FORMAT: tl.constexpr, ARCH: tl.constexpr):
    """tile @ x, float32 [M]."""
    if FORMAT == "bf16":
        return gemv_bf16(tile, x)
    else:
        return gemv_fp8(tile, x, FORMAT, ARCH)


@triton.jit
def gemv_slot(pieces, x, n_rows, K: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr, ARCH: tl.constexpr):
    """What each thread has of M rows in a slot of the ring: see gemv_bf16_slot, but for the scales of rows."""
    if FORMAT == "bf16":
        return gemv_bf16_slot(pieces[0], x, n_rows, K, M, ARCH)
    else:
        return gemv_fp8_slot(pieces, x, n_rows, K, M, FORMAT, ARCH)
