"""Image files on disk as records: labels that are known, pictures still encoded.

A reader only lists what is there; :func:`decode` then turns the records that are wanted into one tensor.
Whatever is missing or broken is named, with the file, the row where there are rows, and what to do.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY_LIMIT = 8 * 2**30
"""Bytes a decoded data set may take; all of it is held in memory."""

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "dev"), "test": ("test",)}
"""How the names of a split's files and folders begin, or are."""

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
"""What ends the name of an image file."""

_IMAGE_COLUMNS = ("img", "image")
_GRAY_MODES = {"1", "L", "LA"}
_DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "F"}  # Pillow clips these at 255 when it makes them 8-bit


@dataclass(frozen=True)
class Record:
    """One image, not decoded yet."""

    label: int
    read: Callable[[], bytes]  # the encoded image; ValueError where there is none
    where: str  # for messages: the file, and the row


@dataclass(frozen=True)
class Listing:
    """The records of a data set by split; ``val`` and ``test`` may be empty."""

    classes: tuple[str, ...]
    splits: dict[str, list[Record]]


def list_parquet(folder: Path, files: Sequence[Path]) -> Listing:
    """List image-classification parquet files in the Hugging Face layout.

    The split is how a file's name begins (train-00000-of-00001.parquet). Columns: ``img`` or ``image``,
    a struct with ``bytes`` (or plain binary), and ``label``, an integer. Class names come from the
    schema's metadata; without it they are the labels' numbers.

    Args:
        folder: What the user named.
        files: The parquet files in it.

    Raises:
        ValueError: A file cannot be read, its columns do not fit, or no file is a training file.
        ImportError: pyarrow is not installed.
    """
    import_pyarrow(folder)
    import pyarrow.parquet as pq

    splits: dict[str, list[Record]] = {split: [] for split in SPLIT_NAMES}
    classes: tuple[str, ...] = ()
    for split, path in parquet_splits(files):
        with parquet_errors(path):
            schema = pq.read_schema(path)
            image = image_column(path, schema.names)
            table = pq.read_table(path, columns=[image, "label"])
        splits[split] += _rows(path, table[image], table["label"])
        classes = classes or class_names(schema.metadata)
    if not splits["train"]:
        raise no_training_rows(folder, files)
    count = 1 + max(record.label for records in splits.values() for record in records)
    return Listing(named_classes(folder, classes, count), splits)


def import_pyarrow(folder: Path) -> None:
    """Raise an ImportError that names the extra if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"{folder} holds parquet files: pip install pyarrow") from error


@contextmanager
def parquet_errors(path: Path | str) -> Iterator[None]:
    """Turn what pyarrow raises on a broken file into a ValueError that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({first_line(error)}): fetch the file again") from error


