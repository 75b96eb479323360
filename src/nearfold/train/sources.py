"""Image data sets on disk as lists with random access: labels in memory, images read one by one when asked for.

Labels, names and places are held as a few tensors and byte strings, also for a million images: worker processes then
share them (fork) or receive them quickly (spawn).
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from nearfold.train import readers

UNLABELLED = -1
"""The label of an image whose label is kept secret."""

Read = Callable[[int], bytes]
"""A row -> the encoded image; ValueError where it cannot be read."""


class Records(Protocol):
    """The images of one split.

    Attributes:
        labels: int64 (N,).
        units: int64 (M + 1,): the rows at which the units of reading begin, and N. One image of a unit costs as much
            as all of them.
        unit_bytes: Memory that the largest unit takes once it is read; 0 where a unit is one image.
        checksum: Of names, and of sizes where there are few files.
    """

    labels: Tensor
    units: Tensor
    unit_bytes: int
    checksum: int

    def reader(self, units: int) -> Read:
        """Return a function that reads images, and keeps the last `units` units that it has read."""
        ...

    def where(self, row: int) -> str:
        """Return the file of an image, and its place in it, for messages."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set on disk: its classes, and the records of each split that is there."""

    classes: tuple[str, ...]
    splits: dict[str, Records]


class _Names:
    """Many strings as one: small, and quick to hand to another process."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._joined = b"".join(encoded)
        self._ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def __getitem__(self, row: int) -> str:
        begin, end = self._ends[row : row + 2].tolist()
        return self._joined[begin:end].decode("utf-8", "surrogateescape")

    def checksum(self) -> int:
        return zlib.crc32(self._joined)


class FileRecords:
    """Image files.

    Args:
        root: The folder that the names start from.
        names: Of the files.
        labels: One for each.
    """

    unit_bytes = 0

    def __init__(self, root: Path, names: list[str], labels: list[int]) -> None:
        self._root, self._names = root, _Names(names)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.units = torch.arange(len(labels) + 1)
        self.checksum = self._names.checksum()

    def reader(self, units: int) -> Read:
        """Return a function that reads images."""
        return self._read

    def _read(self, row: int) -> bytes:
        try:
            return (self._root / self._names[row]).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.where(row)} cannot be read ({readers.first_line(error)}): restore it") from error

    def where(self, row: int) -> str:
        """Return the file's path."""
        return str(self._root / self._names[row])


@dataclass(frozen=True)
class _Member:
    """An image in a tar file."""

    key: str
    offset: int
    size: int
    label: int


class TarRecords:
    """Images in tar files, found by their place: no archive is opened or searched to read one.

    Args:
        files: Each tar file with the images in it.
    """

    unit_bytes = 0

    def __init__(self, files: list[tuple[Path, list[_Member]]]) -> None:
        self._paths = [path for path, _ in files]
        members = [member for _, found in files for member in found]
        self._file = torch.repeat_interleave(torch.tensor([len(found) for _, found in files]))
        self._offset = torch.tensor([member.offset for member in members])
        self._size = torch.tensor([member.size for member in members])
        self._keys = _Names(member.key for member in members)
        self.labels = torch.tensor([member.label for member in members], dtype=torch.int64)
        self.units = torch.arange(len(members) + 1)
        self.checksum = _checksum_of_files(self._paths)

    def reader(self, units: int) -> Read:
        """Return a function that reads images."""
        return self._read

    def _read(self, row: int) -> bytes:
        path, size = self._paths[int(self._file[row])], int(self._size[row])
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(int(self._offset[row]))
                content = file.read(size)
        except OSError as error:
            raise ValueError(f"{self.where(row)} cannot be read ({readers.first_line(error)}): restore it") from error
        if len(content) != size:
            raise ValueError(f"{self.where(row)} is cut short: fetch the file again")
        return content

    def where(self, row: int) -> str:
        """Return the tar file and the key."""
        return f"{self._paths[int(self._file[row])]}, key {self._keys[row]}"


