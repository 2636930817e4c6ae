"""common.gemv_bf16 against products in float64. NaN stands in all memory that must not be read."""

import pytest
import torch
import triton
import triton.language as tl

from common import gemv_bf16

SHAPES = [(1, 1), (5, 37), (8, 32), (13, 129), (7, 2880)]
BLOCKS = [(1, 32), (4, 16), (8, 128), (16, 4096)]


@triton.jit
def gemv_kernel(
    out_ptr,
    w_ptr,
    x_ptr,
    norm_ptr,
    first_row,
    n_rows,
    rstd,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    tile = tl.program_id(0)
    row0 = first_row + tile * BLOCK_M
    if NORM:
        y = gemv_bf16(w_ptr, x_ptr, row0, n_rows, K, BLOCK_M, BLOCK_K, norm_ptr, rstd)
    else:
        y = gemv_bf16(w_ptr, x_ptr, row0, n_rows, K, BLOCK_M, BLOCK_K)
    tl.store(out_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), y)


def before_nan(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat((x.flatten(), x.new_full((count,), torch.nan)))


def gemv(w, x, block_m, block_k, norm=None, rstd=1.0, first_row=0) -> torch.Tensor:
    """All tiles from first_row on: what they give beyond the matrix must be 0, and is cut off."""
    rows, k = w.shape
    n_tiles = triton.cdiv(rows - first_row, block_m)
    out = torch.full((n_tiles * block_m,), torch.nan)
    gemv_kernel[(n_tiles,)](
        out,
        before_nan(w, (block_m + 1) * k + block_k),
        before_nan(x, block_k),
        before_nan(x if norm is None else norm, block_k),
        first_row,
        rows,
        rstd,
        K=k,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        NORM=norm is not None,
    )
    assert (out[rows - first_row :] == 0).all()
    return out[: rows - first_row]


def small_integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("block_m, block_k", BLOCKS)
@pytest.mark.parametrize("rows, k", SHAPES)
def test_products_of_integers_are_exact(rows, k, block_m, block_k):
    w, x, norm = (small_integers(*shape, seed=i) for i, shape in enumerate([(rows, k), (k,), (k,)]))
    assert torch.equal(gemv(w.bfloat16(), x, block_m, block_k), w @ x)
    assert torch.equal(gemv(w.bfloat16(), x, block_m, block_k, norm, rstd=0.25), w @ (x * norm) / 4)


@pytest.mark.parametrize("first_row", [1, 3, 12])
@pytest.mark.parametrize("block_m, block_k", BLOCKS)
def test_rows_from_the_middle_on(first_row, block_m, block_k):
    w, x = small_integers(13, 129, seed=0), small_integers(129, seed=1)
    assert torch.equal(gemv(w.bfloat16(), x, block_m, block_k, first_row=first_row), (w @ x)[first_row:])


def test_rows_before_the_first_are_not_read():
    w, x = small_integers(13, 129, seed=0), small_integers(129, seed=1)
    expected = (w @ x)[6:]
    w[:6] = torch.nan
    assert torch.equal(gemv(w.bfloat16(), x, 4, 32, first_row=6), expected)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("block_m, block_k", BLOCKS)
def test_real_numbers(block_m, block_k, with_norm):
    rows, k, rstd = 7, 2880, 0.731
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, k, generator=generator).bfloat16()
    x = torch.randn(k, generator=generator)
    norm = torch.randn(k, generator=generator) if with_norm else None
    effective = x.double() * (torch.tensor(rstd).double() * norm.double() if with_norm else 1)
    actual = gemv(w, x, block_m, block_k, norm, rstd).double()
    # A lane sums K / BLOCK_K terms one after another, the lanes are summed in pairs; products and norm round thrice.
    roundings = triton.cdiv(k, block_k) + block_k.bit_length() + 3
    bound = roundings * 2.0**-24 * (w.double().abs() @ effective.abs())
    assert ((actual - w.double() @ effective).abs() <= bound).all()


def test_the_vector_is_not_rounded():
    """A float32 activation whose last bit decides."""
    w = torch.tensor([[1.0, 1.0]]).bfloat16()
    x = torch.tensor([1 + 2.0**-23, -1.0])
    assert gemv(w, x, 1, 2).item() == 2.0**-23
    assert gemv(w, x, 1, 2, norm=torch.ones(2)).item() == 2.0**-23


def test_huge_and_nan_values_stay():
    w = torch.zeros(3, 40)
    w[0, 0], w[1, 39], w[2, 20] = 2.0**100, 1.0, torch.nan
    x = torch.zeros(40)
    x[0], x[39] = 2.0**27, -3.0
    out = gemv(w.bfloat16(), x, 4, 16)
    assert out[:2].tolist() == [2.0**127, -3.0]
    assert out[2].isnan()
