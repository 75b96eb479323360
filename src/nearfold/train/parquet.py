"""Images in parquet files, in the layout of the Hugging Face Hub: a row has the bytes of an image, and its label."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfold._images import first_line
from nearfold.train.listing import UNLABELLED, Read, Source, checksum_of_files, named, require_label

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_MOST_ROWS = 2**27
"""Of a file: some bytes can claim any number of rows that are alike."""


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

    def reader(self, units: int) -> Read:
        kept: OrderedDict[int, Any] = OrderedDict()

        def read(row: int) -> bytes:
            unit = int(torch.searchsorted(self.units, row, right=True)) - 1
            if unit in kept:
                kept.move_to_end(unit)
            else:
                while len(kept) >= units:
                    kept.popitem(last=False)
                kept[unit] = self._read_group(unit)
            return _encoded_image(kept[unit], row - int(self.units[unit]), self.where(row))

        return read

    def _read_group(self, unit: int) -> Any:
        import pyarrow.parquet as pq

        file, group = self._groups[unit]
        column = self._columns[file]
        # One thread: worker processes are the parallelism, and a fork does not copy Arrow's threads.
        with (
            _parquet_errors(f"{self._paths[file]}, row group {group},"),
            pq.ParquetFile(self._paths[file], pre_buffer=False) as opened,
        ):
            images = opened.read_row_group(group, columns=[column], use_threads=False)[column]
            if len(images) != (rows := int(self.units[unit + 1] - self.units[unit])):
                raise IndexError(f"it holds {len(images)} rows, not {rows}")
            return images

    def where(self, row: int) -> str:
        file = int(torch.searchsorted(self._first_row, row, right=True)) - 1
        return f"{self._paths[file]}, row {row - int(self._first_row[file])}"

    def checksum(self) -> int:
        return checksum_of_files(self._paths)


def open_parquet(folder: Path, files: list[tuple[str, Path]], label_column: str | None) -> Source:
    """Read the labels of parquet files.

    Args:
        folder: What the user named.
        files: (split, path) of each.
        label_column: Its name; None: ``label``, ``labels``, ``fine_label``, or the only one that the schema's metadata
            calls one.

    Raises:
        ValueError: A file is broken, or a column or a label does not fit; the message names it.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ImportError(f"{folder} holds parquet files: pip install pyarrow") from error

    found: dict[str, list[tuple[Path, str, list[tuple[int, int]], Tensor]]] = {}
    classes: tuple[str, ...] = ()
    for split, path in files:
        with _parquet_errors(path), pq.ParquetFile(path) as opened:
            schema = opened.schema_arrow
            features = _features(schema.metadata)
            image, label = _columns(path, schema, features, label_column)
            names = _class_names(features, label)
            if classes and names and names != classes:
                raise ValueError(f"{path} names other classes than the files before it: keep the files of one data set")
            classes = classes or names
            if not 0 < opened.metadata.num_rows <= _MOST_ROWS:
                rows = opened.metadata.num_rows
                problem = f"claims {rows:,} rows, at most {_MOST_ROWS:,} are read" if rows else "has no rows"
                raise ValueError(f"{path} {problem}: delete it, or fetch it again")
            groups = [opened.metadata.row_group(g) for g in range(opened.num_row_groups)]
            labels = opened.read(columns=[label], use_threads=False)[label].to_pylist()
            if len(labels) != sum(group.num_rows for group in groups):
                raise IndexError(f"it holds {len(labels)} labels, not as many as rows")
        for row, value in enumerate(labels):
            if not (split == "test" and value in (None, UNLABELLED)):
                require_label(value, f"{path}, row {row}")
        numbers = torch.tensor([UNLABELLED if value is None else value for value in labels], dtype=torch.int64)
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        found.setdefault(split, []).append((path, image, sizes, numbers))
    return named(folder, classes, {split: ParquetRecords(parts) for split, parts in found.items()})


@contextmanager
def _parquet_errors(path: Path | str) -> Iterator[None]:
    """Turn what pyarrow raises on a broken file into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # it raises nearly anything on broken bytes
        if type(error) is ValueError:  # ours
            raise
        raise ValueError(f"{path} cannot be read as parquet ({first_line(error)}): fetch the file again") from error


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return what the metadata of the layout say of the columns; {} where they say nothing."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}  # optional: the numbers serve as names
    return (
        {name: about for name, about in features.items() if isinstance(about, dict)}
        if isinstance(features, dict)
        else {}
    )


def _columns(path: Path, schema: Any, features: dict[str, Any], label_column: str | None) -> tuple[str, str]:
    """Return the columns of images and labels, or raise a ValueError: they are not there, or not the only ones."""
    import pyarrow as pa

    def holds_images(kind: pa.DataType) -> bool:
        return pa.types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}

    called_so = [
        name for name, about in features.items() if about.get("_type") == "ClassLabel" and name in schema.names
    ]
    structs = [field.name for field in schema if holds_images(field.type)]
    pictures = [name for name, about in features.items() if about.get("_type") == "Image" and name in schema.names]
    image = [name for name in _IMAGE_COLUMNS if name in schema.names]
    image += next((only for only in (pictures, structs) if len(only) == 1), [])
    label = [*(name for name in _LABEL_COLUMNS if name in schema.names), *called_so[: len(called_so) == 1]]
    if label_column is not None:
        label = [label_column] if label_column in schema.names else []
    if not image or not label:
        raise ValueError(
            f"{path} needs a column {label_column or 'label'!r} and a column 'img' or 'image'; it has "
            f"{', '.join(schema.names)}; pass label_column= (--label-column) for another one"
        )
    for name in (image[0], label[0]):
        if schema.names.count(name) > 1:
            raise ValueError(f"{path} has several columns {name!r}: keep one")
    return image[0], label[0]


def _class_names(features: dict[str, Any], label: str) -> tuple[str, ...]:
    names = features.get(label, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _encoded_image(images: Any, row: int, where: str) -> bytes:
    """Return the bytes in a cell of an image column, or raise a ValueError: there are none."""
    cell = images[row].as_py()
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(encoded, bytes) or not encoded:
        raise ValueError(f"{where}, holds no image bytes: write the images into the parquet file, or delete the row")
    return encoded
