"""Images in tar files, in the convention of WebDataset: KEY.jpg, with its label in KEY.cls or KEY.json."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from nearfold._images import MOST_BYTES, SUFFIXES, first_line, read_file
from nearfold.train.layout import ending, is_hidden
from nearfold.train.listing import (
    UNLABELLED,
    Names,
    Read,
    Source,
    checksum_of_files,
    in_one_line,
    named,
    piece,
    require_label,
)

_MOST_OF_A_LABEL = {".cls": 2**12, ".json": 2**22}
"""Bytes of the files that hold labels, by the ending."""


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
        self._keys = Names(member.key for member in members)
        self.labels = torch.tensor([member.label for member in members], dtype=torch.int64)
        self.units = torch.arange(len(members) + 1)

    def reader(self, units: int) -> Read:
        return self._read

    def _read(self, row: int) -> bytes:
        path, size = self._paths[int(self._file[row])], int(self._size[row])
        content = piece(path, int(self._offset[row]), size, self.where(row))
        if len(content) != size:
            raise ValueError(f"{self.where(row)} is cut short: fetch the file again")
        return content

    def where(self, row: int) -> str:
        return in_one_line(f"{self._paths[int(self._file[row])]}, key {self._keys[row]}")

    def checksum(self) -> int:
        return checksum_of_files(self._paths)


def open_tars(
    folder: Path, place: Path, files: list[tuple[str, Path]], label_field: str | None
) -> tuple[Source, list[str]]:
    """Index tar files.

    Args:
        folder: What the user named.
        place: Where ``classes.txt`` may be, or else beside the first file.
        files: (split, path) of each.
        label_field: Of KEY.json; None: ``label``, or else ``cls``.

    Returns:
        The data, and what is left out of the files, by phrases.

    Raises:
        ValueError: A file is broken, or a label or a key does not fit; the message names it.
    """
    found: dict[str, list[tuple[Path, list[_Member]]]] = {}
    seen: dict[str, dict[str, Path]] = {}
    left_out: Counter[str] = Counter()
    for split, path in files:
        members = _members(path, split != "test", label_field, left_out)
        if not members:
            raise ValueError(f"{path} holds no image: delete it, or fetch it again")
        keys = seen.setdefault(split, {})
        for member in members:
            if member.key in keys:
                raise ValueError(
                    f"{path} and {keys[member.key]} both hold the key {in_one_line(member.key)}: rename one, or delete "
                    "a file that is there twice"
                )
            keys[member.key] = path
        found.setdefault(split, []).append((path, members))
    listed = next((at for at in (place / "classes.txt", files[0][1].parent / "classes.txt") if at.exists()), None)
    try:
        classes = tuple(read_file(listed, 2**26).decode().splitlines()) if listed is not None else ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{listed} is not UTF-8 ({first_line(error)}): one name a line is wanted") from error
    source = named(folder, classes, {split: TarRecords(parts) for split, parts in found.items()})
    return source, [f"{number:,} {what}" for what, number in left_out.items() if number]


def _entries(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield what a tar file holds, or raise a ValueError that names it: it cannot be read."""
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=_Headers(raw), mode="r:") as archive:
            yield from archive
            raw.seek(archive.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # which tarfile lets pass
                raise tarfile.ReadError("it has no end")
    except Exception as error:  # tarfile raises nearly anything on broken bytes
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar file ({first_line(error)}): fetch the file again"
        ) from error


