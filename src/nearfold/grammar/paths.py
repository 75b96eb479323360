"""Words for where to look: paths, and the candidates of `nearest`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.candidates import AllCandidates, Candidates, Grid, Nearby, Random  # noqa: F401  (they were here)
from nearfold.grammar.selectors import Selector
from nearfold.grammar.shapes import Box, Causal, Ranked, Row, Shape, Strided  # noqa: F401  (they were here)
from nearfold.grammar.similarity import Cosine, Scaled, Similarity
from nearfold.grammar.word import Word, all_ones, as_tuple, check, number, one_of, positive, sizes

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic

Size = int | tuple[int, ...]
UNUSED = Scaled()  # where nothing is compared; made here, for torch 2.9's compiler cannot make a word


class Path(Word):
    """Where to look."""

    kind = "path"
    shapes: ClassVar[tuple[str, ...]] = ()  # words it goes with; empty: any
    rhos: ClassVar[tuple[str, ...]] = ()
    takes_kernel: ClassVar[bool] = True  # whether it has a fixed number of slots, and a kernel a number for each
    searches: ClassVar[bool] = False  # whether it compares, whatever its weight does
    in_line: ClassVar[bool] = False  # whether causal, without axes, is for sequences alone
    joins: ClassVar[bool] = True  # whether it may be one of several that answer a query (`&`)
    places: ClassVar[bool] = False  # whether it says where it reads without comparing, on another input's grid, too
    similarity: Similarity = Scaled()  # what a path compares by, unless it has a field for it

    @property
    def inside(self) -> tuple[Path, ...]:
        """The paths that it is made of: itself, but for a union."""
        return (self,)

    @property
    def compared_by(self) -> tuple[Similarity, ...]:
        """The similarities by which it compares, where anything does."""
        return (self.similarity,)

    @property
    def groups_of_channels(self) -> int | None:
        """Groups of channels that look on their own, where the path says so and not the weight."""
        return None

    @property
    def draws(self) -> bool:
        """Whether it reads other positions at every training step."""
        return False

    def slot_shape(self, ndim: int) -> tuple[int, ...]:
        """The slot axes of a kernel on so many grid axes; of paths that take one."""
        size: Size | None = getattr(self, "size", None)
        if size is None:
            raise ValueError(
                f"{self} has no size to make a kernel's slots of: give {type(self).__name__} a method slot_shape(ndim) "
                "or takes_kernel = False"
            )
        return as_tuple(size, ndim, "size")

    def sized(self, positions: int) -> Path:
        """The path for a map of so many positions; itself where any number will do."""
        return self

    def require(self, op: Basic) -> None:
        if not one_of(op.shape, self.shapes):
            allowed = ", ".join(self.shapes)
            raise ValueError(f"shape {op.shape} does not go with path {self.word}; it takes one of: {allowed}")
        if not one_of(op.weight.rho, self.rhos):
            raise ValueError(f"{self.word} goes with weight {' or '.join(self.rhos)}, got {op.weight}")


def _similar(word: Path) -> None:
    check(isinstance(word.similarity, Similarity), word, "similarity", word.similarity, "a similarity")


@dataclass(frozen=True)
class Window(Path):
    """A window of fixed offsets. Sizes are an int (every axis) or a tuple (one per axis).

    ``padding`` is "same" or the positions added on each side. Outside positions are not valid (zero padding)
    or, with ``mode=reflect``, read the mirrored position. With ``mode=inside`` the window is moved at the border so
    that it stays inside the grid, and ``step`` queries in a row share the window of the one in their middle
    (neighbourhood attention, arXiv 2204.07143; its "stride", arXiv 2504.16922). The similarity matters only to a weight
    that looks at it (softmax ...).

    With ``cross`` the window lies on the grid of the context, another input of any size, around the position there that
    holds the query where both grids cover the same ground: local cross-attention, and upsampling that a finer map
    guides (SAPA, arXiv 2209.12866).
    """

    word = "window"
    examples: ClassVar[dict[str, str]] = {
        "window_axes": "window((3, 5)) | causal(axes=(1)) | softmax(heads=2)",
        "window_inside": "window(3, mode=inside, dilation=2, step=2) | box | softmax(heads=2)",
        "window_inside_causal": "window((3, 5), mode=inside, step=(3, 1)) | causal(axes=(0)) | softmax(heads=2)",
        "window_inside_kernel": "window(3, mode=inside, stride=2) | box | identity(heads=2)*kernel",
        "window_even": "window(2) | box | kernel(groups=2)",
        "window_plain": "window((3, 5), padding=1, stride=(1, 2)) | box | ones",
        "window_reflect": "window(5, mode=reflect, dilation=2) | box | kernel",
        "window_cross": "window((3, 2), cosine, dilation=2, cross) | box | softmax(heads=2, kv=1)",
        "window_cross_kernel": "window(3, dot, cross) | box | identity(heads=2)*depthwise",
    }
    primitive = ("STATIC_SLIDING", 1)
    shapes = ("box", "causal")
    in_line = True
    size: Size
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    stride: Size = 1
    dilation: Size = 1
    padding: Size | str = "same"
    mode: str = "zeros"
    step: Size = 1
    cross: bool = False

    def __post_init__(self) -> None:
        sizes(self, size=self.size, stride=self.stride, dilation=self.dilation, step=self.step)
        _similar(self)
        pads = self.padding if isinstance(self.padding, tuple) else (self.padding,)
        ok = self.padding == "same" or (len(pads) > 0 and all(type(p) is int and p >= 0 for p in pads))
        check(ok, self, "padding", self.padding, '"same", an integer >= 0 or a tuple of them')
        check(self.mode in ("zeros", "reflect", "inside"), self, "mode", self.mode, "zeros, reflect or inside")
        given = (self.size, self.stride, self.dilation, self.padding, self.step)
        if len({len(v) for v in given if type(v) is tuple}) > 1:
            raise ValueError(f"window: tuples must have one entry per axis each, got {self}")
        if self.mode == "inside":
            check(self.padding == "same", self, "padding", self.padding, "left out with mode=inside")
        else:
            check(all_ones(self.step), self, "step", self.step, "given with mode=inside only")
        if self.cross:
            plain = all_ones(self.stride) and self.padding == "same" and self.mode == "zeros"
            check(plain, self, "cross", self.cross, "given without stride, padding and mode")


@dataclass(frozen=True)
class All(Path):
    """Every position; outputs on a strided grid. With ``cross``, every position of the context, another input."""

    word = "all"
    examples: ClassVar[dict[str, str]] = {
        "all_ones": "all | row | ones",
    }
    primitive = ("GLOBAL_INDEXED", 1)
    shapes = ("row", "causal", "strided")
    takes_kernel = False
    joins = False
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    stride: Size = 1
    cross: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes(self, stride=self.stride)
        _similar(self)


@dataclass(frozen=True)
class Block(Path):
    """The block of the grid that holds the position: every position of a block reads the same ``size`` positions.

    ``shift`` moves the blocks' borders, so that the blocks at the grid's own border are smaller: ``shift`` half of
    ``size`` is Swin's shifted window (arXiv 2103.14030), whose mask after its cyclic shift says the same. Along an axis
    that one block covers nothing is shifted, as there.

    Blocks that reach beyond the grid are cut short. With ``padded`` the grid is first filled up to whole blocks by zero
    inputs behind its end, on every axis, which are projected and read like any other: the rule of Swin's public code,
    torchvision and transformers, where a size does not divide the map. (timm fills a map up after it has shifted it.)

    With ``halo`` a block reads this many positions more on every side, those outside the grid left out (halo attention,
    arXiv 2103.12731; the overlapping windows of HAT, arXiv 2205.04437).

    With ``spread`` the ``size`` positions of a block lie as far apart as the grid lets them, n / size (rounded up)
    along an axis of n: the grid attention of MaxViT (arXiv 2204.01697). A bias then counts steps of that length.
    """

    word = "block"
    examples: ClassVar[dict[str, str]] = {
        "block_kernel": "block(2, shift=1) | box | mean*kernel",
        "block_cosine": "block((2, 3), cosine) | box | softmax(heads=2)*separable(groups=2)",
        "block_padded": "block((4, 5), scaled(bias=table), shift=(1, 2), padded) | box | softmax(heads=2)",
        "block_spread": "block((2, 4), scaled(bias=table), spread) | box | softmax(heads=2)",
        "block_spread_kernel": "block(3, padded, spread) | box | ones*kernel(groups=2)",
        "block_halo": "block((2, 3), scaled(bias=table), halo=(1, 2)) | box | softmax(heads=2)",
        "block_halo_kernel": "block(2, shift=1, padded, halo=1) | box | ones*kernel(groups=2)",
    }
    primitive = ("STATIC_BLOCK", 1)
    shapes = ("box",)
    size: Size
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    shift: Size = 0
    padded: bool = False
    spread: bool = False
    halo: Size = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes(self, size=self.size)
        _similar(self)
        size, shift = (v if isinstance(v, tuple) else (v,) for v in (self.size, self.shift))
        ok = all(type(n) is int and n >= 0 for n in shift) and (len(shift) == len(size) or 1 in (len(shift), len(size)))
        axes = max(len(size), len(shift))
        pairs = zip(shift * (axes // max(len(shift), 1)), size * (axes // len(size)), strict=False)
        check(ok and all(n < m for n, m in pairs), self, "shift", self.shift, "from 0 to size - 1")
        check(not (self.spread and any(shift)), self, "shift", self.shift, "left out next to spread")
        halo = self.halo if isinstance(self.halo, tuple) else (self.halo,)
        whole = len(halo) > 0 and all(type(n) is int and n >= 0 for n in halo)
        check(whole, self, "halo", self.halo, "an integer >= 0 or a tuple of them, one per axis")
        check(not (self.spread and any(halo)), self, "halo", self.halo, "left out next to spread")

    def slot_shape(self, ndim: int) -> tuple[int, ...]:
        halo = as_tuple(self.halo, ndim, "halo")
        return tuple(n + 2 * h for n, h in zip(as_tuple(self.size, ndim, "size"), halo, strict=True))


ORDERS = ("raster", "columns", "snake")


@dataclass(frozen=True)
class Scan(Path):
    """Every position that came before, along one order, through a state of ``state`` numbers per channel.

    ``order`` is raster (rows, one after the other), columns, or snake (rows, every other one backwards);
    ``reverse`` goes the other way. A state-space recurrence (arXiv 2312.00752).
    """

    word = "scan"
    examples: ClassVar[dict[str, str]] = {
        "scan_heads": "scan(state=5, order=columns, reverse) | causal | selective(heads=2, project=vo)",
        "scan_rank": "scan(state=3, order=snake, reverse) | causal | selective(rank=3)",
    }
    primitive = ("RECURRENT", 1)
    shapes = ("causal",)
    rhos = ("selective", "additive", "delta", "mlstm", "rwkv7")
    takes_kernel = False
    joins = False
    state: int = field(default=16, metadata={"always": True, "named": True})
    order: str = "raster"
    reverse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, state=self.state)
        check(self.order in ORDERS, self, "order", self.order, " or ".join((", ".join(ORDERS[:-1]), ORDERS[-1])))

    @property
    def similarity(self) -> Similarity:  # type: ignore[override]
        """Nothing is compared here."""
        return UNUSED


@dataclass(frozen=True)
class Nearest(Path):
    """The k most similar positions, ties broken by the lowest index (raster order).

    ``padding`` adds a border of zero inputs that are candidates too. ``self`` puts the position itself in
    slot 0 and takes it out of the search; a number instead fixes the score of that slot. ``again`` leaves the
    position in the search with this fixed score (the public attention layer does so; default: taken out).
    ``recall`` below 1 allows an approximate search, expected to find at least this share of the k; it is exact where
    that is as fast, and always on the oracle. With ``cross`` the positions are those of the context, another input.
    ``by`` chooses by another similarity than the one that weighs, or by an `indexer`; a choice has no gradient.
    ``least`` and ``top_p`` let the data decide how many of the k there are: only slots that score at least this number,
    and the fewest of the best whose softmax over them holds this share (arXiv 2502.02770). An own slot stays.
    """

    word = "nearest"
    examples: ClassVar[dict[str, str]] = {
        "nearest_itself": "nearest(1, self) | ranked | kernel",
        "nearest_padded": "nearest(50, cosine, padding=1, self) | causal | identity(heads=2)*kernel(coordinates)",
        "nearest_fixed_self": "nearest(4, dot(coordinates), window(3), self=0.5, again=-0.1) | ranked"
        " | softmax(heads=4, scale=-1.0)*kernel(groups=4)",
        "nearest_by": "nearest(4, scaled, by=cosine) | ranked | softmax(heads=2)",
        "nearest_by_position": "nearest(5, euclidean, self, by=position) | box | softmax(heads=2)",
        "nearest_least": "nearest(7, cosine, least=0.1, top_p=0.8, self) | box | softmax(heads=2)*depthwise",
        "nearest_least_mean": "nearest(5, euclidean, window(5), least=-3.5) | ranked | mean*kernel",
        "nearest_top_p": "nearest(6, dot, top_p=0.6) | causal | ones(heads=2)",
        "nearest_cross": "nearest(3, cosine, random(4), cross) | ranked | softmax(heads=2, kv=1)*depthwise",
    }
    primitive = ("CONTENT_AWARE", 2)
    shapes = ("ranked", "box", "causal")
    searches = True
    k: int
    similarity: Similarity = field(default=Cosine(), metadata={"positional": True, "always": True})
    candidates: Candidates = field(default=AllCandidates(), metadata={"positional": True})
    include_self: bool | float = field(default=False, metadata={"notation": "self"})
    again: float | None = None
    stride: Size = 1
    padding: int = 0
    recall: float = 1.0
    cross: bool = False
    by: Similarity | Selector | None = None
    least: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, k=self.k)
        sizes(self, stride=self.stride)
        _similar(self)
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
        for name in ("least", "top_p"):
            given = getattr(self, name)
            if given is not None:
                number(self, name, given)
                check(self.by is None and self.again is None, self, name, given, "left out beside by and again")
                object.__setattr__(self, name, float(given))
        if self.top_p is not None:
            check(0 < self.top_p < 1, self, "top_p", self.top_p, "above 0 and below 1; leave it out for all of the k")
        if self.by is not None:
            self._require_by(self.by)
        if getattr(self.similarity, "relative", False):
            raise ValueError("nearest: scaled(relative) is a window's position term; use scaled(coordinates)")

    def _require_by(self, by: Similarity | Selector) -> None:
        check(isinstance(by, (Similarity, Selector)), self, "by", by, "a similarity or indexer(heads, size)")
        check(self.again is None, self, "again", self.again, "left out beside by")
        if isinstance(by, Similarity):
            own = by.learned or by.coordinates == "learned" or by.relative or by.bias != "none"
            check(not own, self, "by", str(by), "a similarity without parameters, relative and bias")
        else:
            plain = self.recall == 1 and self.padding == 0 and not self.cross
            check(plain, self, "by", str(by), "a similarity beside recall, padding or cross")

    @property
    def prunes(self) -> bool:
        """Whether the scores decide how many of the k slots there are."""
        return self.least is not None or self.top_p is not None

    def slot_shape(self, ndim: int) -> tuple[int, ...]:
        return (self.k,)

    @property
    def compared_by(self) -> tuple[Similarity, ...]:
        return (self.similarity, self.by) if isinstance(self.by, Similarity) else (self.similarity,)

    @property
    def draws(self) -> bool:
        return self.candidates.drawn

    @property
    def primitives(self) -> dict[str, float]:
        """Content-aware as far as features decide: none of it by position alone, a share of it in a blend."""
        share = getattr(self.similarity, "lam", 1.0 if self.similarity.uses_features else 0.0)
        return {"STATIC_SLIDING": 1.0 - share, "CONTENT_AWARE": 2.0 * share}

    def __eq__(self, other: object) -> bool:
        # by type, too: self=1.0 fixes a score and self does not, but Python says 1.0 == True
        if not isinstance(other, Nearest):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(type(a) is type(b) and a == b for a, b in pairs)

    def require(self, op: Basic) -> None:
        super().require(op)
        if self.again is not None and getattr(self.similarity, "learned", False):
            raise ValueError(f"again does not go with blend(learned), got {self}")
