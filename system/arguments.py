"""Check the arguments of public functions: a wrong type raises a TypeError that names the argument.

A value of the right type that is out of range raises an InputError.
"""

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Set
from types import UnionType

from system.errors import InputError


def integer(value, name: str, minimum: int | None = None) -> int:
    """Return an int, a NumPy integer or a tensor without dimensions as an int; booleans are not accepted.

    Raise TypeError for another type, InputError for a value below `minimum`.
    """
    is_boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_boolean or getattr(value, "ndim", 0):
        raise _wrong_type(name, "an integer", value)
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without numbers
        raise _wrong_type(name, "an integer", value) from None
    if minimum is not None and number < minimum:
        raise InputError(f"{name} {number}: at least {minimum}")
    return number


def integer_or_none(value, name: str, minimum: int | None = None) -> int | None:
    return None if value is None else integer(value, name, minimum)


def integers(values: Iterable, name: str) -> list[int]:
    """Return the integers of an iterable, such as a list, a NumPy array, a tensor with one dimension or a generator.

    Raise TypeError if it is no ordered iterable or yields something else.
    """
    if isinstance(values, str | bytes | bytearray | Mapping | Set):
        raise _wrong_type(name, "a sequence of integers", values)
    try:
        items = iter(values)
    except TypeError:
        raise _wrong_type(name, "a sequence of integers", values) from None
    return [integer(value, f"{name}[{n}]") for n, value in enumerate(items)]


def sequence(values: Iterable, name: str, expected: str) -> list:
    """Return the items of an ordered iterable. Raise TypeError if it is none, or text; `expected` says what is."""
    if isinstance(values, str | bytes | bytearray | Mapping | Set) or not isinstance(values, Iterable):
        raise _wrong_type(name, expected, values)
    return list(values)


def number(value: float, name: str) -> float:
    """Return a real number, such as an int or a NumPy float, as a float; an int beyond all floats is infinite.

    Raise TypeError for another type.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong_type(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def text(value: str, name: str) -> str:
    """Return a str. Raise TypeError for another type."""
    if not isinstance(value, str):
        raise _wrong_type(name, "a text", value)
    return value


def boolean(value, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "True or False", value)
    return value


def instance(value, expected_type: type | UnionType, name: str) -> None:
    """Raise TypeError unless a value is None or of the expected type."""
    if value is not None and not isinstance(value, expected_type):
        type_name = expected_type.__name__ if isinstance(expected_type, type) else str(expected_type)
        raise _wrong_type(name, f"of type {type_name}", value)


def function_or_none(value: Callable | None, name: str) -> None:
    if value is not None and not callable(value):
        raise _wrong_type(name, "a function", value)


def one_of(value, choices: tuple, name: str) -> None:
    if not any(value is choice for choice in choices):
        raise InputError(f"{name} {value!r}: one of {', '.join(map(str, choices))}")


def _wrong_type(name: str, expected: str, value) -> TypeError:
    shape = f" of shape {tuple(value.shape)}" if getattr(value, "ndim", 0) else ""
    text = "" if shape else f" {value!r:.40}" if isinstance(value, bool | int | float | str | bytes) else ""
    return TypeError(f"{name} must be {expected}, not {type(value).__name__}{shape}{text}")
