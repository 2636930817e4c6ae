"""Tensors [LANES], which have one element for each thread of a program."""

import triton
import triton.language as tl


@triton.jit
def by_lane(x):
    """[..., 4 LANES] -> four [..., LANES]: what is in places 4 i .. 4 i + 3 is thread i's own."""
    LANES: tl.constexpr = x.shape[len(x.shape) - 1] // 4
    even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [LANES, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return (a, b, c, d)
