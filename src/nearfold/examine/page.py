"""The x-ray as one page: the spectrum as a chart, receptive fields, and every layer by itself.

The page asks for nothing outside itself. Texts reach it through a template with autoescaping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._images import jpeg_uri
from nearfold._pages import environment
from nearfold.catalogue_page import drawn
from nearfold.examine.landmarks import landmarks
from nearfold.examine.report import SHOWN, XRay, XRayLayer, number

LANDMARKS = (
    "conv", "convnext", "large_kernel", "neighborhood", "swin_shifted", "deformable", "convnn", "kvt", "attention",
    "linear_attention", "mamba", "vig", "pool_global", "s4nd",
)  # fmt: skip
"""Of the catalogue, those that the chart names."""
USUAL = (14, 14)  # the grid on which they are measured, unless the network has another one often
HEADS = 8  # of which one row is drawn
LARGEST = 112  # side of a picture; larger maps are pooled
WIDTH, HEIGHT = 720, 460  # of the chart
LEFT, TOP, RIGHT, BOTTOM = 70, 28, 20, 56
FAR = 1.15  # reach at the right end of the chart


@dataclass(frozen=True)
class Dot:
    """A layer in the chart, or an operator of the catalogue (no link)."""

    x: float
    y: float
    title: str
    colour: str = ""
    link: str = ""
    label: str = ""
    left: bool = False
    square: bool = False


@dataclass(frozen=True)
class Picture:
    """An image in a data URI, and what it shows."""

    source: str
    text: str
    row: float = 0.0
    column: float = 0.0


@dataclass(frozen=True)
class Shown:
    """A layer on the page."""

    anchor: str
    layer: XRayLayer
    colour: str
    cells: Sequence[str]
    numbers: Sequence[tuple[str, str, str]]
    rows: Sequence[Picture]
    heads: Sequence[Picture]
    matrix: Picture


def page(shown: Sequence[tuple[str, XRay, Tensor]]) -> str:
    """One network, or two side by side, as one HTML document.

    Args:
        shown: of each its name, its x-ray, and the first image (C, H, W) from 0 to 1.

    >>> from torch import nn
    >>> from nearfold.examine import xray
    >>> x = torch.rand(2, 3, 8, 8)
    >>> text = page([("net", xray(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), x), x[0])])
    >>> text.startswith("<!doctype html>"), text.count("<details")
    (True, 2)
    """
    models = []
    dots = []
    for m, (name, seen, pixels) in enumerate(shown):
        layers = [_shown(m, i, len(seen.layers), layer) for i, layer in enumerate(seen.layers)]
        dots += [_dot(one, name if len(shown) > 1 else "", square=m == 1) for one in layers]
        fields = [Picture(drawn(_pooled(f.share)), f"behind {f.name}: {f.side:.0f} pixels a side") for f in seen.fields]
        alike = seen.alike.nan_to_num(0.0)
        models.append(
            {
                "name": name,
                "seen": seen,
                "layers": layers,
                "photograph": jpeg_uri(pixels if len(pixels) == 3 else pixels[:1]),
                "fields": fields,
                "alike": drawn(alike.float()) if len(alike) > 1 and float(alike.abs().sum()) > 0 else "",
            }
        )
    grid = _grid_of(shown)
    return environment("nearfold.examine").get_template("xray.html.jinja").render(
        title="X-ray of " + " and ".join(name for name, _, _ in shown),
        models=models,
        dots=[dot for dot in dots if not math.isnan(dot.x + dot.y)],
        landmarks=_landmarks(grid),
        grid=" x ".join(map(str, grid)),
        heads=SHOWN,
        width=WIDTH,
        height=HEIGHT,
        ticks=[(f"{value:g}", _x(value), _y(value)) for value in (0, 0.25, 0.5, 0.75, 1)],
        frame=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    )  # fmt: skip


def _grid_of(shown: Sequence[tuple[str, XRay, Tensor]]) -> tuple[int, ...]:
    """The grid that most layers with landmarks have."""
    grids = [layer.grid for _, seen, _ in shown for layer in seen.layers if layer.nearest]
    return max(set(grids), key=lambda g: (grids.count(g), g)) if grids else USUAL


def _landmarks(grid: tuple[int, ...]) -> list[Dot]:
    measured = landmarks(grid)
    found: list[Dot] = []
    for name in filter(measured.__contains__, LANDMARKS):
        x, y = _x(measured[name]["reach"]), _y(measured[name]["content"])
        while any(abs(x - other.x) < 90 and abs(y - other.y) < 13 for other in found):
            y -= 13  # names may not cover one another; the dot is where it is
        found.append(Dot(x, y, name, label=name, left=x > WIDTH - 150))
    return found


def _x(reach: float) -> float:
    return LEFT + min(reach, FAR) / FAR * (WIDTH - LEFT - RIGHT)


def _y(content: float) -> float:
    return HEIGHT - BOTTOM - content * (HEIGHT - TOP - BOTTOM)


def _dot(one: Shown, model: str, square: bool) -> Dot:
    m = one.layer.measures
    title = f"{model} {one.layer.name}: reach {number(m['reach'])}, content {number(m['content'])}".strip()
    return Dot(_x(m["reach"]), _y(m["content"]), title, one.colour, f"#{one.anchor}", square=square)


def _shown(m: int, i: int, count: int, layer: XRayLayer) -> Shown:
    hue = round(215 - 190 * i / max(count - 1, 1))  # blue at the first layer, orange at the last
    numbers = [
        (name, number(value), number(layer.deviation[name]))
        for name, value in layer.measures.items()
        if not math.isnan(value)
    ]
    whole = layer.sample.abs().mean(0)
    asked = _asked(layer)
    rows = [_row(layer, whole[r], r) for r in asked]
    middle = asked[len(asked) // 2]
    heads = []
    if layer.sample.shape[0] > 1:
        heads = [_row(layer, layer.sample[h, middle], middle) for h in range(min(HEADS, layer.sample.shape[0]))]
    of = f" of {math.prod(layer.out_grid)}" if layer.out_grid else ""
    text = f"{len(layer.rows)} rows{of}, one for each output asked, by {layer.positions} inputs"
    return Shown(
        f"m{m}-{i}", layer, f"hsl({hue} 65% 52%)", [number(layer.measures[name]) for name in SHOWN], numbers,
        rows, heads, Picture(drawn(_pooled(whole)), text),
    )  # fmt: skip


def _asked(layer: XRayLayer) -> list[int]:
    """Rows that are drawn: of those that were asked, the ones nearest to three places of the map."""
    if len(layer.out_grid) != 2:
        return list(dict.fromkeys([0, len(layer.rows) // 2, len(layer.rows) - 1]))
    at = torch.stack(torch.unravel_index(layer.rows, layer.out_grid), -1).double()
    sides = torch.tensor(layer.out_grid, dtype=torch.double)
    wanted = [(0.25, 0.3), (0.5, 0.5), (0.72, 0.68)]
    found = [int((at - torch.tensor(w).double() * sides).square().sum(-1).argmin()) for w in wanted]
    return list(dict.fromkeys(found))


def _row(layer: XRayLayer, row: Tensor, number_of_row: int) -> Picture:
    """One row on the map, and where it was asked, as shares of the picture's height and width."""
    on = row[layer.beside :]
    if len(layer.grid) != 2:
        return Picture(drawn(on[None]), "what one output reads")
    if not layer.out_grid:
        return Picture(drawn(_pooled(on.unflatten(0, layer.grid))), "what an output beside the map reads of it")
    at = torch.unravel_index(layer.rows[number_of_row], layer.out_grid)
    y, x = ((float(a) + 0.5) / n for a, n in zip(at, layer.out_grid, strict=True))
    text = f"what the output at row {int(at[0])}, column {int(at[1])} reads"
    return Picture(drawn(_pooled(on.unflatten(0, layer.grid))), text, 100 * y, 100 * x)


def _pooled(matrix: Tensor) -> Tensor:
    """A matrix with sides of at most `LARGEST`: of the numbers that fall into one cell, the largest."""
    if max(matrix.shape) <= LARGEST:
        return matrix
    sides = tuple(min(LARGEST, n) for n in matrix.shape)
    return F.adaptive_max_pool2d(matrix.abs()[None, None].float(), sides)[0, 0]
