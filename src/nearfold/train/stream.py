"""Image classification data that stay on disk: read, decoded and augmented while a model trains.

The order of an epoch is a function of the seed and the epoch, and all draws of an image are one of the seed, the epoch
and its row. So the step is the loader's whole state, and neither the number of processes nor that of workers matters.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nearfold import _torchvision
from nearfold._images import picture
from nearfold.train.data import TEST_SHARE, require_views, share_of_each
from nearfold.train.distributed import Team
from nearfold.train.feed import TRAIN_IMAGES_EVALUATED, Batches, global_batch
from nearfold.train.listing import Read, Records, Source
from nearfold.train.recipe import Recipe
from nearfold.train.seeds import generator
from nearfold.train.sources import open_source
from nearfold.train.transforms import IMAGE_AUGMENTATIONS, IMAGENET_MEAN, IMAGENET_STD, evaluation_view, training_view

_MOST_LANES = 64
_UNITS_OPEN = 128  # units of reading that are shuffled together, over all processes ...
_BYTES_OPEN = 4 * 2**30  # ... unless they take more memory than this; two in any case
_IMAGES_A_PIECE = 16  # at least: taking a piece from a worker costs the process most of a millisecond


@dataclass(frozen=True, eq=False)
class Share:
    """The rows of some records that make a split.

    Attributes:
        records: Those of a split of the source.
        rows: int64 (N,), ascending.
    """

    records: Records
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class StreamData:
    """A data set on disk in three splits; :func:`open_data` makes it, :func:`nearfold.train.fit` trains on it.

    Attributes:
        name: For tables and file names.
        classes: Names of the classes; a label is an index into them.
        size: (H, W) of the images as the model sees them, in pixels.
        splits: ``train``, ``val`` and ``test``.
        mean: Of each channel, for normalisation: float32 (3,), in 0..1.
        std: Likewise.
    """

    name: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    splits: dict[str, Share] = field(repr=False)
    mean: Tensor = field(repr=False, default_factory=lambda: torch.tensor(IMAGENET_MEAN))
    std: Tensor = field(repr=False, default_factory=lambda: torch.tensor(IMAGENET_STD))
    channels: int = field(init=False, default=3)

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this data set from another, wherever its folder is and whatever that is called.

        Names and sizes of files, all labels and splits, and the content of a sample of the files.
        """
        found: dict[str, Any] = {
            "classes": len(self.classes), "size": list(self.size), "mean": self.mean.tolist(), "std": self.std.tolist()
        }  # fmt: skip
        for name, share in self.splits.items():
            checks = [zlib.crc32(t.contiguous().numpy().data) for t in (share.records.labels, share.rows)]
            found[name] = [len(share), share.records.checksum(), *checks]
        return found

    def open_feed(self, recipe: Recipe, team: Team, workers: int) -> StreamFeed:
        """Return this process's feed.

        Args:
            recipe: Batch size, augmentation and seed.
            team: The processes that share every batch.
            workers: Processes that read ahead; 0: images are read when they are asked for.

        Raises:
            ValueError: An argument does not fit.
            ImportError: The recipe's augmentation needs torchvision, which is not installed.
        """
        return StreamFeed(self, recipe, team, workers)


