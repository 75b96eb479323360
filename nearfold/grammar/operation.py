"""Operations: three words, and the two combinators that close the language."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nearfold.grammar.similarity import Position, Scaled
from nearfold.grammar.words import (
    All,
    Box,
    Causal,
    Kernel,
    Nearest,
    Ones,
    Path,
    Ranked,
    Rho,
    Row,
    Shape,
    Shift,
    Strided,
    Window,
)

SHAPES: dict[type[Path], tuple[type[Shape], ...]] = {
    Window: (Box, Causal),
    All: (Row, Causal, Strided),
    Nearest: (Ranked, Box, Causal),
}


@dataclass(frozen=True)
class Weight:
    """What to value: rho (one number per slot) times an optional kernel over slots."""

    rho: Rho = field(default=Ones())
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rho, Rho):
            raise ValueError(f"weight: rho must be ones, identity, softmax or inverse, got {self.rho!r}")
        if self.kernel is not None and not isinstance(self.kernel, Kernel):
            raise ValueError(f"weight: kernel must be kernel, depthwise, separable or shift, got {self.kernel!r}")

    def __str__(self) -> str:
        if self.kernel is None:
            return str(self.rho)
        return str(self.kernel) if self.rho == Ones() else f"{self.rho}*{self.kernel}"

    @property
    def heads(self) -> int:
        """Heads that select (and weight) on their own."""
        return self.rho.heads  # type: ignore[attr-defined]

    @property
    def projections(self) -> str:
        """The learned pointwise maps, letters of "qkvo"."""
        project = self.rho.project  # type: ignore[attr-defined]
        if project is None:
            return "qkv" if isinstance(self.kernel, Shift) else self.rho.default_projections
        return "" if project == "none" else project


class Operation:
    """Base of everything the notation can say; `Basic`, `Sum` and `Branch` are the three forms."""

    @property
    def parts(self) -> tuple[Basic, ...]:
        """Every `Basic` operation inside, in the order of the notation."""
        raise NotImplementedError


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
        if isinstance(self.path, All) and kernel is not None:
            raise ValueError(
                f"a kernel needs a fixed number of slots, which path all does not have; got {self.weight}. "
                "Use nearest(k) or window(size), or a weight without a kernel"
            )
        if isinstance(self.shape, Causal) and isinstance(self.path, Window) and self.path.padding != "same":
            raise ValueError(f"window | causal pads on the left only; leave padding out, got {self.path}")
        similarity = self.path.similarity  # type: ignore[attr-defined]
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
            plain = isinstance(rate, int | float) and not isinstance(rate, bool) and math.isfinite(rate)
            name = isinstance(rate, str) and rate.isascii() and rate.isidentifier()
            if not (rate is None or plain or name):
                raise ValueError(f"a sum's rate must be a name, a finite number or None, got {rate!r}")
            terms.append((float(rate) if plain else rate, term))  # type: ignore[arg-type]
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
    """Output channels split: A makes the first int(ratio * channels), B the others; both see all inputs.

    ``mix`` follows the two with a pointwise map (the public ConvNN branching layer always has it).
    """

    ratio: float
    first: Operation
    second: Operation
    mix: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float):
            raise ValueError(f"branch: ratio must be a number, got {self.ratio!r}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"branch: ratio must be between 0 (all second) and 1 (all first), got {self.ratio}")
        for op in (self.first, self.second):
            if not isinstance(op, Operation):
                raise ValueError(f"branch: operands are operations, got {op!r}")
        object.__setattr__(self, "ratio", float(self.ratio))

    def __str__(self) -> str:
        return f"branch({self.ratio!r}, {self.first}, {self.second}{', mix' if self.mix else ''})"

    def split(self, out_channels: int) -> tuple[int, int]:
        """Output channels of the two operands."""
        first = int(out_channels * self.ratio)
        return first, out_channels - first

    @property
    def parts(self) -> tuple[Basic, ...]:
        return self.first.parts + self.second.parts
