"""Tensors [LANES], which have one element for each thread of a program."""

import triton
import triton.language as tl


@triton.jit
def by_lane(x, LANES: tl.constexpr):
    """[4 LANES] -> four [LANES]: what is in places 4 i .. 4 i + 3 is thread i's own."""
    even, odd = tl.split(tl.reshape(x, (LANES, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return (a, b, c, d)
