"""The router's choice of experts, as the later phases of a layer use it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Choice(NamedTuple):
    """The chosen experts by rank: rank 0 has the largest logit."""

    experts: Any  # a tuple of int32 scalars
    weights: Any  # float32 [power of two], the factor of each expert's output


class ExpertTiles(NamedTuple):
    """Tiles that a program multiplies in one step: `count` tiles from `first` on, of the expert of a rank."""

    rank: Any
    first: Any
    count: Any


@triton.jit
def no_choice():
    """Return the Choice of a layer whose router has not run yet."""
    zero = tl.cast(0, tl.int32)
    return Choice((zero,), zero)


@triton.jit
def pick(vector, i):
    """Return element i of a vector held in registers."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == i, vector, 0), axis=0)


@triton.jit
def elements(vector, N: tl.constexpr):
    """Return the first N elements of a vector held in registers as a tuple of scalars."""
    scalars = ()
    for i in tl.static_range(N):
        scalars = scalars + (pick(vector, i),)
    return scalars


@triton.jit
def element(scalars, i):
    """Return element i of a tuple of scalars, or the first if there is none; i is a scalar or a tensor."""
    value = scalars[0]
    for n in tl.static_range(1, len(scalars)):
        value = tl.where(i == n, scalars[n], value)
    return value
