"""The profile of a data set: its measures, each with what it is in every block of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nearfold.study.alignment.inputs import of_inputs
from nearfold.study.alignment.labels import PROBES, Progress, of_labels, silent
from nearfold.study.alignment.positions import BLOCKS, positions

if TYPE_CHECKING:
    from nearfold.train import ImageData


CLEAR, LEAST = 3.0, 0.02
"""A difference is told that is so many standard errors large, and at least a fiftieth: of the variance, or of the way
from chance to everything right."""


@dataclass(frozen=True)
class Measure:
    """A mean over blocks of images.

    Attributes:
        blocks: one number for every block.

    >>> Measure((1.0, 3.0)).value, Measure((1.0, 3.0)).error
    (2.0, 1.0)
    """

    blocks: tuple[float, ...]

    @property
    def value(self) -> float:
        """The mean."""
        return math.fsum(self.blocks) / len(self.blocks)

    @property
    def error(self) -> float:
        """Its standard error, from how the blocks differ."""
        count, mean = len(self.blocks), self.value
        return math.sqrt(math.fsum((block - mean) ** 2 for block in self.blocks) / (count - 1) / count)

    def above(self, other: Measure | None = None) -> bool:
        """Whether it is clearly above another measure of the same images, by `CLEAR` and `LEAST`; None: above zero."""
        than = (0.0,) * len(self.blocks) if other is None else other.blocks
        gain = Measure(tuple(a - b for a, b in zip(self.blocks, than, strict=True)))
        return gain.value > max(LEAST, CLEAR * gain.error)

    def of(self, drawn: Sequence[int] | None) -> float:
        """The mean over drawn blocks; None: over all."""
        return self.value if drawn is None else math.fsum(self.blocks[n] for n in drawn) / len(drawn)


@dataclass(frozen=True)
class Profile:
    """The measures of a data set.

    Attributes:
        name: of the data.
        images: how many training images were measured.
        grid: rows and columns of positions.
        features: of a position.
        classes: how many.
        inputs: of the images alone, by the names of docs/alignment.md: shares of variance.
        labels: accuracy above chance from frozen features, by operator, and of `itself`.
    """

    name: str
    images: int
    grid: tuple[int, int]
    features: int
    classes: int
    inputs: Mapping[str, Measure]
    labels: Mapping[str, Measure]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        kept = {name: getattr(self, name) for name in ("name", "images", "grid", "features", "classes")}
        return kept | {
            kind: {
                name: {"value": one.value, "error": one.error, "blocks": list(one.blocks)}
                for name, one in getattr(self, kind).items()
            }
            for kind in ("inputs", "labels")
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Profile:
        """The profile that `to_dict` wrote."""
        kinds = {
            kind: {name: Measure(tuple(one["blocks"])) for name, one in kept[kind].items()}
            for kind in ("inputs", "labels")
        }
        height, width = kept["grid"]
        return cls(kept["name"], kept["images"], (height, width), kept["features"], kept["classes"], **kinds)


def measure(data: ImageData, limit: int = 2000, progress: Progress = silent) -> Profile:
    """Measure a data set by its training images; validation and test images are not touched.

    Args:
        data: the data set.
        limit: at most so many training images, in an order drawn once.
        progress: is told how many measures are done, of how many, and which one comes next.

    Raises:
        ValueError: there are too few training images.

    >>> from nearfold.train import load_data
    >>> profile = measure(load_data("made:texture"), limit=200)
    >>> profile.images, profile.labels["window(3) | box | kernel"].value > 0.3
    (200, True)
    """
    at = positions(data, limit)
    of = len(PROBES) + 1
    progress(0, of, "positions from others")
    inputs = of_inputs(at)
    labels = of_labels(at, lambda done, _, name: progress(done + 1, of, name))

    def kept(found: Mapping[str, Any]) -> dict[str, Measure]:
        return {name: Measure(tuple(map(float, blocks))) for name, blocks in found.items()}

    return Profile(data.name, len(at.labels), at.grid, at.x_NPD.shape[2], at.classes, kept(inputs), kept(labels))


__all__ = ["BLOCKS", "Measure", "Profile", "measure"]
