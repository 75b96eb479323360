"""Where a run's batches come from: data in memory here; data of another kind brings a feed of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from nearfold.train.augment import AUGMENTATIONS
from nearfold.train.data import ImageData, Split
from nearfold.train.distributed import Team
from nearfold.train.recipe import Recipe
from nearfold.train.seeds import derive, generator

TRAIN_IMAGES_EVALUATED = 10_000
"""Training images, at most, on which the training loss and accuracy are measured in evaluation mode."""

Batches = Iterator[tuple[Tensor, Tensor]]
"""Images uint8 (b, C, H, W) and labels int64 (b,), both on the device."""


class Feed(Protocol):
    """One process's share of every batch of a run.

    What it yields depends on the recipe's seed and the place in the run only: the shares of all processes, put
    together in the order of their ranks, are the batch that one process would get, and a feed that starts at a later
    step yields what an undisturbed one yields from there on.
    """

    batch_size: int
    """Images a step over all processes: :func:`global_batch`."""
    steps_per_epoch: int

    def train(self, step: int) -> Batches:
        """Yield this process's share of every batch from `step` (over all epochs) to the end of its epoch, augmented.

        A share has ``batch_size / team.world`` images: of the batch, rows rank * share to (rank + 1) * share.
        """

    def evaluation(self, split: str) -> Batches:
        """Yield this process's share of a split, unaugmented, in batches of at most the size of those in training.

        ``"train"``: up to 10,000 training images, the same at every call. ``"val"``, ``"test"``: all.
        The sizes of two processes' shares differ by at most one image.
        """

    def count(self, split: str) -> int:
        """Return the images of a split that :meth:`evaluation` yields over all processes."""

    def close(self) -> None:
        """End what reads ahead. Nothing can be read afterwards."""


class Streamed(Protocol):
    """Data that are not in memory: what :func:`nearfold.train.fit` needs of them."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""

    @property
    def mean(self) -> Tensor:
        """Mean of each channel: float32 (C,), in 0..1."""

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel: float32 (C,), in 0..1."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this data set from another, ready for JSON."""

    def open_feed(self, recipe: Recipe, team: Team, workers: int) -> Feed:
        """Return this process's feed, with `workers` processes that read ahead (0: none)."""


def open_feed(data: ImageData | Streamed, recipe: Recipe, team: Team, workers: int = 0) -> Feed:
    """Return this process's feed of a data set.

    Args:
        data: In memory, or something that opens a feed itself.
        recipe: Batch size, augmentation and seed.
        team: The processes that share every batch.
        workers: Processes that read ahead, of data that are not in memory.

    Raises:
        ValueError: The batch cannot be shared evenly, or there are workers without anything to read.

    Example:
        >>> from nearfold.train import load_data
        >>> data = load_data("digits", limit=200)
        >>> feed = open_feed(data, Recipe(batch_size=60), Team(0, 1, torch.device("cpu")))
        >>> feed.steps_per_epoch, [tuple(images.shape) for images, _ in feed.train(step=1)]
        (3, [(60, 1, 8, 8), (60, 1, 8, 8)])
    """
    if not isinstance(data, ImageData):
        return data.open_feed(recipe, team, workers)
    if workers:
        raise ValueError(f"workers={workers} read ahead from files, but {data.name} is in memory: leave workers at 0")
    return MemoryFeed(data, recipe, team)


def global_batch(count: int, recipe: Recipe, team: Team) -> int:
    """Return the images a step over all processes: the recipe's, or what fits into `count` training images.

    Raises:
        ValueError: The batch cannot be shared evenly, or there are too few images.
    """
    pairs = 2 if recipe.mixup or recipe.cutmix else 1
    parts = team.world * recipe.accumulate * pairs
    shared = f"{team.world} processes" + (f" in {recipe.accumulate} parts each" if recipe.accumulate > 1 else "")
    if pairs == 2:
        shared += ", in pairs of images (mixup, cutmix)"
    if recipe.batch_size % parts:
        raise ValueError(
            f"Recipe.batch_size={recipe.batch_size} cannot be shared evenly by {shared}: use a multiple of {parts}"
        )
    batch = min(recipe.batch_size, count - count % parts)
    if batch == 0:
        raise ValueError(f"{count} training images are too few for {shared}: start fewer")
    return batch


class MemoryFeed:
    """A :class:`Feed` of data in memory, which are copied to the device whole."""

    def __init__(self, data: ImageData, recipe: Recipe, team: Team) -> None:
        if recipe.augment not in AUGMENTATIONS:
            raise ValueError(
                f"Recipe.augment={recipe.augment!r} is for images read from files (open_data); {data.name} is in "
                f"memory: use one of {', '.join(map(repr, AUGMENTATIONS))}"
            )
        self.batch_size = global_batch(len(data.train), recipe, team)
        self.steps_per_epoch = len(data.train) // self.batch_size
        self._recipe, self._team = recipe, team
        self._each = self.batch_size // team.world
        self._train, val, test = (
            Split(split.images.to(team.device), split.labels.to(team.device))
            for split in (data.train, data.val, data.test)
        )
        draws = generator(recipe.seed, "train images evaluated")
        some = torch.randperm(len(self._train), generator=draws)[:TRAIN_IMAGES_EVALUATED].to(team.device)
        everything = {"val": val, "test": test}
        self._evaluated = {"train": (self._train, some)} | {
            name: (split, torch.arange(len(split), device=team.device)) for name, split in everything.items()
        }

    def train(self, step: int) -> Batches:
        recipe, team = self._recipe, self._team
        epoch, done = divmod(step, self.steps_per_epoch)
        draws = generator(recipe.seed, "order", epoch)
        order = torch.randperm(len(self._train), generator=draws).to(team.device)
        share = slice(team.rank * self._each, (team.rank + 1) * self._each)
        augment = AUGMENTATIONS[recipe.augment]
        for offset in range(done, self.steps_per_epoch):
            rows = order[offset * self.batch_size : (offset + 1) * self.batch_size][share]
            seed = derive(recipe.seed, "augment", epoch * self.steps_per_epoch + offset)
            images = augment(self._train.images[rows], seed, self.batch_size, share)
            yield images, self._train.labels[rows]

    def evaluation(self, split: str) -> Batches:
        images, rows = self._evaluated[split]
        for some in rows[self._team.rank :: self._team.world].split(self._each):
            batch = images[some]
            yield batch.images, batch.labels

    def count(self, split: str) -> int:
        return len(self._evaluated[split][1])

    def close(self) -> None:
        """Nothing reads ahead."""
