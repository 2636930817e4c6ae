"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864); pairs are split in halves (i with i + D/2)."""

import triton
import triton.language as tl


@triton.jit
def load_rotated(x_ptr, head, head_mask, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, zero=0):
    """Load heads of x, float32 [heads, HEAD_DIM] in memory, rotated by the angles of a position: float32 [N, HEAD_DIM].

    `head` [N] holds the heads' numbers. cos_ptr and sin_ptr point to a position's HEAD_DIM / 2 values or, [N, 1], to
    those of each head's own position. Heads outside head_mask are zeros.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, HEAD_DIM) + zero
    x = tl.load(x_ptr + head[:, None] * HEAD_DIM + dim[None, :], mask=head_mask[:, None], other=0.0)
    # Loaded again rather than exchanged between threads.
    partner_dim = (dim + HALF) % HEAD_DIM
    partner = tl.load(x_ptr + head[:, None] * HEAD_DIM + partner_dim[None, :], mask=head_mask[:, None], other=0.0)
    angle, is_first = (dim % HALF)[None, :], (dim < HALF)[None, :]
    cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
    return x * cos + partner * tl.where(is_first, -sin, sin)
