"""The command line: its parser, types of options that each say the range they take, and errors in one line.

Loads nothing else of the package: `nearfold --help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

MANY = 1_000_000_000
"""More than anybody has of anything that is counted here."""
PIXELS = 1 << 16
"""The longest side of an image, and the greatest number of channels."""

Fill = str | Callable[["Parser"], None]
"""What a command adds to its parser: a function, or a module with EXAMPLES, ``arguments(parser)`` and ``run(args)``,
which returns the exit code; a group of commands has no ``run``."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which suggests what was meant.

    Args:
        fill: of a command, asked for when it is the one to be read.
        options: of an ArgumentParser.
    """

    def __init__(self, *, fill: Fill | None = None, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._fill = fill

    def add_commands(self, title: str, metavar: str, commands: Mapping[str, tuple[str, Fill]]) -> None:
        """Add commands: their names, with a summary each and what fills their parsers."""
        group = self.add_subparsers(title=title, metavar=metavar, required=True)
        for name, (summary, fill) in commands.items():
            group.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", fill=fill)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As always, but what is not known is an error of the command that it was given to."""
        fill, self._fill = self._fill, None
        if isinstance(fill, str):
            module = importlib.import_module(fill)
            self.epilog = module.EXAMPLES
            module.arguments(self)
            if hasattr(module, "run"):
                self.set_defaults(command=module.run)
        elif fill is not None:
            fill(self)
        if self._subparsers is None and args is not None:  # of a group, what follows is for its commands
            self._require_known(args)
        namespace, extras = super().parse_known_args(args, namespace)
        if extras:
            self.error(f"unrecognized arguments: {' '.join(extras)}")
        return namespace, extras

    def _require_known(self, args: Sequence[str]) -> None:
        """Say that an option is not known before its value is taken for something, or another is found missing."""
        known = self._option_string_actions
        for arg in args:
            if arg == "--":
                return
            name = arg.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                self.error(f"unrecognized arguments: {arg}{meant(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += meant(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and end with exit code 2."""
        self.exit(2, f"{self.prog}: error: {line(message)} (see {self.prog} --help)\n")


def meant(name: str, known: Iterable[str], most: int = 1) -> str:
    """The known names that are spelled most alike, as a question; nothing where none is close.

    >>> meant("trian", ["train", "models"]), meant("zzz", ["train"]), meant("resnet", ["resnet18", "resnet34"], 5)
    ('; did you mean train?', '', '; did you mean resnet34 or resnet18?')
    """
    close = difflib.get_close_matches(name[:100], known, n=most)
    return f"; did you mean {' or '.join(close)}?" if close else ""


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
    _require_open(there)
    return Path(text)


def file(text: str) -> Path:
    """A type of files that can be written: said before anything is done for them.

    >>> file("runs/new.json").name
    'new.json'
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"wanted the name of a file, got {brief(text)}")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{brief(text)} is a folder: name a file")
    there = Path(text).absolute().parent
    while not os.path.lexists(there):
        there = there.parent
    _require_open(there)
    return Path(text)


def _require_open(folder: Path) -> None:
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{folder} is no folder: name another one")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{folder} cannot be written: name another folder")


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


def several(kind: Callable[[str], Any], what: str) -> Callable[[str], Sequence[Any]]:
    """A type for several values with commas between, each of a kind; ``what`` is wanted, for the message."""

    def parse(text: str) -> Sequence[Any]:
        try:
            return tuple(kind(part.strip()) for part in text.split(","))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"wanted {what}; got {text!r}") from error

    return parse


numbers = several(above(-math.inf), "a number for each channel, such as 0.485,0.456,0.406")
"""A type for numbers of channels."""