class ParquetRecords:
    """Images in parquet files, which are read a row group at a time.

    Args:
        files: Each parquet file with its column of images, the rows and bytes of its row groups, and its labels.
    """

    def __init__(self, files: list[tuple[Path, str, list[tuple[int, int]], Tensor]]) -> None:
        self._paths = [path for path, *_ in files]
        self._columns = [column for _, column, *_ in files]
        groups = [(f, g, *group) for f, (_, _, sizes, _) in enumerate(files) for g, group in enumerate(sizes)]
        self._groups = [(f, g) for f, g, rows, _ in groups if rows]
        self.units = torch.tensor([0, *(rows for _, _, rows, _ in groups if rows)]).cumsum(0)
        self.unit_bytes = max(size for *_, size in groups)
        self.labels = torch.cat([labels for *_, labels in files])
        self._first_row = torch.tensor([0, *(len(labels) for *_, labels in files)]).cumsum(0)
        self.checksum = _checksum_of_files(self._paths)

    def reader(self, units: int) -> Read:
        """Return a function that reads images, and keeps the last `units` row groups."""
        kept: OrderedDict[int, Any] = OrderedDict()

        def read(row: int) -> bytes:
            unit = int(torch.searchsorted(self.units, row, right=True)) - 1
            if unit in kept:
                kept.move_to_end(unit)
            else:
                while len(kept) >= units:
                    kept.popitem(last=False)
                kept[unit] = self._read_group(unit)
            return readers.encoded_image(kept[unit], row - int(self.units[unit]), self.where(row))

        return read

    def _read_group(self, unit: int) -> Any:
        import pyarrow.parquet as pq

        file, group = self._groups[unit]
        column = self._columns[file]
        # One thread: worker processes are the parallelism, and a fork does not copy Arrow's threads.
        with (
            readers.parquet_errors(f"{self._paths[file]}, row group {group},"),
            pq.ParquetFile(self._paths[file], pre_buffer=False) as opened,
        ):
            return opened.read_row_group(group, columns=[column], use_threads=False)[column]

    def where(self, row: int) -> str:
        """Return the file and the row in it."""
        file = int(torch.searchsorted(self._first_row, row, right=True)) - 1
        return f"{self._paths[file]}, row {row - int(self._first_row[file])}"


