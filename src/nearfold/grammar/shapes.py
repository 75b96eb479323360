"""Words for which slots there are, in which order: shapes.

Shape legend: M queries, N keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from nearfold.grammar.word import Word, check, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


class Shape(Word):
    """What form to look for."""

    kind = "shape"
    causal: ClassVar[bool] = False  # whether slots end at the query
    whole: ClassVar[bool] = True  # whether it leaves out no slot of its path
    raster: ClassVar[bool] = False  # whether slots of `nearest` stand in the order of the positions they read
    axes: tuple[int, ...] = ()

    def allows(self, query_M: Tensor, key_N: Tensor) -> Tensor | None:
        """Which keys a query may read (M, N), by their raster positions; None for every one."""
        return None

    def fit(self, positions: int) -> Shape:
        """The shape on a map of so many positions; itself where that is no other one."""
        return self


@dataclass(frozen=True)
class Box(Shape):
    """Slots in raster order of the positions they read."""

    word = "box"
    primitive = ("DENSE_SQUARE", 1)
    raster = True


@dataclass(frozen=True)
class Ranked(Shape):
    """Slots by similarity, nearest first."""

    word = "ranked"
    primitive = ("RANKED", 1)


@dataclass(frozen=True)
class Row(Shape):
    """One slot for every position of the input."""

    word = "row"
    primitive = ("FULL_ROW", 1)


@dataclass(frozen=True)
class Causal(Shape):
    """Only positions up to and including the query, in raster order of the grid or in the order of a scan.

    For a window: up to the query along ``axes`` (0 is the first); it may be left out where there is only one.
    """

    word = "causal"
    primitive = ("CAUSAL_1D", 1)
    causal = True
    whole = False
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ok = isinstance(self.axes, tuple) and all(type(a) is int and a >= 0 for a in self.axes)
        check(ok and len(set(self.axes)) == len(self.axes), self, "axes", self.axes, "a tuple of axes, such as (0,)")
        object.__setattr__(self, "axes", tuple(sorted(self.axes)))

    def require(self, op: Basic) -> None:
        if self.axes and op.path.word != "window":
            raise ValueError(f"causal axes go with path window, got {op.path} | {self}")
        if op.path.word == "window" and getattr(op.path, "padding", "same") != "same":
            raise ValueError(f"window | causal pads on the left only; leave padding out, got {op.path}")

    def allows(self, query_M: Tensor, key_N: Tensor) -> Tensor | None:
        return key_N[None, :] <= query_M[:, None]


@dataclass(frozen=True)
class Strided(Shape):
    """Only positions a multiple of ``step`` away in raster order (strided sparse attention, arXiv 1904.10509)."""

    word = "strided"
    examples: ClassVar[dict[str, str]] = {
        "all_identity": "all(dot) | strided(3) | identity(heads=2)",
    }
    primitive = ("STRIDED_ROW", 1)
    whole = False
    step: int = field(metadata={"most": 2**62})  # no further than the map in any case

    def __post_init__(self) -> None:
        positive(self, step=self.step)

    def allows(self, query_M: Tensor, key_N: Tensor) -> Tensor | None:
        return (key_N % self.step)[None, :] == (query_M % self.step)[:, None]

    def fit(self, positions: int) -> Shape:
        return self if self.step <= positions else Strided(positions)
