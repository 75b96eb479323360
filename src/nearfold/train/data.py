"""Image classification data, held in memory: the digits that come along, parquet files, image folders."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfold.structures import PREFIX, made, structure
from nearfold.train.readers import decode, resize
from nearfold.train.seeds import generator
from nearfold.train.sources import open_source

TEST_SHARE = 0.2  # of the images, where a data set has no test images of its own


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), indices into the classes.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W); got {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(self.images)},), one for each image; "
                f"got {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __repr__(self) -> str:
        return f"Split(images={tuple(self.images.shape)}, labels={tuple(self.labels.shape)})"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Split:
        """Return the images and labels at `rows`, int64 (M,)."""
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in three splits of one image shape.

    Attributes:
        name: For tables and file names.
        classes: Names of the classes; a label is an index into them.
        train: What the weights are fitted to.
        val: Held out of the training images; decides which weights are kept.
        test: Decides nothing; evaluated once, at the end.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    def __post_init__(self) -> None:
        shape = self.train.images.shape[1:]
        for name in ("train", "val", "test"):
            split: Split = getattr(self, name)
            if len(split) == 0:
                raise ValueError(f"{self.name}: the split {name!r} is empty; every split needs an image")
            if split.images.shape[1:] != shape:
                raise ValueError(
                    f"{self.name}: images of {name!r} are {tuple(split.images.shape[1:])} (C, H, W), "
                    f"those of 'train' {tuple(shape)}; all must be alike"
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise ValueError(
                    f"{self.name}: labels of {name!r} run from {low} to {high}, "
                    f"but there are {len(self.classes)} classes"
                )

    @property
    def channels(self) -> int:
        """C, channels of an image."""
        return self.train.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of an image, in pixels."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel over the training images: float32 (C,), in 0..1."""
        return self._statistics[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel over the training images: float32 (C,), in 0..1.

        At least half a gray level, so that a constant channel can be divided by it.
        """
        return self._statistics[1]

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        # Of the histograms: exact, and without a floating-point copy of every image.
        channels = self.train.images.unbind(1)
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in channels]).double()
        share = counts / counts.sum(1, keepdim=True)
        levels = torch.arange(256, dtype=torch.float64, device=share.device) / 255
        mean = share @ levels
        variance = (share * (levels - mean[:, None]) ** 2).sum(1)
        return mean.float(), variance.sqrt().clamp_min(0.5 / 255).float()


def load_data(
    source: str | Path = "digits",
    *,
    limit: int | None = None,
    test_limit: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    label_column: str | None = None,
) -> ImageData:
    """Load an image classification data set into memory.

    Everything is decoded to uint8 and held in memory, up to 8 GiB.

    Args:
        source: ``"digits"``: scikit-learn's 1797 handwritten digits, (1, 8, 8), nothing to download;
            ``"made:NAME"``: a task of known structure, made from a seed (`nearfold.structures.STRUCTURES`); or
            a folder with parquet files in the Hugging Face layout (train-*.parquet, test-*.parquet), with tar
            files (train-*.tar) or with images (train/CLASS/*.png, with val/ and test/ if there are any), in the
            layouts of docs/training.md. A folder that happens to be called digits: ``"./digits"``.
        limit: At most so many training images, counted before the validation images are taken from
            them, the classes as evenly as they allow; None: all.
        test_limit: At most so many test images; None: as many as `limit`.
        validation: Share of the training images of every class held out for validation; not used where
            the source has validation images of its own.
        seed: Decides the subset of `limit` and the validation images. The digits' test images are always
            the same 20 %; a folder without test images gives up 20 % of each class, by this seed.
        image_size: Resize the shorter side to so many pixels and crop the centre; None: as they are.
        label_column: The column of parquet files that holds the labels, or the field of the JSON files in tar files;
            None: ``label``, or what else stands for it (CIFAR-100's ``fine_label``).

    Returns:
        The three splits, on the CPU.

    Raises:
        ValueError: An argument does not fit, or a file is missing or broken; the message names it.
        ImportError: The package that reads this kind of file is not installed.

    Example:
        >>> data = load_data("digits", limit=100)
        >>> len(data.train), len(data.val), len(data.test), data.channels, data.size
        (90, 10, 100, 1, (8, 8))
    """
    for name, most in (("limit", limit), ("test_limit", test_limit)):
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ValueError(f"{name} must be None or an integer of at least 1; got {most!r}")
    limits = {"train": limit, "test": limit if test_limit is None else test_limit}
    require_views(validation, image_size, sizes_may_stay=True)
    if comes_along(source):
        if label_column is not None:
            raise ValueError(f"label_column={label_column!r} is for parquet and tar files: {source} has one label each")
        classes, splits = _along(str(source))
        picks = _pick({name: split.labels for name, split in splits.items()}, limits, validation, seed)
        chosen = {name: splits[origin][rows] for name, (origin, rows) in picks.items()}
        if image_size is not None:
            chosen = {n: Split(resize(split.images, image_size), split.labels) for n, split in chosen.items()}
        return ImageData(str(source), classes, **chosen)

    if not str(source):
        raise ValueError("the name of the data is empty: name a data set or a folder")
    folder = Path(source)
    found = open_source(folder, label_column)
    labels = {name: records.labels for name, records in found.splits.items()}
    picks = _pick(labels, limits, validation, seed)
    images = decode([(found.splits[origin], rows) for origin, rows in picks.values()], image_size)
    chosen = {
        name: Split(pixels, labels[origin][rows])
        for (name, (origin, rows)), pixels in zip(picks.items(), images, strict=True)
    }
    return ImageData(folder.resolve().name, found.classes, **chosen)


def comes_along(source: str | Path) -> bool:
    """Whether a data set comes with nearfold or its packages: the digits, and the tasks that are made.

    >>> comes_along("digits"), comes_along("made:pairs"), comes_along("./digits")
    (True, True, False)
    """
    return source == "digits" or str(source).startswith(PREFIX)


def _along(source: str) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Classes and splits of a data set that comes along."""
    if source == "digits":
        return tuple(map(str, range(10))), _digits()
    return structure(source).classes, {name: Split(*drawn) for name, drawn in made(source).items()}


def require_views(validation: float, image_size: int | None, *, sizes_may_stay: bool = False) -> None:
    """ValueError for a share of validation images, or a size of images, that cannot be."""
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, both excluded; got {validation!r}")
    if image_size is None and sizes_may_stay:
        return
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        wanted = "None or an integer" if sizes_may_stay else "an integer"
        raise ValueError(f"image_size must be {wanted} of at least 1; got {image_size!r}")


@functools.cache
def _digits() -> dict[str, Split]:
    """Scikit-learn's digits, 0..16 stretched to 0..255, with a fifth of each class for testing."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()  # its type depends on an argument
    images = (torch.from_numpy(raw.images).float() * (255 / 16)).round().to(torch.uint8)[:, None]
    everything = Split(images, torch.from_numpy(raw.target).long())
    in_test = share_of_each(everything.labels, TEST_SHARE, generator(0, "digits"))
    return {"train": everything[~in_test], "test": everything[in_test]}


def _pick(
    labels: dict[str, Tensor], limits: dict[str, int | None], validation: float, seed: int
) -> dict[str, tuple[str, Tensor]]:
    """Choose the images of each split.

    Args:
        labels: int64 (N,) for each split of the source; one that is absent or empty is taken from the
            training images.
        limits: At most so many images of ``train``, before validation images are taken from them, and ``test``.
        validation: As in :func:`load_data`.
        seed: As in :func:`load_data`.

    Returns:
        For ``train``, ``val`` and ``test``: the split of the source they come from, and rows of it.
    """
    rows = {name: torch.arange(len(values)) for name, values in labels.items() if len(values)}
    picks = {name: (name, own) for name, own in rows.items()}

    def take_from_train(name: str, share: float) -> None:
        remaining = picks["train"][1]
        taken = share_of_each(labels["train"][remaining], share, generator(seed, name))
        if not taken.any():
            raise ValueError(
                f"no class has two images to give one to {name!r}: raise limit= (got {limits['train']}), or add images"
            )
        picks["train"], picks[name] = ("train", remaining[~taken]), ("train", remaining[taken])

    if "test" not in picks:
        take_from_train("test", TEST_SHARE)
    for name, most in limits.items():
        if most is not None:
            origin, own = picks[name]
            picks[name] = (origin, own[_balanced(labels[origin][own], most, generator(seed, "limit", name))])
    if "val" not in picks:
        take_from_train("val", validation)
    return {name: picks[name] for name in ("train", "val", "test")}


def _rank_in_class(labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shuffle, then number the images of every class: 0, 1, 2, ... Returns (order (N,), rank (N,))."""
    order = torch.randperm(len(labels), generator=draws)
    rank = torch.empty_like(order)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    return order, rank


def _balanced(labels: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Return rows, ascending, of at most `count` images, the classes as even as they allow."""
    order, rank = _rank_in_class(labels, draws)
    return order[torch.argsort(rank[order], stable=True)[:count]].sort().values


def share_of_each(labels: Tensor, share: float, draws: torch.Generator) -> Tensor:
    """Mark (bool (N,)) `share` of every class: at least one image, and never the last one."""
    _, rank = _rank_in_class(labels, draws)
    size = torch.bincount(labels)
    quota = torch.minimum((size * share).round().long().clamp_min(1), size - 1)
    return rank < quota[labels]
