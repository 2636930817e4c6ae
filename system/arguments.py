"""Checks of what Python code hands to the public functions: the wrong kind is a TypeError that names the argument.

A value of the right kind that lies out of range is an InputError.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Set
from types import UnionType

from system.errors import InputError


def integer(value, name: str, least: int | None = None) -> int:
    """An int, or what stands for one: of NumPy, or a tensor without dimensions. Booleans stand for none."""
    is_boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_boolean or getattr(value, "ndim", 0):
        raise _wrong_kind(name, "an integer", value)
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without numbers
        raise _wrong_kind(name, "an integer", value) from None
    if least is not None and number < least:
        raise InputError(f"{name} {number}: at least {least}")
    return number


def integer_or_none(value, name: str, least: int | None = None) -> int | None:
    return None if value is None else integer(value, name, least)


def integers(values: Iterable, name: str) -> list[int]:
    """A sequence of integers, such as a list, a NumPy array or a tensor with one dimension, or what yields them."""
    if isinstance(values, str | bytes | bytearray | Mapping | Set):
        raise _wrong_kind(name, "a sequence of integers", values)
    try:
        items = iter(values)
    except TypeError:
        raise _wrong_kind(name, "a sequence of integers", values) from None
    return [integer(value, f"{name}[{n}]") for n, value in enumerate(items)]


def boolean(value, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_kind(name, "True or False", value)
    return value


def instance(value, kind: type | UnionType, name: str) -> None:
    """None, or of that kind."""
    if value is not None and not isinstance(value, kind):
        shown = kind.__name__ if isinstance(kind, type) else str(kind)
        raise _wrong_kind(name, f"of type {shown}", value)


def function_or_none(value: Callable | None, name: str) -> None:
    if value is not None and not callable(value):
        raise _wrong_kind(name, "a function", value)


def one_of(value, choices: tuple, name: str) -> None:
    if not any(value is choice for choice in choices):
        raise InputError(f"{name} {value!r}: one of {', '.join(map(str, choices))}")


def _wrong_kind(name: str, expected: str, value) -> TypeError:
    shape = f" of shape {tuple(value.shape)}" if getattr(value, "ndim", 0) else ""
    shown = "" if shape else f" {value!r:.40}" if isinstance(value, bool | int | float | str | bytes) else ""
    return TypeError(f"{name} must be {expected}, not {type(value).__name__}{shape}{shown}")
