"""`complexity` and `describe`: what is said about a model as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nearfold._numbers import shown
from nearfold.grammar import Operation
from nearfold.recognise.alone import TRIED
from nearfold.recognise.foreign import GLOBAL_MEAN, POOLING, count
from nearfold.recognise.generating import MILLION
from nearfold.recognise.observation import Observation
from nearfold.recognise.pointwise import is_linear
from nearfold.recognise.ran import SEEN, layers_of
from nearfold.recognise.walk import Layer

TIERS = {"S": 1800.0, "A": 1250.0, "B": 900.0, "C": 500.0}
# Under what is printed; docs/complexity.md says more.
LEGEND = (
    "C_D: the primitives that say what it does, added; C_P: its parameters that generate behaviour from the input, in "
    "millions; Omega = C_D + alpha C_P",
    "field: how many positions of the input one output depends on, along each axis, in an input without a border; "
    "all: every position (of a causal shape: every one before it); <=n: at most n; any: where the data says; "
    "?: not known",
)


@dataclass(frozen=True)
class DescribedLayer:
    """One layer that is said in the words.

    Attributes:
        name: dotted name in the model.
        kind: name of its class.
        operation: what it is.
        mixes: whether it reads other positions; a 1x1 convolution does not.
        c_d: its share in the model's C_D, which is not always that of the operation; ``note`` says why.
        c_p: its parameters that generate behaviour, in millions.
        parameters: all of them.
        flops: multiply and add as two, for one input; None without an input size.
        field: receptive field in the model's input, per axis: a number, "<=" and a bound, "all", "any" (where the data
            says), "?" (not known), or empty without an input. It follows from every operator that ran, for weights
            that are not zero.
        note: what the words leave open.
    """

    name: str
    kind: str
    operation: Operation
    mixes: bool
    c_d: float
    c_p: float
    parameters: int
    flops: int | None = None
    field: str = ""
    note: str = ""

    @property
    def notation(self) -> str:
        """The operation, spelled."""
        return str(self.operation)

    @property
    def words(self) -> tuple[str, str, str]:
        """Path, shape and weight; those of several parts joined by " + "."""
        parts = self.operation.parts
        columns = zip(*((str(p.path), str(p.shape), str(p.weight)) for p in parts), strict=True)
        path, shape, weight = (" + ".join(dict.fromkeys(column)) for column in columns)
        return path, shape, weight


@dataclass(frozen=True)
class Strange:
    """A layer that is not known, and why."""

    name: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Complexity:
    """GWO's operational complexity of a model (doi 10.5281/zenodo.17103133).

    Attributes:
        c_d: descriptive complexity: the primitives of all its operations, added.
        c_p: millions of parameters that generate behaviour.
        alpha: what a million of them weighs.
        rows: the layers it is made of.
        unknown: layers that are not in it, so that it is a lower bound where there are any.
    """

    c_d: float
    c_p: float
    alpha: float
    rows: tuple[DescribedLayer, ...]
    unknown: tuple[Strange, ...]

    @property
    def omega(self) -> float:
        """C_D + alpha C_P."""
        return self.c_d + self.alpha * self.c_p

    def score(self, accuracy_percent: float) -> float:
        """GWO's score: 100 * accuracy / (1 + omega).

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> round(complexity(model).score(69.31), 2)
        990.14
        """
        if not 0 <= accuracy_percent <= 100:
            raise ValueError(f"accuracy_percent must be between 0 and 100, got {accuracy_percent}")
        return 100 * accuracy_percent / (1 + self.omega)

    @staticmethod
    def tier(score: float) -> str:
        """GWO's tier of a score: S, A, B or C; "-" below.

        >>> Complexity.tier(990.14), Complexity.tier(499.9)
        ('B', '-')
        """
        return next((name for name, least in TIERS.items() if score >= least), "-")

    def __str__(self) -> str:
        bound = f", without {len(self.unknown)} unknown layers" if self.unknown else ""
        return f"C_D {self.c_d:g}   C_P {self.c_p:.3f} M   Omega {self.omega:.3f} (alpha {self.alpha:g}{bound})"


@dataclass(frozen=True)
class Description:
    """Every mixing layer of a model in the words; ``str()`` is a table.

    Attributes:
        title: class of the model.
        input_size: channels and grid it was run on, if any.
        rows: layers that mix positions.
        pointwise: how often each kind of layer that does not occurs.
        unknown: layers that are not known.
        notes: what is assumed, and what the run showed.
        parameters: of the whole model.
        complexity: its totals.
    """

    title: str
    input_size: tuple[int, ...] | None
    rows: tuple[DescribedLayer, ...]
    pointwise: dict[str, int]
    unknown: tuple[Strange, ...]
    notes: tuple[str, ...]
    parameters: int
    complexity: Complexity

    def __str__(self) -> str:
        seen = f" on {'x'.join(map(str, self.input_size))}" if self.input_size else ""
        lines = [f"{self.title}{seen}: {self.parameters:,} parameters", ""]
        footnotes: dict[str, int] = {}
        cells = [("layer", "path", "shape", "weight", "C_D", "C_P/M", "params", "FLOPs", "field")]
        for row in self.rows:
            mark = f" [{footnotes.setdefault(row.note, len(footnotes) + 1)}]" if row.note else ""
            cells.append(
                (
                    (row.name or row.kind) + mark, *row.words, f"{row.c_d:g}", f"{row.c_p:.3f}" if row.c_p else "",
                    f"{row.parameters:,}", "" if row.flops is None else f"{row.flops:,}", row.field,
                )
            )  # fmt: skip
        lines += aligned(cells, left=4) if self.rows else ["no layer mixes positions"]
        lines += [f"  [{number}] {note}" for note, number in footnotes.items()]
        if self.unknown:
            lines += ["", "unknown:"] + [f"  {s.name or '(model)'} ({s.kind}): {s.reason}" for s in self.unknown]
        if self.pointwise:
            lines += ["", "pointwise: " + ", ".join(f"{n} {kind}" for kind, n in self.pointwise.items())]
        lines += [f"note: {note}" for note in self.notes]
        legend = LEGEND if self.rows and any(row.field for row in self.rows) else LEGEND[:1]
        return "\n".join([*lines, "", str(self.complexity), *legend])


def aligned(cells: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Aligned columns, the first ``left`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        columns = enumerate(zip(row, widths, strict=True))
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in columns).rstrip()

    return [line(row) for row in cells]


def complexity(model: nn.Module, alpha: float = 1.0, input_size: tuple[int, ...] | None = None) -> Complexity:
    """C_D and C_P of a model, derived from its layers.

    Args:
        model: any module; it is left as it is.
        alpha: weight of C_P.
        input_size: channels and grid. With it the model runs once, and what only a run shows is seen: token MLPs made
            of nn.Linear, cross-attention, functions that mix positions outside of any layer.

    Raises:
        ValueError: when the model does not run on an input of that size.

    >>> complexity(nn.MultiheadAttention(64, 4)).omega == 4 + 4 * (64 * 64 + 64) / 1e6
    True
    """
    layers, _ = layers_of(model, input_size)
    return _totals(tuple(map(_row, filter(_said, layers))), tuple(map(_strange, filter(_reason, layers))), alpha)


def describe(
    model: nn.Module, input_size: tuple[int, ...] | None = None, inputs: dict[str, Any] | None = None
) -> Description:
    """Every layer of a model in path, shape and weight.

    Args:
        model: any module; it is left as it is.
        input_size: channels and grid, such as (3, 224, 224). With it a copy of the model runs once (on the meta device
            where it can), and FLOPs and receptive fields are known.
        inputs: instead of a size, arguments of the model by name, for one that takes other things than one map: a
            batch of one, (1, C) and the grid, or ids (1, N). Receptive fields are those in the first.

    Raises:
        ValueError: when the model does not run on such an input, or both are given.

    >>> print(describe(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()), (3, 9, 9)))
    Sequential on 3x9x9: 224 parameters
    <BLANKLINE>
    layer  path                            shape  weight  C_D  C_P/M  params  FLOPs  field
    0      window(3, stride=2, padding=0)  box    kernel    3            224  6,912      3
    <BLANKLINE>
    pointwise: 1 ReLU
    <BLANKLINE>
    C_D 3   C_P 0.000 M   Omega 3.000 (alpha 1)
    C_D: the primitives that ... C_P: ...
    field: ...
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be an nn.Module, got {shown(model)}; nearfold.recognise.command.load_model makes one"
        )
    if input_size is not None and inputs is not None:
        raise ValueError(f"give input_size or inputs, not both; got {input_size=} and inputs={list(inputs)}")
    layers, seen = layers_of(model, input_size, inputs)
    names = {module: name for name, module in model.named_modules()}
    rows = tuple(_row(layer, seen, names) for layer in layers if layer.match)
    rows += tuple(_mean_row(model, name, *mean) for name, mean in (seen.means if seen else {}).items())
    unknown = tuple(map(_strange, filter(_reason, layers)))
    plain = Counter(_label(layer) for layer in layers if layer.pointwise)
    return Description(
        " on ".join([type(model).__name__, *_shown(inputs)]),
        input_size,
        tuple(row for row in rows if row.mixes),
        dict(plain),
        unknown,
        tuple(_notes(layers, seen)),
        count(model),
        _totals(rows, unknown, 1.0),
    )


