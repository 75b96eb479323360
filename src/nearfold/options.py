"""Types of the command line's options: each says the range it takes. And what went wrong, in one line."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

MANY = 1_000_000_000
"""More than anybody has of anything that is counted here."""
PIXELS = 1 << 16
"""The longest side of an image, and the greatest number of channels."""


NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
"""As Python writes numbers, in plain digits; of any length that is no power of ten beyond what a float holds."""


def whole(least: int = 1, most: int = MANY) -> Callable[[str], int]:
    """A type of whole numbers, both ends included.

    >>> whole(0, 8)("8")
    8
    >>> whole(0, 8)("9")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: wanted a whole number from 0 to 8, got '9'
    """

    def read(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,18}", text) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"wanted a whole number from {least:,} to {most:,}, got {brief(text)}")

    return read


def above(least: float, *, allow: bool = False) -> Callable[[str], float]:
    """A type of finite numbers above one, or, with `allow`, from it on.

    >>> above(0)("1e-3")
    0.001
    """

    def read(text: str) -> float:
        number = float(text) if NUMBER.fullmatch(text) else math.nan
        if math.isfinite(number) and (number > least or (allow and number == least)):
            return number
        raise argparse.ArgumentTypeError(
            f"wanted a number {'of at least' if allow else 'above'} {least:g}, got {brief(text)}"
        )

    return read


def sizes(text: str, least: int, wanted: str) -> tuple[int, ...]:
    """Read at least so many positive numbers, separated by commas or x.

    >>> sizes("16x64x100", 3, "batch, channels and grid, such as 16,64,100")
    (16, 64, 100)
    """
    numbers = re.split("[,x]", text)
    if len(numbers) < least or not all(re.fullmatch("[1-9][0-9]*", number) for number in numbers):
        raise argparse.ArgumentTypeError(f"wanted {wanted}; got {brief(text)}")
    if any(len(number) > 10 or int(number) > MANY for number in numbers):
        raise argparse.ArgumentTypeError(f"every number must be at most {MANY:,}; got {brief(text)}")
    return tuple(map(int, numbers))


def folder(text: str) -> Path:
    """A type of folders that are there, or can be made.

    >>> folder("runs/new").name
    'new'
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"wanted the name of a folder, got {brief(text)}")
    there = Path(text)
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is no folder: name another one")
    return Path(text)


def brief(text: str) -> str:
    """A text as it was given, in quotes, shortened where it is long.

    >>> brief("9" * 99)
    "'999999999999999999999999999999...' (99 characters)"
    """
    return repr(text) if len(text) <= 60 else f"{text[:30] + '...'!r} ({len(text):,} characters)"


def line(error: BaseException | str) -> str:
    r"""What an error says, in one line that a terminal can show.

    >>> line("size mismatch:\n\tcopying a param")
    'size mismatch: copying a param'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
    return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"
