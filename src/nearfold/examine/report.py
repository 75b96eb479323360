"""What an x-ray found: one row a layer, as a table, as JSON, and for the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.examine.landmarks import FARTHEST, nearest_words
from nearfold.examine.network import ReceptiveField, alike
from nearfold.examine.reading import Layer
from nearfold.examine.sources import Left
from nearfold.look.measures import Measures
from nearfold.recognise.report import aligned

SHOWN = {
    "distance": "distance",
    "reach": "reach",
    "spread": "spread",
    "window3": "in 3",
    "window7": "in 7",
    "content": "content",
    "translation": "equiv.",
    "negative": "negative",
}
"""The measures of the table, and what heads their columns."""


@dataclass(frozen=True)
class XRayLayer:
    """One layer, measured.

    Attributes:
        name: dotted.
        kind: name of its class.
        notation: what it is in the words; "" where they do not say it.
        way: ``words`` (read from the operation, head by head) or ``derivative`` (differentiated, heads together).
        grid: of its inputs.
        out_grid: of its outputs; () where they lie beside the map, as the one query of class attention.
        beside: tokens beside the map.
        groups: of channels, or heads.
        images: on how many it was measured.
        fixed: whether it reads the same of every image.
        measures: the mean over images and heads, by the names of `nearfold.look.measures.Measures`.
        deviation: the standard deviation over images of the means over heads.
        by_head: the mean over images, a number for every head that was measured.
        rows: outputs that were asked.
        sample: (G, R, N), the rows in the first image.
        seconds: that measuring it took.
        nearest: operators of the catalogue that look most alike there; empty where the outputs' grid is another.
        rearranged: whether it is given the map in parts or in another order; the rows are those of the map.
        note: what should be known beside it.
    """

    name: str
    kind: str
    notation: str
    way: str
    grid: tuple[int, ...]
    out_grid: tuple[int, ...]
    beside: int
    groups: int
    images: int
    fixed: bool
    measures: dict[str, float]
    deviation: dict[str, float]
    by_head: dict[str, list[float]]
    rows: Tensor
    sample: Tensor
    seconds: float
    nearest: tuple[str, ...] = ()
    rearranged: bool = False
    note: str = ""

    @property
    def positions(self) -> int:
        """How many inputs it could read."""
        return math.prod(self.grid) + self.beside

    @property
    def density(self) -> float:
        """Its spread as a share of all inputs."""
        return self.measures["spread"] / self.positions


@dataclass(frozen=True)
class XRay:
    """Where the layers of a network look; ``str()`` is a table.

    Attributes:
        title: class of the model.
        parameters: of the model.
        images: how many there were.
        input_size: channels and grid of one.
        layers: measured, in the model's order.
        left: those that are not measured, and why.
        fields: effective receptive fields at some depths.
        alike: centred kernel alignment of the layers' maps, a row for every layer; NaN with fewer than four images.
        seconds: that it took.
        note: what could not be measured of the whole.
    """

    title: str
    parameters: int
    images: int
    input_size: tuple[int, ...]
    layers: tuple[XRayLayer, ...]
    left: tuple[Left, ...]
    fields: tuple[ReceptiveField, ...]
    alike: Tensor
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        lines = [f"{self.title} on {self.images} images of {size}: {self.parameters:,} parameters", ""]
        cells = [("layer", "in the words", "grid", *SHOWN.values())]
        marks: dict[str, int] = {}
        for layer in self.layers:
            mark = f" [{marks.setdefault(layer.note, len(marks) + 1)}]" if layer.note else ""
            grid = "x".join(map(str, layer.grid)) + (f"+{layer.beside}" if layer.beside else "")
            cells.append((layer.name + mark, layer.notation or "?", grid, *(number(layer.measures[m]) for m in SHOWN)))
        lines += aligned(cells, left=2) if self.layers else ["no layer that mixes positions was measured"]
        lines += [f"  [{number}] {note}" for note, number in marks.items()]
        if self.fields:
            sides = ", ".join(f"{field.name} {field.side:.0f}" for field in self.fields)
            lines += ["", f"effective receptive field, side in pixels of the image: {sides}"]
        if self.note:
            lines += ["", self.note]
        if self.left:
            lines += ["", "not measured:"] + [
                f"  {one.name or '(model)'} ({one.kind}): {one.reason}" for one in self.left
            ]
        return "\n".join([*lines, "", *LEGEND])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the matrices, for JSON; what is not defined is None."""
        layers = [
            {f.name: getattr(layer, f.name) for f in fields(layer) if f.name not in ("rows", "sample")}
            | {"density": layer.density, "rows": layer.rows.tolist()}
            for layer in self.layers
        ]
        found = {f.name: getattr(self, f.name) for f in fields(self)} | {"layers": layers}
        found["left"] = [vars(one) for one in self.left]
        found["fields"] = [{"name": one.name, "side": one.side} for one in self.fields]
        return dict(_plain(found))