def open_source(folder: Path) -> Source:
    """Find the images in a folder: parquet files, tar files, or class folders, each also in ``data/``.

    Raises:
        ValueError: The folder or a file in it is broken; the message names it.
        ImportError: There are parquet files, and pyarrow is not installed.
    """
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {problem}: pass a folder with train-*.parquet, train-*.tar or train/CLASS/*.jpg")
    for pattern, opener in (("*.parquet", _open_parquet), ("*.tar", _open_tars)):
        found = sorted(folder.glob(pattern)) or sorted((folder / "data").glob(pattern))
        files = [path for path in found if not path.name.startswith(".")]
        if files:
            return opener(folder, files)
    return _open_files(folder)


def _open_files(folder: Path) -> Source:
    classes, found = readers.image_files(folder)
    names: dict[str, list[str]] = {split: [] for split in readers.SPLIT_NAMES}
    labels: dict[str, list[int]] = {split: [] for split in readers.SPLIT_NAMES}
    for split, label, files in found:
        names[split] += [path.relative_to(folder).as_posix() for path in files]
        labels[split] += [label] * len(files)
    return Source(classes, {split: FileRecords(folder, names[split], labels[split]) for split in names if names[split]})


def _open_parquet(folder: Path, files: list[Path]) -> Source:
    readers.import_pyarrow(folder)
    import pyarrow.parquet as pq

    found: dict[str, list[tuple[Path, str, list[tuple[int, int]], Tensor]]] = {}
    classes: tuple[str, ...] = ()
    for split, path in readers.parquet_splits(files):
        with readers.parquet_errors(path), pq.ParquetFile(path) as opened:
            column = readers.image_column(path, opened.schema_arrow.names)
            classes = classes or readers.class_names(opened.schema_arrow.metadata)
            groups = [opened.metadata.row_group(g) for g in range(opened.num_row_groups)]
            labels = opened.read(columns=["label"], use_threads=False)["label"].to_pylist()
        if not labels:
            raise ValueError(f"{path} has no rows: delete it, or fetch it again")
        for row, label in enumerate(labels):
            if not (split == "test" and label in (None, UNLABELLED)):
                readers.require_label(label, f"{path}, row {row}")
        numbers = torch.tensor([UNLABELLED if label is None else label for label in labels])
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        found.setdefault(split, []).append((path, column, sizes, numbers))
    if "train" not in found:
        raise readers.no_training_rows(folder, files)
    return _named(folder, classes, {split: ParquetRecords(parts) for split, parts in found.items()})


def _open_tars(folder: Path, files: list[Path]) -> Source:
    found: dict[str, list[tuple[Path, list[_Member]]]] = {}
    seen: dict[str, dict[str, Path]] = {}
    for path in files:
        words = re.split(r"[^a-z]+", path.stem.lower().replace("validation", "val"))
        split = next((split for split, names in readers.SPLIT_NAMES.items() if set(names) & set(words)), None)
        if split is None:
            continue
        members = list(_members(path, labels_needed=split != "test"))
        if not members:
            raise ValueError(f"{path} holds no image: delete it, or fetch it again")
        keys = seen.setdefault(split, {})
        for member in members:
            if member.key in keys:
                raise ValueError(
                    f"{path} and {keys[member.key]} both hold the key {member.key}: rename one, or delete a file "
                    "that is there twice"
                )
            keys[member.key] = path
        found.setdefault(split, []).append((path, members))
    if "train" not in found:
        raise ValueError(
            f"{folder} holds no tar file for training: name them train-*.tar, val-*.tar, test-*.tar; "
            f"found {', '.join(path.name for path in files[:5])}"
        )
    listed = files[0].parent / "classes.txt"
    classes = tuple(listed.read_text(encoding="utf-8").splitlines()) if listed.is_file() else ()
    return _named(folder, classes, {split: TarRecords(parts) for split, parts in found.items()})


def _members(path: Path, labels_needed: bool) -> Iterator[_Member]:
    """Yield the images of a tar file with their labels, in the convention of WebDataset."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive, open(path, "rb") as raw:
            for member in archive:
                if not member.isfile():
                    continue
                place = PurePosixPath(member.name)
                stem, _, ending = place.name.partition(".")
                key, ending = str(place.with_name(stem)) if stem else member.name, ending.lower()
                if f".{ending}" in readers.SUFFIXES:
                    if key in images:
                        raise ValueError(f"{path} holds two images of the key {key}: delete one")
                    images[key] = (member.offset_data, member.size)
                elif ending in ("cls", "json"):
                    raw.seek(member.offset_data)
                    label = _label(raw.read(member.size), ending, f"{path}, key {key}")
                    if label is not None:
                        labels[key] = label
            raw.seek(archive.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # which tarfile lets pass
                raise tarfile.ReadError("it has no end")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar file ({readers.first_line(error)}): fetch the file again"
        ) from error
    for key, (offset, size) in images.items():
        label = labels.get(key)
        if label in (None, UNLABELLED) and not labels_needed:
            label = UNLABELLED
        elif label is None:
            raise ValueError(f"{path}, key {key}, has no label: put {key}.cls or {key}.json with a label next to it")
        else:
            readers.require_label(label, f"{path}, key {key}")
        yield _Member(key, offset, size, label)


def _label(content: bytes, ending: str, where: str) -> int | None:
    """Read KEY.cls, or the label in KEY.json; None where that has none."""
    try:
        if ending == "cls":
            return int(content)
        fields = json.loads(content)
        label = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
        if label is not None and type(label) is not int:
            raise ValueError
        return label
    except ValueError as error:
        text = content[:40].decode(errors="replace")
        raise ValueError(f"{where}.{ending} holds no integer as label ({text!r}): correct it") from error


def _named(folder: Path, classes: tuple[str, ...], splits: dict[str, Records]) -> Source:
    count = 1 + max(int(records.labels.max()) for records in splits.values())
    return Source(readers.named_classes(folder, classes, count), splits)


def _checksum_of_files(paths: list[Path]) -> int:
    return zlib.crc32(repr([(path.name, path.stat().st_size) for path in paths]).encode())