class _Headers(io.BufferedIOBase):
    """A file of which only headers are read, as long as headers are, whatever length a tar file claims."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 2**20:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._raw.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._raw.seek(place, whence)

    def tell(self) -> int:
        return self._raw.tell()


def _members(path: Path, labels_needed: bool, label_field: str | None, left_out: Counter[str]) -> list[_Member]:
    """List the images of a tar file with their labels; count what is left out."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | None] = {}
    length = path.stat().st_size
    with open(path, "rb") as raw:
        for entry in _entries(path):
            place = PurePosixPath(entry.name)
            kind = ending(place.name)
            where = f"{path}, member {entry.name}"
            most = _MOST_OF_A_LABEL.get(kind, MOST_BYTES if kind in SUFFIXES else length)
            if entry.isreg() and not (0 <= entry.size <= most and entry.offset_data + entry.size <= length):
                raise ValueError(
                    f"{where} claims {entry.size:,} bytes; the tar file has {length:,}, and at most {most:,} are read "
                    f"of such a member: fetch the file again, or delete the member"
                )
            if entry.isdir() or kind not in (*SUFFIXES, *_MOST_OF_A_LABEL):
                continue
            if any(map(is_hidden, place.parts)):
                left_out["of the images in tar files, which are hidden"] += kind in SUFFIXES
                continue
            key = str(place)[: -len(kind)]
            if not entry.isreg() or entry.issparse():
                raise ValueError(f"{where} is a link or another special file: write it as a file of its own")
            if kind in SUFFIXES:
                if key in images:
                    raise ValueError(f"{path} holds two images of the key {in_one_line(key)}: delete one")
                images[key] = (entry.offset_data, entry.size)
                continue
            raw.seek(entry.offset_data)
            label = _label(raw.read(entry.size), kind, f"{path}, key {in_one_line(key)}", label_field)
            if None not in (label, labels.get(key)) and label != labels[key]:
                raise ValueError(
                    f"{path}, key {in_one_line(key)}, has two labels, {labels[key]} and {label}: delete one"
                )
            labels[key] = labels.get(key) if label is None else label
    samples = _samples(path, images, labels, left_out)
    unused = labels.keys() - {named for _, named in samples}
    left_out["of the labels in tar files, which have no image"] += len(unused)
    return [
        _Member(key, *images[key], _checked(labels.get(named), labels_needed, path, named)) for key, named in samples
    ]


def _samples(
    path: Path, images: dict[str, tuple[int, int]], labels: dict[str, int | None], left_out: Counter[str]
) -> list[tuple[str, str]]:
    """Return the key of every image that is used, and the key of its label.

    An image has the label of its own name: ``a.5.jpg`` that of ``a.5.cls``. Without one it is, in the convention, a
    field ``5.jpg`` of the sample ``a``: the sample's image if it has no other, and left out if it has ``a.jpg``.
    """
    fields: dict[str, list[str]] = {}
    for key in images:
        if key not in labels:
            place = PurePosixPath(key)
            fields.setdefault(str(place.with_name(place.name.partition(".")[0] or place.name)), []).append(key)
    samples = {key: key for key in images if key in labels}
    for sample, keys in fields.items():
        if sample in images:  # a.jpg, beside which a.mask.jpg is another field
            samples[sample] = sample
            left_out["of the images in tar files, which are further fields of a key"] += len(set(keys) - {sample})
        elif sample not in labels:
            samples |= {key: key for key in keys}
        elif len(keys) == 1:
            samples[keys[0]] = sample
        else:
            name, some = in_one_line(sample), in_one_line(", ".join(keys[:3]))
            raise ValueError(
                f"{path} holds several images of the key {name} ({some}): give each a label of its own name, or name "
                f"one {name} and its ending"
            )
    return [(key, samples[key]) for key in images if key in samples]


def _checked(label: int | None, needed: bool, path: Path, key: str) -> int:
    if label in (None, UNLABELLED) and not needed:
        return UNLABELLED
    if label is None:
        name = in_one_line(key)
        raise ValueError(f"{path}, key {name}, has no label: put {name}.cls or {name}.json with a label next to it")
    return require_label(label, f"{path}, key {in_one_line(key)}")


def _label(content: bytes, kind: str, where: str, label_field: str | None) -> int | None:
    """Read KEY.cls, or the label in KEY.json; None where that has none."""
    try:
        if kind == ".cls":
            if not re.fullmatch(rb"\s*[+-]?\d+\s*", content):
                raise ValueError
            return int(content)
        fields = json.loads(content)
        names = ("label", "cls") if label_field is None else (label_field,)
        given = [fields[name] for name in names if name in fields] if isinstance(fields, dict) else []
        label = next((value for value in given if value is not None), None)
        if label is not None and type(label) is not int:
            raise ValueError
        return label
    except (ValueError, RecursionError) as error:
        text = content[:40].decode(errors="replace")
        raise ValueError(f"{where}{kind} holds no integer as label ({text!r}): correct it") from error
