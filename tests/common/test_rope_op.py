"""common.rope against complex multiplication in float64. NaN stands in all memory that must not be read."""

import pytest
import torch
import triton
import triton.language as tl

from common.rope import load_rotated

HEAD_DIMS = [16, 32, 64, 128]


@triton.jit
def rotate_kernel(out_ptr, x_ptr, head_ptr, mask_ptr, cos_ptr, sin_ptr, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    i = tl.arange(0, N)
    rotated = load_rotated(x_ptr, tl.load(head_ptr + i), tl.load(mask_ptr + i) != 0, cos_ptr, sin_ptr, HEAD_DIM)
    tl.store(out_ptr + i[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], rotated)


def rotate(x: torch.Tensor, heads: list[int], taken: list[bool], cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads of x [n_heads, head_dim]; return [len(heads), head_dim]."""
    out = torch.full((len(heads), x.shape[1]), torch.nan)
    head, mask = torch.tensor(heads, dtype=torch.int32), torch.tensor(taken, dtype=torch.int32)
    rotate_kernel[(1,)](out, x, head, mask, cos, sin, N=len(heads), HEAD_DIM=x.shape[1])
    return out


def random_angles(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(head_dim)) * 1000
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("concentration", [1.0, 1.34657])
def test_rotation(head_dim, concentration):
    x = torch.randn(5, head_dim, generator=torch.Generator().manual_seed(1))
    cos, sin = (table * concentration for table in random_angles(head_dim))
    heads = [3, 0, 4, 4]
    low, high = x.double()[heads].chunk(2, -1)
    turned = torch.complex(low, high) * torch.complex(cos.double(), sin.double())
    expected = torch.cat((turned.real, turned.imag), -1)
    actual = rotate(x, heads, [True] * 4, cos, sin).double()
    # Two products and their sum round by half an ulp each, of at most the pair's length times the concentration.
    bound = 4 * 2**-24 * concentration * torch.hypot(low, high).repeat(1, 2)
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_norm_is_kept(head_dim):
    x = torch.randn(1, head_dim, generator=torch.Generator().manual_seed(2))
    rotated = rotate(x, [0], [True], *random_angles(head_dim))
    # cos^2 + sin^2 of float32 values, and the elements, err by a few half ulps.
    torch.testing.assert_close(rotated.double().norm(), x.double().norm(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_element_i_pairs_with_i_plus_half(head_dim):
    half = head_dim // 2
    cos, sin = random_angles(head_dim)
    rotated = rotate(torch.eye(head_dim), list(range(head_dim)), [True] * head_dim, cos, sin)
    expected = torch.zeros(head_dim, head_dim)
    for i in range(half):
        expected[i, i], expected[i, i + half] = cos[i], sin[i]
        expected[i + half, i], expected[i + half, i + half] = -sin[i], cos[i]
    assert torch.equal(rotated, expected)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_masked_heads_are_zero_and_not_read(head_dim):
    x = torch.randn(4, head_dim, generator=torch.Generator().manual_seed(3))
    x[1] = x[3] = torch.nan
    angles = random_angles(head_dim)
    rotated = rotate(x, [0, 1, 2, 3], [True, False, True, False], *angles)
    assert torch.equal(rotated[[0, 2]], rotate(x, [0, 2], [True, True], *angles))
    assert (rotated[[1, 3]] == 0).all()
