"""Operations: three words, and the two combinators that close the language."""

from __future__ import annotations

from dataclasses import dataclass, field

from nearfold._numbers import LARGEST, plain, shown
from nearfold.grammar.similarity import Elu, Position, Scaled
from nearfold.grammar.word import WORDS, all_ones
from nearfold.grammar.words import (
    All,
    Block,
    Box,
    Causal,
    Deformable,
    Experts,
    Generated,
    Kernel,
    Max,
    Modulated,
    Nearest,
    Normalized,
    Ones,
    Path,
    Ranked,
    Rho,
    Row,
    Scan,
    Selective,
    Shape,
    Shift,
    Softmax,
    Strided,
    Table,
    Window,
)

SHAPES: dict[type[Path], tuple[type[Shape], ...]] = {
    Window: (Box, Causal),
    All: (Row, Causal, Strided),
    Nearest: (Ranked, Box, Causal),
    Block: (Box,),
    Deformable: (Box,),
    Scan: (Causal,),
}
# rhos that say something about some paths only, with or without a kernel
GOES_WITH: dict[type[Rho], tuple[tuple[type[Path], ...], bool]] = {
    Max: ((Window,), False),
    Generated: ((Window,), True),
    Modulated: ((Deformable,), True),
    Table: ((All,), False),
    Selective: ((Scan,), False),
}


@dataclass(frozen=True)
class Weight:
    """What to value: rho (one number per slot) times an optional kernel over slots."""

    rho: Rho = field(default=Ones())
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rho, Rho):
            raise ValueError(f"weight: rho must be one of {', '.join(WORDS['rho'])}, got {self.rho!r}")
        if self.kernel is not None and not isinstance(self.kernel, Kernel):
            raise ValueError(f"weight: kernel must be one of {', '.join(WORDS['kernel'])}, got {self.kernel!r}")

    def __str__(self) -> str:
        if self.kernel is None:
            return str(self.rho)
        return str(self.kernel) if self.rho == Ones() else f"{self.rho}*{self.kernel}"

    @property
    def heads(self) -> int:
        """Heads that select (and weight) on their own."""
        return self.rho.heads

    @property
    def projections(self) -> str:
        """The learned pointwise maps, letters of "qkvo"."""
        project = self.rho.project
        if project is None:
            return "qkv" if isinstance(self.kernel, Shift) else self.rho.default_projections
        return "" if project == "none" else project


class Operation:
    """Base of everything the notation can say; `Basic`, `Sum` and `Branch` are the three forms."""

    @property
    def parts(self) -> tuple[Basic, ...]:
        """Every `Basic` operation inside, in the order of the notation."""
        raise NotImplementedError

    @property
    def for_sequences(self) -> bool:
        """Whether some part is a causal window that names no axes: such windows take one grid axis."""
        return any(isinstance(p.path, Window) and p.shape == Causal() for p in self.parts)

    @property
    def needs_context(self) -> bool:
        """Whether some part reads a second input."""
        return any(part.cross for part in self.parts)


