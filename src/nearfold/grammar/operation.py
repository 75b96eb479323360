"""Operations: three words, and the two combinators that close the language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from nearfold._numbers import LARGEST, plain, shown
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.word import WORDS
from nearfold.grammar.words import (
    Causal,
    Kernel,
    Ones,
    Path,
    Rho,
    Shape,
)


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
            return getattr(self.kernel, "default_projections", "") or self.rho.default_projections
        return "" if project == "none" else project


O = TypeVar("O", bound="Operation")

GATE = "gate"
"""The rate that the input makes, position by position."""


def hashed_once(cls: type[O]) -> type[O]:
    """Keep an operation's hash, by which everything that is made once for it is found again.

    It holds in one process, for strings hash differently in another: only the fields are pickled and copied.
    """
    found_anew = cls.__hash__

    def kept_hash(self: O) -> int:
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = found_anew(self)
            object.__setattr__(self, "_hash", found)
        return found

    def state(self: O) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    cls.__hash__ = kept_hash  # type: ignore[assignment]
    cls.__getstate__ = state  # type: ignore[method-assign,assignment]
    return cls


class Operation:
    """Base of everything the notation can say; `Basic`, `Sum` and `Branch` are the three forms."""

    mix: bool = False  # whether a pointwise map follows the operands

    @property
    def operands(self) -> tuple[Operation, ...]:
        """The operations that this one combines, in the order of the notation; none where it combines none."""
        return ()

    @property
    def present(self) -> tuple[Operation, ...]:
        """The operands that make any of the output."""
        return self.operands

    def map(self, change: Callable[[Basic], Operation]) -> Operation:
        """The same combination of other `Basic` operations, each made from the one in its place.

        >>> from dataclasses import replace
        >>> from nearfold import parse
        >>> op = parse("0.5*(window(3) | box | kernel) + (all | row | mean)")
        >>> print(op.map(lambda part: replace(part, path=replace(part.path, stride=2))))
        0.5*(window(3, stride=2) | box | kernel) + (all(stride=2) | row | mean)
        """
        return self.combine(tuple(operand.map(change) for operand in self.operands))

    def combine(self, operands: tuple[Operation, ...]) -> Operation:
        """The same combination of as many other operations."""
        return self

    @property
    def rates(self) -> tuple[str | float | None, ...]:
        """What each operand is multiplied by: a name (learnable), a number, or None (one)."""
        return (None,) * len(self.operands)

    def shares(self, channels: int) -> tuple[int, ...]:
        """How many of so many output channels each operand makes: all of them."""
        return (channels,) * len(self.operands)

    @property
    def parts(self) -> tuple[Basic, ...]:
        """Every `Basic` operation inside, in the order of the notation."""
        return tuple(part for operand in self.operands for part in operand.parts)

    @property
    def for_sequences(self) -> bool:
        """Whether some part is causal along a line, and names no axes: it takes one grid axis."""
        return any(p.shape == Causal() and any(path.in_line for path in p.path.inside) for p in self.parts)

    @property
    def needs_context(self) -> bool:
        """Whether some part reads a second input."""
        return any(part.cross for part in self.parts)


@hashed_once
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
        rho, similarity = self.weight.rho, self.path.similarity
        self.path.require(self)
        rho.require(self)
        kernel = self.weight.kernel
        numbered = kernel is not None and not kernel.edges
        everywhere = kernel is not None and kernel.everywhere
        if numbered and not (rho.takes_kernel and (self.path.takes_kernel or everywhere)):
            raise ValueError(
                f"a kernel needs a fixed number of slots and a number for each, which {self.path.word} with {rho.word} "
                f"does not have; got {self.weight}. Use nearest(k) or window(size), or a weight without a kernel"
            )
        for word in (self.shape, similarity, self.weight.kernel):
            if word is not None:
                word.require(self)
        if not self.path.searches and not rho.needs_score and similarity != Scaled():
            raise ValueError(f"nothing reads the similarity {similarity} here (rho {rho.word}); leave it out")
        if self.cross and not self.path.places:
            self._require_cross()

    def _require_cross(self) -> None:
        """ValueError where something compares the positions of two inputs."""
        path, rho = self.path, self.weight.rho
        border = getattr(path, "padding", 0)
        own = getattr(path, "include_self", False) is not False
        grid = getattr(getattr(path, "candidates", None), "word", "all") in ("window", "grid")
        shapes = ("row", "ranked", *(() if path.searches else ("box",)))
        if path.similarity.placed or border not in (0, "same") or own or grid or self.shape.word not in shapes:
            raise ValueError(
                "cross: query and key lie on different grids, so that no position can be compared (coordinates, "
                f"bias, self, causal, window or grid candidates, padding); got {self}"
            )
        if not rho.needs_score:
            raise ValueError(f"cross goes with a rho that compares query and key, got {rho}")

    @property
    def heads(self) -> int:
        """Groups of channels that look on their own: the weight's heads, or a deformable path's groups."""
        return self.path.groups_of_channels or self.weight.heads

    @property
    def cross(self) -> bool:
        """Whether keys and values come from a second input, the context."""
        return getattr(self.path, "cross", False)

    def sized(self, positions: int) -> Basic:
        """The operation for a map of so many positions: a table is made for one number of them.

        >>> from nearfold import parse
        >>> print(parse("all | row | table(9)").sized(16), "and", parse("window(3) | box | kernel").sized(16))
        all | row | table(16) and window(3) | box | kernel
        """
        path, rho = self.path.sized(positions), self.weight.rho.sized(positions)
        if path is self.path and rho is self.weight.rho:
            return self
        return replace(self, path=path, weight=replace(self.weight, rho=rho))

    def __str__(self) -> str:
        return f"{self.path} | {self.shape} | {self.weight}"

    @property
    def parts(self) -> tuple[Basic, ...]:
        return (self,)

    def map(self, change: Callable[[Basic], Operation]) -> Operation:
        return change(self)


@hashed_once
@dataclass(frozen=True)
class Sum(Operation):
    """rate * A + rate * B: a rate is a name (learnable), a number (fixed), None (one), or `GATE`.

    A gate is made of the input: at every position the sigmoid of a learned pointwise map, one number for each operand
    that has one. Native sparse attention is such a sum (arXiv 2502.11089, equation 5).

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
        names = [r for r, _ in self.terms if isinstance(r, str) and r != GATE]
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
    def operands(self) -> tuple[Operation, ...]:
        return tuple(term for _, term in self.terms)

    @property
    def rates(self) -> tuple[str | float | None, ...]:
        return tuple(rate for rate, _ in self.terms)

    @property
    def learned(self) -> int:
        """How many rates are parameters."""
        return sum(isinstance(rate, str) and rate != GATE for rate in self.rates)

    @property
    def gates(self) -> int:
        """How many rates are gates."""
        return self.rates.count(GATE)

    def combine(self, operands: tuple[Operation, ...]) -> Operation:
        return Sum(tuple(zip(self.rates, operands, strict=True)))


@hashed_once
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
    def operands(self) -> tuple[Operation, ...]:
        return self.first, self.second

    @property
    def present(self) -> tuple[Operation, ...]:
        return tuple(op for op, share in zip(self.operands, (self.ratio, 1 - self.ratio), strict=True) if share > 0)

    def combine(self, operands: tuple[Operation, ...]) -> Operation:
        first, second = operands
        return replace(self, first=first, second=second)