def open_data(
    source: str | Path,
    *,
    image_size: int = 224,
    validation: float = 0.1,
    seed: int = 0,
    label_column: str | None = None,
) -> StreamData:
    """Open an image classification data set that may be larger than memory.

    Labels are read at once, images when they are needed. docs/training.md describes the layouts.

    Args:
        source: A folder with parquet files in the Hugging Face layout (train-*.parquet), with tar files in the
            convention of WebDataset (train-*.tar with KEY.jpg and KEY.cls or KEY.json), or with class folders
            (train/CLASS/*.jpg); all with validation and test images, if there are any. The files may be in data/.
        image_size: Height and width, in pixels, of the images that the model sees.
        validation: Share of the training images held out for validation; not used where the source has both
            validation and test images with labels. Where it has only one of these, they are the test images. Of every
            class; from parquet files, which are read a row group at a time, whole row groups, unless these are too
            few or a class would then be missing on one side. Where the source has neither, 20 % become test images
            first.
        seed: Decides which images are held out.
        label_column: The column of parquet files that holds the labels, or the field of the JSON files in tar files;
            None: ``label``, or what else stands for it (CIFAR-100's ``fine_label``).

    Returns:
        The three splits. Images are RGB, and are normalised by ImageNet's mean and standard deviation; for others,
        ``dataclasses.replace(data, mean=..., std=...)``.

    Raises:
        ValueError: An argument does not fit, or a file is missing or broken; the message names it.
        ImportError: There are parquet files, and pyarrow is not installed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (folder / name).mkdir()
        ...     for number in range(10):
        ...         Image.new("RGB", (40 + number, 30)).save(folder / name / f"{number}.jpg")
        >>> data = open_data(folder, image_size=16)
        >>> data.classes, {name: len(share) for name, share in data.splits.items()}
        (('cat', 'dog'), {'train': 14, 'val': 2, 'test': 4})
    """
    require_views(validation, image_size)
    folder = Path(source)
    found = open_source(folder, label_column)
    splits = _splits(folder, found, validation, seed)
    return StreamData(folder.resolve().name, found.classes, (image_size, image_size), splits)


def _splits(folder: Path, source: Source, validation: float, seed: int) -> dict[str, Share]:
    shares = {name: Share(r, torch.arange(len(r.labels))) for name, r in source.splits.items()}
    if "test" not in shares and "val" in shares:
        shares["test"] = shares.pop("val")
    for name, part in (("test", TEST_SHARE), ("val", validation)):
        if name in shares:
            continue
        train = shares["train"]
        taken = _held_out(train, part, generator(seed, name))
        if not taken.any():
            raise ValueError(f"{folder}: no class has two images to give one to {name!r}; add images")
        shares["train"], shares[name] = (Share(train.records, train.rows[mask]) for mask in (~taken, taken))
    return {name: shares[name] for name in ("train", "val", "test")}


def _held_out(train: Share, part: float, draws: torch.Generator) -> Tensor:
    """Mark (bool (N,)) the rows to hold out: whole units of reading where that is fair to every class."""
    records, rows = train.records, train.rows
    labels = records.labels[rows]
    even = share_of_each(labels, part, draws)
    if not records.unit_bytes:
        return even
    unit = torch.searchsorted(records.units, rows, right=True) - 1
    order = torch.randperm(len(records.units) - 1, generator=draws)
    counts = torch.bincount(unit, minlength=len(order))[order]
    taken = torch.isin(unit, order[counts.cumsum(0) - counts < part * len(rows)])
    on_both_sides = torch.bincount(labels[taken], minlength=len(torch.bincount(labels))) > 0
    on_both_sides &= torch.bincount(labels[~taken], minlength=len(on_both_sides)) > 0
    fair = on_both_sides[torch.bincount(labels) > 1].all() and taken.sum() <= 1.25 * even.sum()
    return taken if fair else even


