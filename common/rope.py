"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864); pairs are split in halves (i with i + D/2)."""

import triton
import triton.language as tl


@triton.jit
def load_rotated(x_ptr, head, head_mask, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, zero=0):
    """Rotate heads of x, float32 [heads, HEAD_DIM] in memory, by the angles of one position or, each, of its own.

    `head` holds the heads' numbers [N], `cos_ptr` and `sin_ptr` point to that position's HEAD_DIM / 2 values; or they
    are pointers [N, 1].
    Returns float32 [N, HEAD_DIM], zeros where masked.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, HEAD_DIM) + zero
    x = tl.load(x_ptr + head[:, None] * HEAD_DIM + dim[None, :], mask=head_mask[:, None], other=0.0)
    # Read again rather than exchanged between threads.
    other = (dim + HALF) % HEAD_DIM
    partner = tl.load(x_ptr + head[:, None] * HEAD_DIM + other[None, :], mask=head_mask[:, None], other=0.0)
    angle, first = (dim % HALF)[None, :], (dim < HALF)[None, :]
    cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
    return x * cos + partner * tl.where(first, -sin, sin)