@dataclass(frozen=True)
class Basic(Operation):
    """Path | Shape | Weight.

    >>> from nearfold import parse
    >>> print(parse("window(3, dilation=2) | box | depthwise"))
    window(3, dilation=2) | box | depthwise
    """

    path: Path
    shape: Shape
    weight: Weight

    def __post_init__(self) -> None:
        for name, kind in (("path", Path), ("shape", Shape), ("weight", Weight)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        allowed = SHAPES[type(self.path)]
        if not isinstance(self.shape, allowed):
            names = ", ".join(s.word for s in allowed)
            raise ValueError(f"shape {self.shape} does not go with path {self.path.word}; it takes one of: {names}")
        rho, kernel = self.weight.rho, self.weight.kernel
        paths, kernels = GOES_WITH.get(type(rho), ((), True))
        if paths and not isinstance(self.path, paths):
            raise ValueError(f"{rho.word} goes with path {paths[0].word}, got {self.path}")
        if kernel is not None and (isinstance(self.path, (All, Scan)) or not kernels):
            raise ValueError(
                f"a kernel needs a fixed number of slots and a number for each, which {self.path.word} with {rho.word} "
                f"does not have; got {self.weight}. Use nearest(k) or window(size), or a weight without a kernel"
            )
        if isinstance(rho, Table) and not all_ones(getattr(self.path, "stride", 1)):
            raise ValueError(f"{rho} has a row for every output already; leave stride out, got {self.path}")
        if isinstance(self.path, Scan) and not isinstance(rho, Selective):
            raise ValueError(f"scan goes with weight selective, got {self.weight}")
        if isinstance(self.path, Deformable) and not (isinstance(rho, (Ones, Modulated)) and rho.heads == 1):
            raise ValueError(
                f"deformable goes with rho ones or modulated (groups of channels: deformable(3, groups=4)), got {rho}"
            )
        if isinstance(kernel, Experts) and not isinstance(rho, Ones):
            raise ValueError(f"experts goes with rho ones, got {self.weight}")
        if isinstance(self.shape, Causal):
            if isinstance(self.path, Window) and self.path.padding != "same":
                raise ValueError(f"window | causal pads on the left only; leave padding out, got {self.path}")
            if self.shape.axes and not isinstance(self.path, Window):
                raise ValueError(f"causal axes go with path window, got {self.path} | {self.shape}")
        similarity = self.path.similarity
        self._check_similarity()
        if not isinstance(self.path, Nearest) and not rho.needs_score and similarity != Scaled():
            raise ValueError(f"nothing reads the similarity {similarity} here (rho {rho.word}); leave it out")
        if isinstance(similarity, Position) and similarity.dilation > 1 and not isinstance(self.path, Nearest):
            raise ValueError(f"position(dilation={similarity.dilation}) goes with nearest, got path {self.path}")
        if isinstance(kernel, Shift):
            plain = isinstance(self.path, Window) and isinstance(self.shape, Box)
            if not (plain and isinstance(rho, Ones) and set("qkv") <= set(self.weight.projections)):
                raise ValueError(
                    "shift goes with window | box, rho ones and projections q, k, v: window(3) | box | shift(4)"
                )

    def _check_similarity(self) -> None:
        """ValueError where path, rho and similarity do not go together."""
        path, rho, near = self.path, self.weight.rho, self.path.similarity
        bias = getattr(near, "bias", "none")
        if bias != "none":
            able = (Window, Block) if bias == "table" else (Window, Block, All)
            if not (isinstance(path, able) and isinstance(rho, Softmax)):
                names = ", ".join(p.word for p in able)
                raise ValueError(f"scaled(bias={bias}) goes with softmax over one of the paths {names}, got {self}")
            if bias == "table" and isinstance(path, Window) and path.mode == "reflect":
                raise ValueError(f"scaled(bias=table) goes with mode=zeros or inside, got {path}")
        if getattr(near, "learned", False):
            if not rho.needs_score:
                raise ValueError(
                    f"blend(learned) gets its gradient through the scores that weigh, and rho {rho.word} reads none: "
                    f"use softmax, inverse or identity, such as {path} | {self.shape} | softmax; got {self}"
                )
            if getattr(path, "again", None) is not None:
                raise ValueError(f"again does not go with blend(learned), got {path}")
        if isinstance(rho, Normalized) and not isinstance(near, Elu):
            raise ValueError(
                f"normalized divides by the sum of the scores, which must not be negative: use elu, such as {path.word}"
                f"(..., elu), got {path}"
            )
        if getattr(path, "cross", False):
            border = path.padding if isinstance(path, Nearest) else 0
            own = isinstance(path, Nearest) and path.include_self is not False
            grid = isinstance(path, Nearest) and path.candidates.word in ("window", "grid")
            if near.placed or border or own or grid or not isinstance(self.shape, (Row, Ranked)):
                raise ValueError(
                    "cross: query and key lie on different grids, so that no position can be compared (coordinates, "
                    f"bias, self, causal, window or grid candidates, padding); got {self}"
                )
            if not rho.needs_score:
                raise ValueError(f"cross goes with a rho that compares query and key, got {rho}")

    @property
    def heads(self) -> int:
        """Groups of channels that look on their own: the weight's heads, or a deformable path's groups."""
        return self.path.groups if isinstance(self.path, Deformable) else self.weight.heads

    @property
    def cross(self) -> bool:
        """Whether keys and values come from a second input, the context."""
        return getattr(self.path, "cross", False)

    def __str__(self) -> str:
        return f"{self.path} | {self.shape} | {self.weight}"

    @property
    def parts(self) -> tuple[Basic, ...]:
        return (self,)


@dataclass(frozen=True)
class Sum(Operation):
    """rate * A + rate * B: a rate is a name (learnable), a number (fixed), or None (one).

    Query, key and value projections are shared where all operands that have one ask for it alike: this is ACmix.
    """

    terms: tuple[tuple[str | float | None, Operation], ...]

    def __post_init__(self) -> None:
        if len(self.terms) < 2:
            raise ValueError(f"a sum needs at least two terms, got {len(self.terms)}")
        terms = []
        for rate, term in self.terms:
            rate = plain(rate)
            number = type(rate) in (int, float) and abs(rate) <= LARGEST
            name = isinstance(rate, str) and rate.isascii() and rate.isidentifier()
            if not (rate is None or number or name):
                raise ValueError(
                    f"a sum's rate must be a name, a finite number or None (at most {LARGEST:g}), got {shown(rate)}"
                )
            terms.append((float(rate) if number else rate, term))
        object.__setattr__(self, "terms", tuple(terms))
        names = [r for r, _ in self.terms if isinstance(r, str)]
        if len(set(names)) != len(names):
            raise ValueError(f"each learnable rate needs a name of its own, got {', '.join(names)}")
        for _, term in self.terms:
            if not isinstance(term, Operation):
                raise ValueError(f"a sum's terms are operations, got {term!r}")

    def __str__(self) -> str:
        return " + ".join(
            f"({op})" if rate is None else f"{rate!r}*({op})" if isinstance(rate, float) else f"{rate}*({op})"
            for rate, op in self.terms
        )

    @property
    def parts(self) -> tuple[Basic, ...]:
        return tuple(p for _, op in self.terms for p in op.parts)


@dataclass(frozen=True)
class Branch(Operation):
    """Output channels split: A makes the first int(ratio * channels), B the others.

    Both see all inputs; with ``split`` each sees its own share of them only, divided as the outputs are. ``mix``
    follows the two with a pointwise map (the public ConvNN branching layer always has it).
    """

    ratio: float
    first: Operation
    second: Operation
    mix: bool = False
    split: bool = False

    def __post_init__(self) -> None:
        for name in ("ratio", "mix", "split"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if type(self.ratio) not in (int, float):
            raise ValueError(f"branch: ratio must be a number, got {shown(self.ratio)}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"branch: ratio must be between 0 (all second) and 1 (all first), got {shown(self.ratio)}")
        for name, flag in (("mix", self.mix), ("split", self.split)):
            if type(flag) is not bool:
                raise ValueError(f"branch: {name} must be true or false, got {shown(flag)}")
        for op in (self.first, self.second):
            if not isinstance(op, Operation):
                raise ValueError(f"branch: operands are operations, got {op!r}")
        object.__setattr__(self, "ratio", float(self.ratio))
        if self.split and self.needs_context:
            raise ValueError(f"branch: split divides the one input among the operands; a cross path reads two: {self}")

    def __str__(self) -> str:
        flags = "".join(f", {name}" for name in ("mix", "split") if getattr(self, name))
        return f"branch({self.ratio!r}, {self.first}, {self.second}{flags})"

    def shares(self, channels: int) -> tuple[int, int]:
        """How many of these channels belong to each operand."""
        first = int(channels * self.ratio)
        return first, channels - first

    def inputs(self, in_channels: int) -> tuple[slice, slice]:
        """The input channels that each operand sees."""
        if not self.split:
            return slice(None), slice(None)
        first, _ = self.shares(in_channels)
        return slice(0, first), slice(first, in_channels)

    @property
    def parts(self) -> tuple[Basic, ...]:
        return self.first.parts + self.second.parts