def lanes(batch: int, unit_bytes: int) -> tuple[int, int]:
    """Return the number of lanes of a batch, and the units of reading that are shuffled together in each.

    A lane supplies the same places of every batch. It reads units of its own, one window after another, so that a
    process, or a worker, that serves a few lanes keeps a few units in memory and reads each of them once.

    Args:
        batch: Images a step over all processes.
        unit_bytes: Memory that a unit takes; 0: a unit is one image.

    Example:
        >>> lanes(256, 0), lanes(256, 11_000_000), lanes(256, 500_000_000), lanes(127, 0)
        ((16, 8), (16, 8), (4, 2), (1, 128))
    """
    units = _UNITS_OPEN if not unit_bytes else max(2, min(_UNITS_OPEN, _BYTES_OPEN // unit_bytes))
    most = max(1, min(_MOST_LANES, units // 2, batch // _IMAGES_A_PIECE))
    count = max(number for number in range(1, most + 1) if batch % number == 0)
    return count, units // count


def epoch_order(share: Share, batch: int, draws: torch.Generator) -> Tensor:
    """Return the rows of every batch of an epoch: int64 (steps, batch).

    The units of reading are permuted, and their rows cut into lanes of one length. In every lane the rows of one
    window of units after another are shuffled; where a unit is one image, all of this is a permutation. A batch takes
    as many rows from each lane.

    Args:
        share: The training images.
        batch: Images a step over all processes.
        draws: Decides.
    """
    count, window = lanes(batch, share.records.unit_bytes)
    units = share.records.units
    order = torch.randperm(len(units) - 1, generator=draws)
    lengths = units.diff()[order]
    begins = lengths.cumsum(0) - lengths
    rows = torch.repeat_interleave(units[order] - begins, lengths) + torch.arange(len(share.records.labels))
    place = torch.repeat_interleave(torch.arange(len(order)), lengths)
    wanted = torch.zeros(len(rows), dtype=torch.bool)
    wanted[share.rows] = True
    rows, place = rows[wanted[rows]], place[wanted[rows]]
    rows = _shuffled(rows, place, draws)  # those of the last unit that fill no lane are then any of it

    steps, each, length = len(rows) // batch, batch // count, len(rows) // count
    lane = torch.arange(count).repeat_interleave(length)
    windows = place[: count * length] // window + len(order) * lane
    by_lane = _shuffled(rows[: count * length], windows, draws).reshape(count, length)
    return by_lane[:, : steps * each].reshape(count, steps, each).transpose(0, 1).reshape(steps, batch)


def _shuffled(rows: Tensor, groups: Tensor, draws: torch.Generator) -> Tensor:
    """Shuffle rows inside every group: int64 (N,) both, groups ascending."""
    return rows[(groups + torch.rand(len(rows), generator=draws, dtype=torch.float64)).argsort()]


class _Piece(NamedTuple):
    """A part of a batch: what a worker is asked for."""

    split: str
    lane: int  # for evaluation, negative
    epoch: int  # for evaluation, -1
    rows: list[int]


class _Views(Dataset[Tensor | str]):
    """Turns a piece into images, uint8 (n, 3, H, W), or into the message of an error."""

    def __init__(self, data: StreamData, recipe: Recipe, window: int) -> None:
        self._records = {name: share.records for name, share in data.splits.items()}
        self._size, self._augment, self._seed = data.size[0], recipe.augment, recipe.seed
        self._window = window
        self._readers: dict[tuple[str, int], Read] = {}

    def __getitem__(self, piece: _Piece) -> Tensor | str:
        place = (piece.split, piece.lane)
        if place not in self._readers:
            self._readers[place] = self._records[piece.split].reader(self._window)
        try:
            views = [self._view(piece, row, self._readers[place](row)) for row in piece.rows]
        except ValueError as error:
            return str(error)  # raised in a worker it would come with the worker's traceback
        return torch.stack(views) if views else torch.empty(0, 3, self._size, self._size, dtype=torch.uint8)

    def _view(self, piece: _Piece, row: int, encoded: bytes) -> Tensor:
        image = picture(encoded, self._records[piece.split].where(row), "RGB")
        if piece.epoch < 0:
            return evaluation_view(image, self._size)
        draws = generator(self._seed, "view", piece.epoch, row)
        return training_view(image, self._size, self._augment, draws)


class _Plan(Sampler[_Piece]):
    """The pieces that are read next."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []

    def __iter__(self) -> Iterator[_Piece]:
        return iter(self.pieces)


class StreamFeed:
    """A ``Feed`` of data on disk: its workers are torch's ``DataLoader``'s, and stay up until it is closed.

    Only one of the iterators it returns can be used at a time: the last one.
    """

    def __init__(self, data: StreamData, recipe: Recipe, team: Team, workers: int) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ValueError(f"workers must be an integer of at least 0; got {workers!r}")
        known = ("none", *IMAGE_AUGMENTATIONS)
        if recipe.augment not in known:
            raise ValueError(
                f"Recipe.augment={recipe.augment!r} is for images in memory (load_data); for those read from files "
                f"use one of {', '.join(map(repr, known))}"
            )
        if recipe.augment not in ("none", "resized_crop"):
            _torchvision.transforms(recipe.augment, "resized_crop")  # its absence is said here, not in a worker
        self.batch_size = global_batch(len(data.splits["train"]), recipe, team)
        self.steps_per_epoch = len(data.splits["train"]) // self.batch_size
        self._data, self._recipe, self._team, self._workers = data, recipe, team, workers
        self._each = self.batch_size // team.world
        self._lanes, window = lanes(self.batch_size, data.splits["train"].records.unit_bytes)
        self._evaluated = {name: share.rows for name, share in data.splits.items()}
        self._evaluated["train"] = _some(data.splits["train"], recipe.seed)
        self._plan, self._turn = _Plan(), 0
        pieces = len(self._pieces(0, list(range(self._each))))
        loader = DataLoader(
            _Views(data, recipe, window),
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=max(2, math.ceil(2 * pieces / workers)) if workers else None,  # two batches
            pin_memory=team.device.type == "cuda",
            generator=torch.Generator(),  # the global one is the model's
        )
        # The loader and its iterator have no other owner, so that clearing the list ends the workers.
        self._owned: list[Any] = [loader]
        # Found by the garbage collector, the loader would wait for workers that no longer hear it; here they still do.
        weakref.finalize(self, self._owned.clear)

    def train(self, step: int) -> Batches:
        epoch, done = divmod(step, self.steps_per_epoch)
        draws = generator(self._recipe.seed, "order", epoch)
        order = epoch_order(self._data.splits["train"], self.batch_size, draws)
        begin = self._team.rank * self._each
        shares = order[done:, begin : begin + self._each].tolist()
        return self._read([self._pieces(epoch, rows) for rows in shares])

    def evaluation(self, split: str) -> Batches:
        rows = self._evaluated[split].tensor_split(self._team.world)[self._team.rank]
        # A stretch for every worker: each then reads units of its own.
        stretches = [part.tolist() for part in rows.tensor_split(max(1, min(self._workers, self._each)))]
        each = self._each // len(stretches)
        return self._read(
            [
                [_Piece(split, -1 - lane, -1, part[at : at + each]) for lane, part in enumerate(stretches)]
                for at in range(0, len(stretches[0]), each)
            ]
        )

    def count(self, split: str) -> int:
        return len(self._evaluated[split])

    def close(self) -> None:
        """End the workers, whoever still holds an iterator."""
        self._owned.clear()

    def _pieces(self, epoch: int, rows: list[int]) -> list[_Piece]:
        """Cut this process's share of a batch where a lane ends."""
        wide, begin = self.batch_size // self._lanes, self._team.rank * self._each
        pieces = []
        for lane in range(begin // wide, (begin + self._each - 1) // wide + 1):
            first, last = max(0, lane * wide - begin), (lane + 1) * wide - begin
            pieces.append(_Piece("train", lane, epoch, rows[first:last]))
        return pieces

    def _read(self, steps: list[list[_Piece]]) -> Batches:
        self._turn += 1
        turn = self._turn
        self._plan.pieces = [piece for pieces in steps for piece in pieces]
        self._owned[1:] = [iter(self._owned[0])]
        height, width = self._data.size
        for pieces in steps:
            rows = [row for piece in pieces for row in piece.rows]
            images = torch.empty(len(rows), 3, height, width, dtype=torch.uint8, device=self._team.device)
            at = 0
            for piece in pieces:
                assert turn == self._turn, "a newer iterator has taken over the workers"
                part = next(self._owned[1])
                if isinstance(part, str):
                    raise ValueError(part)
                images[at : at + len(piece.rows)].copy_(part, non_blocking=True)
                at += len(piece.rows)
            labels = self._data.splits[pieces[0].split].records.labels[rows]
            yield images, labels.to(self._team.device)


def _some(train: Share, seed: int) -> Tensor:
    """Return rows, ascending, of training images to evaluate: whole units of reading, the last one cut."""
    if len(train) <= TRAIN_IMAGES_EVALUATED:
        return train.rows
    units = len(train.records.units) - 1
    rank = torch.randperm(units, generator=generator(seed, "train images evaluated"))
    unit = torch.searchsorted(train.records.units, train.rows, right=True) - 1
    return train.rows[rank[unit].argsort(stable=True)[:TRAIN_IMAGES_EVALUATED]].sort().values
