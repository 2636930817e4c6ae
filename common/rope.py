"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864); pairs are split in halves (i with i + D/2)."""

import triton
import triton.language as tl


@triton.jit
def load_rotated(x_ptr, head, head_mask, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr):
    """Rotate heads of x, float32 [heads, HEAD_DIM] in memory, by the angles of one position.

    `head` holds the heads' numbers [N], `cos_ptr` and `sin_ptr` point to that position's HEAD_DIM / 2 values.
    Returns float32 [N, HEAD_DIM], zeros where masked.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, HALF)
    offsets = head[:, None] * HEAD_DIM + pair[None, :]
    low = tl.load(x_ptr + offsets, mask=head_mask[:, None], other=0.0)
    high = tl.load(x_ptr + offsets + HALF, mask=head_mask[:, None], other=0.0)
    cos, sin = tl.load(cos_ptr + pair)[None, :], tl.load(sin_ptr + pair)[None, :]
    rotated = tl.join(low * cos - high * sin, high * cos + low * sin)
    return tl.reshape(tl.permute(rotated, (0, 2, 1)), (head.shape[0], HEAD_DIM))
