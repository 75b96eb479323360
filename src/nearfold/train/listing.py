"""The images of a data set on disk as a list: labels in memory, one image read when it is asked for."""

from __future__ import annotations

import bisect
import itertools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nearfold._images import first_line, read_file

UNLABELLED = -1
"""The label of an image whose label is kept secret."""

MOST_CLASSES = 1_000_000
"""A label is below this: classes are held by name, and a wrong number must not take all memory."""

MOST_SAMPLED = 1024
"""Files, or pieces of files, whose content tells a data set from another."""
_PIECE = 2**16

Read = Callable[[int], bytes]
"""A row -> the encoded image; ValueError where it cannot be read."""


class Records(Protocol):
    """The images of one split.

    Attributes:
        labels: int64 (N,).
        units: int64 (M + 1,): the rows at which the units of reading begin, and N. One image of a unit costs as much
            as all of them.
        unit_bytes: Memory that the largest unit takes once it is read; 0 where a unit is one image.
    """

    labels: Tensor
    units: Tensor
    unit_bytes: int

    def reader(self, units: int) -> Read:
        """Return a function that reads images, and keeps the last `units` units that it has read."""

    def where(self, row: int) -> str:
        """Return the file of an image, and its place in it, for messages."""

    def checksum(self) -> int:
        """Return what tells these files from others, wherever their folder is: names, sizes, a sample of content."""


@dataclass(frozen=True)
class Source:
    """A data set on disk: its classes, and the records of each split that is there."""

    classes: tuple[str, ...]
    splits: dict[str, Records]


class Names:
    """Many strings as one: small, and quick to hand to another process."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._joined = b"".join(encoded)
        self._ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def __getitem__(self, row: int) -> str:
        begin, end = self._ends[row : row + 2].tolist()
        return self._joined[begin:end].decode("utf-8", "surrogateescape")

    def checksum(self) -> int:
        """Return a checksum of the strings and where they end."""
        return zlib.crc32(self._ends.numpy().data, zlib.crc32(self._joined))


class FileRecords:
    """Image files.

    Args:
        root: The folder that the names start from.
        names: Of the files.
        labels: One for each.
    """

    unit_bytes = 0

    def __init__(self, root: Path, names: list[str], labels: list[int]) -> None:
        self._root, self._names = root, Names(names)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.units = torch.arange(len(labels) + 1)

    def reader(self, units: int) -> Read:
        return lambda row: read_file(self._root / self._names[row], where=self.where(row))

    def where(self, row: int) -> str:
        return in_one_line(str(self._root / self._names[row]))

    def checksum(self) -> int:
        """Return a checksum of all names, and of the sizes and beginnings of a sample of the files."""
        check = self._names.checksum()
        for row in sample(len(self.labels)):
            path = self._root / self._names[row]
            beginning = piece(path, 0)
            check = zlib.crc32(repr(path.stat().st_size).encode(), zlib.crc32(beginning, check))
        return check


def in_one_line(name: str) -> str:
    """Return a name as messages show it, which it cannot break."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def sample(count: int) -> list[int]:
    """Return numbers below `count`, evenly spread: all of them, or :data:`MOST_SAMPLED`."""
    return sorted({number * count // MOST_SAMPLED for number in range(MOST_SAMPLED)}) if count else []


def piece(path: Path, at: int, size: int = _PIECE, where: str = "") -> bytes:
    """Return some of a file's bytes from a place on; `where` is what messages call it, empty: its path."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{where or path} cannot be read ({first_line(error)}): restore it") from error


def checksum_of_files(paths: list[Path]) -> int:
    """Return a checksum of the names and sizes of a few large files, and of a sample of their content."""
    sizes = [path.stat().st_size for path in paths]
    check = zlib.crc32(repr([(path.name, size) for path, size in zip(paths, sizes, strict=True)]).encode())
    ends = list(itertools.accumulate(-(-size // _PIECE) for size in sizes))
    for number in sample(ends[-1]):
        file = bisect.bisect(ends, number)
        check = zlib.crc32(piece(paths[file], (number - ends[file - 1] if file else number) * _PIECE), check)
    return check


def require_label(label: object, where: str) -> int:
    """Return a label, or raise a ValueError: it is none."""
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < MOST_CLASSES:
        raise ValueError(
            f"{where}, has the label {label!r:.40}: labels must be integers from 0 to {MOST_CLASSES - 1:,}; "
            "correct or delete the row"
        )
    return label


def named(folder: Path, classes: tuple[str, ...], splits: dict[str, Records]) -> Source:
    """Return a source with the names of its classes: those given, or else their numbers.

    Raises:
        ValueError: There are fewer names than classes.
    """
    count = 1 + max(int(records.labels.max()) for records in splits.values())
    for records in splits.values() if classes else ():
        if (label := int(records.labels.max())) >= len(classes):
            raise ValueError(
                f"{records.where(int(records.labels.argmax()))}, has the label {label}, but {folder} names only "
                f"{len(classes)} classes: correct the label or the names"
            )
    return Source(classes or tuple(map(str, range(count))), splits)