LEGEND = (
    "distance: mean, in positions of the input; reach: of that, what reading every position alike would have; spread: "
    "effective number of positions read",
    "in 3, in 7: share read in windows of so many positions a side; content: how much a row changes with the image, 0 "
    "to 1; equiv.: how much alike rows are at all places; negative: share of negative weights",
)


def finished(
    model: nn.Module,
    images: Tensor,
    layers: list[Layer],
    left: list[Left],
    fields: list[ReceptiveField],
    note: str,
    seconds: float,
) -> XRay:
    """The report of what was found."""
    done, more, grams = [], list(left), []
    for layer in layers:
        source = layer.source
        if layer.measures and not layer.reason:
            done.append(_row(layer))
            grams.append(layer.grams)
        else:
            reason = layer.reason or "it did not run"
            more.append(Left(source.name, source.kind, f"{source.reason}; {reason}" if source.reason else reason))
    parameters = sum(p.numel() for p in model.parameters())
    size = tuple(images.shape[1:])
    whole = (tuple(fields), alike(grams) if grams and grams[0] else torch.zeros(0, 0))
    return XRay(type(model).__name__, parameters, len(images), size, tuple(done), tuple(more), *whole, seconds, note)


def _row(layer: Layer) -> XRayLayer:
    source, all_ = layer.source, layer.all_measures()
    assert layer.sample is not None
    notes = []
    if source.reason:
        notes.append(source.reason)
    if layer.way == "derivative":
        notes.append(f"differentiated on {layer.images} images, all heads together")
    layout = source.layout
    if layout.places is not None:
        given = f"{layout.parts} parts of every image" if layout.parts > 1 else "the positions in another order"
        notes.append(f"it is given {given}: read on the map")
    if not layer.out_grid:
        notes.append("its outputs lie beside the map and have no place on it")
    if layer.groups > layer.sample.shape[0]:
        notes.append(f"{layer.sample.shape[0]} of {layer.groups} groups")
    if layer.calls > 1:
        notes.append(f"called {layer.calls} times: the first call is measured")
    each = {f.name: getattr(all_, f.name) for f in fields(Measures)}
    return XRayLayer(
        source.name, source.kind, "" if source.operation is None else str(source.operation), layer.way, layer.grid,
        layer.out_grid, layer.beside, layer.groups, layer.images, layer.fixed, all_.mean(),
        {name: _deviation(t) for name, t in each.items()},
        {name: t.nanmean(0).tolist() for name, t in each.items() if t.dim() == 2},
        layer.rows, layer.sample, layer.seconds, _nearest(layer, all_.mean()),
        layout.places is not None, "; ".join(notes),
    )  # fmt: skip


def _nearest(layer: Layer, measures: dict[str, float]) -> tuple[str, ...]:
    if len(layer.grid) != 2 or layer.grid != layer.out_grid or max(layer.grid) > FARTHEST:
        return ()
    return tuple(nearest_words(measures, measures["spread"] / (math.prod(layer.grid) + layer.beside), layer.grid))


def _deviation(numbers: Tensor) -> float:
    """Over images, of the mean over heads."""
    per_image = numbers.nanmean(1) if numbers.dim() == 2 else numbers
    there = per_image[per_image.isfinite()]
    return float(there.std()) if len(there) > 1 else (0.0 if len(there) else float("nan"))


def number(value: float) -> str:
    """Three digits; nothing where it is not defined."""
    return "" if math.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, no tuples, no tensors."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
