"""The vocabulary: every word of the language is a frozen dataclass whose fields are its arguments.

A word is used the same way in Python (``Window(3, dilation=2)``) and in the notation (``window(3,
dilation=2)``); parser and printer read the fields, so a new word is one class in this file's family.
``kind`` names the place where a word may stand: path, shape, rho, kernel, similarity or candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from nearfold.grammar.similarity import Cosine, Scaled, Similarity
from nearfold.grammar.word import Word, check, number, positive, sizes

Size = int | tuple[int, ...]


# --- candidates: which positions `nearest` may choose from


class Candidates(Word):
    """The positions among which `nearest` searches."""

    kind = "candidates"


@dataclass(frozen=True)
class AllCandidates(Candidates):
    """Every position."""

    word = "all"


@dataclass(frozen=True)
class Random(Candidates):
    """r positions drawn afresh at every training step, the same for the whole batch; all in evaluation."""

    word = "random"
    r: int

    def __post_init__(self) -> None:
        positive(self, r=self.r)


@dataclass(frozen=True)
class Grid(Candidates):
    """A fixed grid of r positions per axis, evenly spaced, ``inset`` positions away from the border."""

    word = "grid"
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


# --- Path: where to look


class Path(Word):
    """Where to look."""

    kind = "path"


@dataclass(frozen=True)
class Window(Path):
    """A window of fixed offsets. Sizes are an int (every axis) or a tuple (one per axis).

    ``padding`` is "same" or the positions added on each side. Outside positions are not valid (zero padding)
    or, with ``mode=reflect``, read the mirrored position. The similarity matters only to a weight that
    looks at it (softmax ...).
    """

    word = "window"
    size: Size
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    stride: Size = 1
    dilation: Size = 1
    padding: Size | str = "same"
    mode: str = "zeros"

    def __post_init__(self) -> None:
        sizes(self, size=self.size, stride=self.stride, dilation=self.dilation)
        check(isinstance(self.similarity, Similarity), self, "similarity", self.similarity, "a similarity")
        pads = self.padding if isinstance(self.padding, tuple) else (self.padding,)
        ok = self.padding == "same" or (len(pads) > 0 and all(type(p) is int and p >= 0 for p in pads))
        check(ok, self, "padding", self.padding, '"same", an integer >= 0 or a tuple of them')
        check(self.mode in ("zeros", "reflect"), self, "mode", self.mode, "zeros or reflect")
        lengths = {len(v) for v in (self.size, self.stride, self.dilation, self.padding) if type(v) is tuple}
        if len(lengths) > 1:
            raise ValueError(f"window: tuples must have one entry per axis each, got {self}")


@dataclass(frozen=True)
class All(Path):
    """Every position; outputs on a strided grid."""

    word = "all"
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    stride: Size = 1

    def __post_init__(self) -> None:
        sizes(self, stride=self.stride)
        check(isinstance(self.similarity, Similarity), self, "similarity", self.similarity, "a similarity")


@dataclass(frozen=True)
class Nearest(Path):
    """The k most similar positions, ties broken by the lowest index (raster order).

    ``padding`` adds a border of zero inputs that are candidates too. ``self`` puts the position itself in
    slot 0 and takes it out of the search; a number instead fixes the score of that slot. ``again`` leaves the
    position in the search with this fixed score (the public attention layer does so; default: taken out).
    ``recall`` below 1 allows an approximate search, expected to find at least this share of the k; it is exact where
    that is as fast, and always on the oracle.
    """

    word = "nearest"
    k: int
    similarity: Similarity = field(default=Cosine(), metadata={"positional": True, "always": True})
    candidates: Candidates = field(default=AllCandidates(), metadata={"positional": True})
    include_self: bool | float = field(default=False, metadata={"notation": "self"})
    again: float | None = None
    stride: Size = 1
    padding: int = 0
    recall: float = 1.0

    def __post_init__(self) -> None:
        positive(self, k=self.k)
        sizes(self, stride=self.stride)
        check(isinstance(self.similarity, Similarity), self, "similarity", self.similarity, "a similarity")
        check(
            isinstance(self.candidates, Candidates),
            self,
            "candidates",
            self.candidates,
            "all, random, grid or window",
        )
        if not isinstance(self.include_self, bool):
            number(self, "self", self.include_self)
            object.__setattr__(self, "include_self", float(self.include_self))
        if self.again is not None:
            number(self, "again", self.again)
            check(self.include_self is not False, self, "again", self.again, "given together with self")
            object.__setattr__(self, "again", float(self.again))
        check(type(self.padding) is int and self.padding >= 0, self, "padding", self.padding, "an int >= 0")
        number(self, "recall", self.recall)
        check(0 < self.recall <= 1, self, "recall", self.recall, "above 0 and at most 1 (exact)")
        object.__setattr__(self, "recall", float(self.recall))
        if getattr(self.similarity, "relative", False):
            raise ValueError("nearest: scaled(relative) is a window's position term; use scaled(coordinates)")

    def __eq__(self, other: object) -> bool:
        # by the notation: self=1.0 fixes a score and self does not, but Python says 1.0 == True
        return isinstance(other, Nearest) and str(self) == str(other)


# --- Shape: which slots exist, in which order


class Shape(Word):
    """What form to look for."""

    kind = "shape"


@dataclass(frozen=True)
class Box(Shape):
    """Slots in raster order of the positions they read."""

    word = "box"


@dataclass(frozen=True)
class Ranked(Shape):
    """Slots by similarity, nearest first."""

    word = "ranked"


@dataclass(frozen=True)
class Row(Shape):
    """One slot for every position of the input."""

    word = "row"


@dataclass(frozen=True)
class Causal(Shape):
    """Only positions up to and including the query, in raster order of the grid."""

    word = "causal"


@dataclass(frozen=True)
class Strided(Shape):
    """Only positions a multiple of ``step`` away in raster order (strided sparse attention, arXiv 1904.10509)."""

    word = "strided"
    step: int

    def __post_init__(self) -> None:
        positive(self, step=self.step)


# --- Weight: what to value. rho turns scores into one number per slot, the kernel maps slots to channels


class Rho(Word):
    """One number per slot, alpha, from the scores."""

    kind = "rho"
    needs_score: ClassVar[bool] = True
    default_projections: ClassVar[str] = "qkvo"


def _rho(word: Any) -> None:
    positive(word, heads=word.heads)
    if word.project is not None:
        ok = word.project == "none" or (
            isinstance(word.project, str)
            and word.project != ""
            and word.project == "".join(c for c in "qkvo" if c in word.project)
        )
        check(ok, word, "project", word.project, "none or letters of qkvo in this order")


@dataclass(frozen=True)
class Ones(Rho):
    """alpha = 1."""

    word = "ones"
    needs_score = False
    default_projections = ""
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        _rho(self)


@dataclass(frozen=True)
class Identity(Rho):
    """alpha = score."""

    word = "identity"
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        _rho(self)


@dataclass(frozen=True)
class Softmax(Rho):
    """alpha = softmax over the slots of scale * score."""

    word = "softmax"
    heads: int = 1
    scale: float = 1.0
    project: str | None = None

    def __post_init__(self) -> None:
        _rho(self)
        number(self, "scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))


@dataclass(frozen=True)
class Inverse(Rho):
    """alpha = 1 / (distance + 1e-8), distance = -score."""

    word = "inverse"
    heads: int = 1
    project: str | None = None

    def __post_init__(self) -> None:
        _rho(self)


class Kernel(Word):
    """Learned weights over slots, in torch's layout (out, in / groups, *slots)."""

    kind = "kernel"


@dataclass(frozen=True)
class Dense(Kernel):
    """A full convolution kernel. ``coordinates`` appends the positions to the values it reads."""

    word = "kernel"
    groups: int = 1
    coordinates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, groups=self.groups)


@dataclass(frozen=True)
class Depthwise(Kernel):
    """One weight per channel and slot."""

    word = "depthwise"


@dataclass(frozen=True)
class Separable(Kernel):
    """Depthwise over slots, then a pointwise map of the channels."""

    word = "separable"
    groups: int = 1
    coordinates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, groups=self.groups)


@dataclass(frozen=True)
class Shift(Kernel):
    """ACmix's convolution: k^2 pointwise maps of the 3 x heads projections, shifted and summed.

    Reads query, key and value (arXiv 2111.14556, eq. 9-11). ``interleaved`` leaves the output channels
    in the grouped convolution's order (head dimension first), as the public code does.
    """

    word = "shift"
    heads: int
    interleaved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, heads=self.heads)