def _shown(inputs: dict[str, Any] | None) -> list[str]:
    given = {n: "x".join(map(str, t.shape[1:])) for n, t in (inputs or {}).items() if isinstance(t, Tensor)}
    return [", ".join(f"{name} {shape}" for name, shape in given.items())] if given else []


def _totals(rows: tuple[DescribedLayer, ...], unknown: tuple[Strange, ...], alpha: float) -> Complexity:
    return Complexity(sum(row.c_d for row in rows), sum(row.c_p for row in rows), alpha, rows, unknown)


def _said(layer: Layer) -> bool:
    return layer.match is not None


def _reason(layer: Layer) -> bool:
    return bool(layer.reason)


def _row(layer: Layer, seen: Observation | None = None, names: dict[nn.Module, str] | None = None) -> DescribedLayer:
    assert layer.match is not None
    flops, own = None, [(names or {}).get(module, "") for module in layer.modules]
    if seen is not None and not layer.within and any(name in seen.flops for name in own):
        flops = sum(seen.flops.get(name, 0) for name in own)
    beside = [layer.modules[0].get_submodule(name) for name, _ in layer.match.beside]
    reached = [seen.fields[name] for name in own if seen and name in seen.fields]
    return DescribedLayer(
        layer.name, layer.kind, layer.match.operation, layer.mixes, layer.counted,
        layer.match.generating / MILLION, count(*layer.modules) - count(*beside), flops,
        reached[0] if reached else "", layer.note,
    )  # fmt: skip


