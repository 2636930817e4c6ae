"""The router's choice of experts, as all later phases of a layer know it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Choice(NamedTuple):
    """The chosen experts by rank, the one with the largest logit first."""

    experts: Any  # a tuple of int32 scalars
    weights: Any  # float32 [power of two], what each expert's output counts


class ExpertTiles(NamedTuple):
    """Tiles that a program multiplies in one step: `count` of the expert of a rank, from `first` on."""

    rank: Any
    first: Any
    count: Any


@triton.jit
def no_choice():
    """The Choice of a layer whose router has not spoken."""
    zero = tl.cast(0, tl.int32)
    return Choice((zero,), zero)


@triton.jit
def pick(vector, i):
    """Element i of a vector held in registers."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == i, vector, 0), axis=0)


@triton.jit
def elements(vector, N: tl.constexpr):
    """The first N elements of a vector held in registers, as a tuple of scalars."""
    scalars = ()
    for i in tl.static_range(N):
        scalars = scalars + (pick(vector, i),)
    return scalars


@triton.jit
def element(scalars, i):
    """Element i, a scalar or a tensor, of a tuple of scalars; the first if there is no such."""
    value = scalars[0]
    for n in tl.static_range(1, len(scalars)):
        value = tl.where(i == n, scalars[n], value)
    return value
