"""Numbers that users give: as Python's own, whatever they came as, and within ranges that are said."""

from __future__ import annotations

import operator
from typing import Any

MOST = 2**31 - 1  # of an integer: products of two stay below 2^63
LARGEST = 1e18  # of a real number: its square is finite in float32
SHOWN = 20  # digits


def plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch, or a subclass of int or float, as Python's own; tuples entry by entry.

    Whatever is no number is returned as it is.

    >>> import numpy as np
    >>> plain(np.int64(3)), plain(np.bool_(True)), plain((np.int8(1), 2)), plain(np.float32(0.5)), plain("3")
    (3, True, (1, 2), 0.5, '3')
    """
    kind = type(value)
    if kind in (int, float, bool, str, type(None)):
        return value
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # asked before __index__: an array that holds a truth value has that, too
        kind = type(value)
    if isinstance(value, float):
        return float(value)
    if kind is not bool and hasattr(kind, "__index__"):
        try:
            return operator.index(value)
        except TypeError:  # an array of several numbers has the method
            return value
    return value


def shown(value: Any) -> str:
    """The value for a message: of a long number its digits are counted, of an array its shape is named.

    >>> import torch
    >>> shown(10**400), shown((3, 10**30)), shown("3"), shown(torch.zeros(2, 3))
    ('an integer of 401 digits', '(3, an integer of 31 digits)', "'3'", 'a Tensor of shape (2, 3)')
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        digits = int(abs(value).bit_length() * 0.30103)  # Python refuses to print more than some thousands
        digits += abs(value) >= 10**digits
        return f"an integer of {digits} digits"
    if type(value) is tuple:
        return "(" + ", ".join(map(shown, value)) + ("," if len(value) == 1 else "") + ")"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def integer(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """The integer as Python's own.

    Raises:
        ValueError: unless it is one, from least to most.

    >>> integer("k", True)
    Traceback (most recent call last):
    ValueError: k must be a positive integer, got True
    """
    value = plain(value)
    if type(value) is not int or value < least:
        rule = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return value


def real(name: str, value: Any) -> float:
    """The number as Python's own float.

    Raises:
        ValueError: unless it is a number from -1e18 to 1e18.
    """
    value = plain(value)
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        raise ValueError(f"{name} must be a finite number, at most {LARGEST:g} in size, got {shown(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """The truth value as Python's own; 0, 1 and None count as one.

    Raises:
        ValueError: unless it is one.
    """
    value = plain(value)
    if type(value) not in (bool, int, type(None)):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def sizes(name: str, value: Any, axes: int, least: int = 1) -> list[int]:
    """One integer per axis, from one for all of them or one for each.

    Raises:
        ValueError: unless they are integers of at least ``least``.
    """
    value = plain(value)
    entries = list(plain(tuple(value))) if isinstance(value, (list, tuple)) else [value] * axes
    if len(entries) != axes or any(type(n) is not int or not least <= n <= MOST for n in entries):
        raise ValueError(
            f"{name} must be an integer of at least {least}, at most {MOST}, or {axes} of them, got {shown(value)}"
        )
    return entries


def parts(n: int, size: int) -> int:
    """How many parts of at most so many n is. Not -(-n // size): ONNX divides integers towards zero.

    >>> parts(9, 4), parts(8, 4), parts(0, 4)
    (3, 2, 0)
    """
    return (n + size - 1) // size