def _mean_row(model: nn.Module, name: str, field: str, share: str) -> DescribedLayer:
    """A container whose own forward takes the mean over positions: the pooling before a classifier, or of a gate."""
    kind = type(model.get_submodule(name)).__name__
    note = "; ".join(filter(None, ("a mean over positions in its own forward", share, POOLING)))
    return DescribedLayer(name, kind, GLOBAL_MEAN, True, 0.0, 0.0, 0, 0, field, note)


def _strange(layer: Layer) -> Strange:
    return Strange(layer.name, layer.kind, count(layer.modules[0]), layer.reason)


def _label(layer: Layer) -> str:
    if layer.match and layer.match.followed:
        return f"{layer.kind} ({layer.match.note})"
    if layer.match:
        return f"{layer.kind} 1x1 (C_D {layer.counted:g} each)"
    return f"{layer.kind} ({layer.note})" if layer.note in (SEEN, TRIED) else layer.kind


def _notes(layers: list[Layer], seen: Observation | None) -> Iterable[str]:
    linears = [layer for layer in layers if layer.pointwise and is_linear(layer.modules[0])]
    if seen is None and linears:
        yield f"{len(linears)} nn.Linear are assumed to act on channels; with an input size it is seen"
    if seen is not None:
        unseen = [layer.name for layer in linears if layer.name not in seen.linears]
        if unseen:
            some = ", ".join(unseen[:3]) + (", ..." if len(unseen) > 3 else "")
            yield f"{len(unseen)} nn.Linear are assumed to act on channels: {some}"
        for layer in linears:
            if seen.linears.get(layer.name) == "all":
                yield f"{layer.name} reads the whole flattened map, as a classifier does; it counts 0"
    halves = sum(layer.counted == 1 for layer in linears)
    if halves:
        yield f"{halves} nn.Linear are the pointwise half of the depthwise layer before them: 1 each"
