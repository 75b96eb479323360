"""Several paths that answer one query, written with &; and the paths that are mostly asked for in such company."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.paths import Path
from nearfold.grammar.shapes import Box, Shape
from nearfold.grammar.similarity import Scaled, Similarity
from nearfold.grammar.word import all_ones, check, one_of, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic

MOST = 2**24 - 1  # slots: what the kernels count to


@dataclass(frozen=True)
class Listed(Path):
    """``n`` positions for every query, which follow from its place alone."""

    primitive = ("STATIC_SLIDING", 1)
    shapes = ("box", "causal")
    n: int = field(metadata={"most": MOST})
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, n=self.n)

    def slot_shape(self, ndim: int) -> tuple[int, ...]:
        return (self.n,)


@dataclass(frozen=True)
class First(Listed):
    """The first ``n`` positions in raster order, for every query: attention sinks, class and register tokens.

    Source: StreamingLLM (arXiv 2309.17453).
    """

    word = "first"
    examples: ClassVar[dict[str, str]] = {
        "first_softmax": "first(3, dot) | box | softmax(heads=2)",
        "first_kernel": "first(2) | causal | kernel",
    }


@dataclass(frozen=True)
class Scattered(Listed):
    """``n`` positions for every query, drawn once and for all by ``seed`` and the query's place.

    Source: BigBird's random attention (arXiv 2007.14062).
    """

    word = "scattered"
    examples: ClassVar[dict[str, str]] = {
        "scattered_softmax": "scattered(3, cosine) | box | softmax(heads=2)",
        "scattered_causal": "scattered(4, seed=1) | causal | mean*depthwise",
    }
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(type(self.seed) is int and self.seed >= 0, self, "seed", self.seed, "an integer >= 0")


@dataclass(frozen=True)
class Axial(Path):
    """The line of the grid through the query along one axis (0 is the first).

    Source: axial attention (arXiv 1912.12180); axial(0) & axial(1) is criss-cross attention (arXiv 1811.11721).
    """

    word = "axial"
    examples: ClassVar[dict[str, str]] = {
        "axial_softmax": "axial(0) | box | softmax(heads=2)",
        "axial_mean": "axial(0) | causal | mean",
    }
    primitive = ("STATIC_BLOCK", 1)
    shapes = ("box", "causal")
    takes_kernel = False
    axis: int
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})

    def __post_init__(self) -> None:
        check(type(self.axis) is int and self.axis >= 0, self, "axis", self.axis, "an axis: 0 is the first")


@dataclass(frozen=True)
class Union(Path):
    """Several paths that answer one query: their slots, one path after the other, under one weight.

    A position that two of them reach is read once, by the first that reaches it: a union of sets. (What is to count
    twice is a sum of operations.) `ranked` orders the slots of those that search; the others keep their own order.

    >>> from nearfold import parse
    >>> parse("window(5) & first(2) | causal | softmax(heads=4)").path.paths[1]
    First(n=2, similarity=Scaled(coordinates=False, relative=False, rotary=False, bias='none'))
    """

    paths: tuple[Path, ...]
    shapes = ("box", "ranked", "causal")

    def __post_init__(self) -> None:
        ok = isinstance(self.paths, tuple) and len(self.paths) > 1 and all(isinstance(p, Path) for p in self.paths)
        check(ok, self, "paths", self.paths, "a tuple of two paths or more")
        for path in self.paths:
            check(path.joins, self, "paths", str(path), "windows, blocks, nearest, first, scattered or axial paths")
            moved = getattr(path, "padding", 0) not in (0, "same") or getattr(path, "padded", False)
            check(
                not (moved or getattr(path, "cross", False)), self, "paths", str(path), "without padding and cross here"
            )
            plain = path.similarity.bias == "none" and not path.similarity.relative
            check(plain, self, "similarity", str(path.similarity), "one without relative and bias in a union")
            same = all_ones(self.stride) and all_ones(getattr(path, "stride", 1))
            check(same or getattr(path, "stride", 1) == self.stride, self, "stride", str(path), "equal in all paths")

    def __str__(self) -> str:
        return " & ".join(map(str, self.paths))

    @property
    def stride(self) -> int | tuple[int, ...]:
        """The output stride, that of every path."""
        found: int | tuple[int, ...] = getattr(self.paths[0], "stride", 1)
        return found

    @property
    def similarity(self) -> Similarity:  # type: ignore[override]
        """What is compared by: one similarity for all paths that compare."""
        return next((path.similarity for path in self.paths if path.searches), self.paths[0].similarity)

    @property
    def searches(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(path.searches for path in self.paths)

    @property
    def takes_kernel(self) -> bool:  # type: ignore[override]
        """Whether all of them have a fixed number of slots."""
        return all(path.takes_kernel for path in self.paths)

    @property
    def draws(self) -> bool:
        return any(path.draws for path in self.paths)

    @property
    def inside(self) -> tuple[Path, ...]:
        return self.paths

    @property
    def primitives(self) -> dict[str, float]:
        """The sum of theirs."""
        found: dict[str, float] = {}
        for path in self.paths:
            for name, score in path.primitives.items():
                found[name] = found.get(name, 0.0) + score
        return found

    def slot_shape(self, ndim: int) -> tuple[int, ...]:
        return (sum(prod(path.slot_shape(ndim)) for path in self.paths),)

    def require(self, op: Basic) -> None:
        super().require(op)
        compared = [p for p in self.paths if op.weight.rho.needs_score or p.searches]
        other = next((p for p in compared if p.similarity != self.similarity), None)
        if other is not None:
            raise ValueError(
                f"the paths of a union compare by one similarity: {self.similarity} here, but {other} compares by "
                f"{other.similarity}; name it in each, such as window(3, cosine) & nearest(9, cosine)"
            )
        if op.shape.word == "ranked" and not self.searches:
            raise ValueError(f"no path of {self} ranks its slots; use box")
        alone(op)


Union.word = "union"  # not registered: it is written with &, not by its name


def _shape(path: Path, shape: Shape) -> Shape:
    """The shape of one path of a union."""
    return shape if shape.causal or one_of(shape, path.shapes) else Box()


@lru_cache(1024)
def alone(op: Basic) -> tuple[Basic, ...]:
    """The operations of which each has one path of a union.

    >>> from nearfold import parse
    >>> print(*alone(parse("window(3, dot) & nearest(9, dot) | ranked | softmax")), sep="; ")
    window(3, dot) | box | softmax; nearest(9, dot) | ranked | softmax
    """
    return tuple(replace(op, path=path, shape=_shape(path, op.shape)) for path in op.path.inside)