def parquet_splits(files: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the split and the path of every file whose name begins like a split's."""
    for path in files:
        starts = ((split, path.name.lower().startswith(names)) for split, names in SPLIT_NAMES.items())
        split = next((split for split, fits in starts if fits), None)
        if split is not None:
            yield split, path


def image_column(path: Path, columns: Sequence[str]) -> str:
    """Return the column that holds the images, or raise a ValueError: it, or the labels, are not there."""
    image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    if image is None or "label" not in columns:
        raise ValueError(f"{path} needs a column 'label' and a column 'img' or 'image'; it has {', '.join(columns)}")
    return image


def no_training_rows(folder: Path, files: Sequence[Path]) -> ValueError:
    """Return the error of a folder with parquet files, none of them for training."""
    return ValueError(
        f"{folder} holds no training rows: name the parquet files train-*.parquet, "
        f"test-*.parquet; found {', '.join(path.name for path in files[:5])}"
    )


def named_classes(folder: Path, names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Return the names of `count` classes: those given, or else their numbers.

    Raises:
        ValueError: There are fewer names than classes.
    """
    names = names or tuple(map(str, range(count)))
    if count > len(names):
        raise ValueError(
            f"{folder} has labels up to {count - 1} but names only {len(names)} classes in its metadata: "
            "correct the labels or the names"
        )
    return names


def encoded_image(images: Any, row: int, where: str) -> bytes:
    """Return the bytes in a cell of an image column, or raise a ValueError: there are none."""
    cell = images[row].as_py()
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(encoded, bytes) or not encoded:
        raise ValueError(f"{where}, holds no image bytes: write the images into the parquet file, or delete the row")
    return encoded


def require_label(label: object, where: str) -> int:
    """Return a label, or raise a ValueError: it is none."""
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(
            f"{where}, has the label {label!r}: labels must be integers of at least 0; correct or delete the row"
        )
    return label


def _rows(path: Path, images: Any, labels: Any) -> list[Record]:
    records = []
    for row, label in enumerate(labels.to_pylist()):
        where = f"{path}, row {row}"
        read = functools.partial(encoded_image, images, row, where)
        records.append(Record(require_label(label, where), read, where))
    return records


def class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Return the class names in the metadata of the Hugging Face layout; () where there are none."""
    try:
        info = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return tuple(map(str, info["info"]["features"]["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()  # optional: the numbers serve as names


def list_image_folder(folder: Path) -> Listing:
    """List a folder of images: CLASS/*.png, or train/CLASS/*.png with optional val/ and test/.

    Args:
        folder: The folder.

    Raises:
        ValueError: No class folder, a class folder without an image, or a class that only val/ or test/
            knows.
    """
    classes, found = image_files(folder)
    splits: dict[str, list[Record]] = {split: [] for split in SPLIT_NAMES}
    for split, label, files in found:
        splits[split] += [Record(label, path.read_bytes, str(path)) for path in files]
    return Listing(classes, splits)


def image_files(folder: Path) -> tuple[tuple[str, ...], Iterator[tuple[str, int, list[Path]]]]:
    """Return the classes of an image folder, and an iterator over (split, label, files), class by class.

    Raises:
        ValueError: As :func:`list_image_folder`, also while iterating.
    """
    roots = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None)
        for split, names in SPLIT_NAMES.items()
    }
    if roots["train"] is None and any(roots.values()):
        raise ValueError(f"{folder} has no folder train/: put the training images in train/CLASS/*.png")
    train = roots["train"] = roots["train"] or folder
    classes = tuple(path.name for path in _folders(train))
    if not classes:
        raise ValueError(
            f"{folder} holds neither parquet files nor class folders: put images in "
            f"{folder}/train/CLASS/*.png, or parquet files named train-*.parquet there"
        )
    return classes, _files_by_class(roots, classes)


def _files_by_class(roots: dict[str, Path | None], classes: tuple[str, ...]) -> Iterator[tuple[str, int, list[Path]]]:
    for split, root in roots.items():
        for class_folder in _folders(root) if root is not None else ():
            if class_folder.name not in classes:
                raise ValueError(f"{class_folder} is no class of the training images: {', '.join(classes)}")
            files = [path for path in sorted(class_folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
            files = [path for path in files if not path.name.startswith(".")]
            if not files:
                raise ValueError(
                    f"{class_folder} holds no image ({', '.join(sorted(SUFFIXES))}): add some, or delete the folder"
                )
            yield split, classes.index(class_folder.name), files


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def decode(splits: Iterable[Sequence[Record]], image_size: int | None) -> list[Tensor]:
    """Decode the records of several splits to tensors of one image shape.

    Args:
        splits: The records of each split.
        image_size: Height and width to resize to, or None: as they are, all alike.

    Returns:
        For each split, uint8 (N, C, H, W): one channel where every image of every split is gray, else
        three.

    Raises:
        ValueError: An image does not decode, sizes differ and `image_size` is None, or the images would
            take more than :data:`MEMORY_LIMIT`.
    """
    splits = list(splits)
    first: tuple[torch.Size, str] | None = None
    count = sum(map(len, splits))
    decoded: list[list[Tensor]] = []
    for records in splits:
        decoded.append([])
        for record in records:
            image = _picture(record)
            if image_size is not None:
                image = resize(image[None], image_size)[0]
            if first is None:
                first = (image.shape[1:], record.where)
            if count * image.numel() > MEMORY_LIMIT:
                raise ValueError(
                    f"{count} images of {tuple(image.shape)} take {count * image.numel() / 2**30:.1f} GiB, "
                    f"more than the {MEMORY_LIMIT / 2**30:.0f} GiB that are held in memory: "
                    "pass a smaller limit= or image_size="
                )
            if image.shape[1:] != first[0]:
                raise ValueError(
                    f"images differ in size: {first[1]} has {tuple(first[0])} (height, width), "
                    f"{record.where} has {tuple(image.shape[1:])}; pass image_size= to resize them"
                )
            decoded[-1].append(image)
    channels = max((image.shape[0] for images in decoded for image in images), default=1)
    height, width = first[0] if first is not None else (1, 1)
    return [
        torch.stack([image.expand(channels, -1, -1) for image in images])
        if images
        else torch.empty(0, channels, height, width, dtype=torch.uint8)
        for images in decoded
    ]


def _picture(record: Record) -> Tensor:
    plain = picture(record.read(), record.where)
    pixels = torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8)
    return pixels.reshape(plain.height, plain.width, -1).movedim(-1, 0)


def picture(encoded: bytes, where: str, mode: str = "") -> Image:
    """Decode an image with Pillow.

    Args:
        encoded: The file's content.
        where: For messages.
        mode: Pillow's name of what to convert to; empty: ``"L"`` where the image is gray, else ``"RGB"``.

    Raises:
        ValueError: It does not decode, or has more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            deep = image.mode in _DEEP_MODES
            plain = image.convert(mode or ("L" if image.mode in _GRAY_MODES else "RGB"))
    except Exception as error:  # Pillow raises nearly anything on broken bytes
        raise ValueError(f"{where} does not decode as an image ({first_line(error)}): replace or delete it") from error
    if deep:
        raise ValueError(f"{where} has more than 8 bits a channel: convert it to 8 bits")
    return plain


def resize(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` (bilinear, antialiased) and crop the centre.

    Args:
        images: uint8 (N, C, H, W).
        size: New height and width.

    Returns:
        uint8 (N, C, size, size).
    """
    height, width = images.shape[2:]
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    scaled = F.interpolate(images.float(), shape, mode="bilinear", antialias=True).round_()
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return scaled.clamp_(0, 255).to(torch.uint8)[:, :, top : top + size, left : left + size].contiguous()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
