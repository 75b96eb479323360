"""Words for the positions among which `nearest` searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nearfold.grammar.word import Word, check, positive


class Candidates(Word):
    """The positions among which `nearest` searches."""

    kind = "candidates"
    drawn: ClassVar[bool] = False  # whether they are others at every training step


@dataclass(frozen=True)
class AllCandidates(Candidates):
    """Every position."""

    word = "all"


@dataclass(frozen=True)
class Random(Candidates):
    """r positions drawn afresh at every training step, the same for the whole batch; all in evaluation."""

    word = "random"
    examples: ClassVar[dict[str, str]] = {
        "nearest_scaled": "nearest(6, scaled(coordinates), random(9)) | ranked | softmax(heads=2)",
    }
    drawn = True
    r: int

    def __post_init__(self) -> None:
        positive(self, r=self.r)


@dataclass(frozen=True)
class Grid(Candidates):
    """A fixed grid of r positions per axis, evenly spaced, ``inset`` positions away from the border."""

    word = "grid"
    examples: ClassVar[dict[str, str]] = {
        "nearest_ones": "nearest(9, cosine, grid(3, inset=1)) | ranked | ones",
    }
    r: int
    inset: int = 0

    def __post_init__(self) -> None:
        positive(self, r=self.r)
        check(type(self.inset) is int and self.inset >= 0, self, "inset", self.inset, "an integer >= 0")


@dataclass(frozen=True)
class Nearby(Candidates):
    """The positions inside a window of this odd size around the query."""

    word = "window"
    size: int

    def __post_init__(self) -> None:
        positive(self, size=self.size)
        check(self.size % 2 == 1, self, "size", self.size, "odd")
