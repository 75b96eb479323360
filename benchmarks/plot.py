"""Draws the curves: `python -m benchmarks.plot` draws again what was measured.

Four panels: over positions and over neighbours, forward and forward + backward; log-log, labels at the lines.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.build import PYTORCH_PATH
from benchmarks.case import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {  # who: label, colour, width
    "SDPA": ("SDPA (dense)", "#2f6db3", 1.8),
    PYTORCH_PATH: ("Nearfold, PyTorch path", "#d9a441", 1.4),
    OURS: ("Nearfold", "#c2452d", 2.4),
}
COLUMNS = {"positions": ("N", "positions N"), "neighbours": ("k", "neighbours k")}
LINE_HEIGHT = 12.5  # points
KINDS = {"forward_ms": "forward", "both_ms": "forward + backward"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e7e7e7",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def _series(points: list[dict[str, Any]], x: str, who: str, kind: str) -> list[tuple[float, float]]:
    """(x, milliseconds) where they were measured."""
    rows = [(point[x], row) for point in points for row in point["rows"] if row["who"] == who]
    return [(at, row[kind]) for at, row in rows if kind in row]


def _number(value: float, _: object = None) -> str:
    return f"{value:g}" if value < 10000 else f"{value:,.0f}".replace(",", " ")


def _panel(axes: Axes, points: list[dict[str, Any]], x: str, kind: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(xscale="log", yscale="log", xticks=[point[x] for point in points])
    lines = {who: series for who in LINES if (series := _series(points, x, who, kind))}
    for who, series in lines.items():
        _, colour, width = LINES[who]
        axes.plot(*zip(*series, strict=True), "o-", color=colour, lw=width, ms=3.5, mew=0)
    axes.margins(x=0.06, y=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    _name(axes, lines, points[-1][x])
    if OURS in lines and "SDPA" in lines:
        ours, dense = dict(lines[OURS]), dict(lines["SDPA"])
        for at in sorted(ours.keys() & dense.keys()):
            axes.annotate(
                f"{dense[at] / ours[at]:.1f}x", (at, ours[at]), (2, -14 if dense[at] > ours[at] else 7),
                textcoords="offset points", ha="center", fontsize=8.5, color=LINES[OURS][1],
            )  # fmt: skip


def _name(axes: Axes, lines: dict[str, list[tuple[float, float]]], last: float) -> None:
    """Labels at the right ends, apart from one another; a line that ends early is labelled where it starts."""
    ends = sorted((series[-1][1], who) for who, series in lines.items() if series[-1][0] == last)
    low = -math.inf
    for value, who in ends:
        label, colour, _ = LINES[who]
        height = axes.transData.transform((last, value))[1] * 72 / axes.figure.dpi  # points
        up = max(height, low + LINE_HEIGHT)
        low = up
        axes.annotate(
            label, (last, value), (8, up - height), textcoords="offset points", color=colour, va="center", fontsize=9.5
        )
    for who in lines.keys() - {who for _, who in ends}:
        label, colour, _ = LINES[who]
        words = label.replace(", ", ",\n")
        axes.annotate(words, lines[who][0], (-4, 32), textcoords="offset points", color=colour, fontsize=9.5)


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw what `curves.run_curves` measured; a curve that was not measured is left out."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [name for name in COLUMNS if results["curves"].get(name)]
    machine = results["machine"]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.8 * len(columns), 8.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, len(columns), squeeze=False)
        for column, name in enumerate(columns):
            points = results["curves"][name]
            x, label = COLUMNS[name]
            fixed = f"k={points[0]['k']}" if x == "N" else f"N={points[0]['N']}"
            for row, (kind, words) in enumerate(KINDS.items()):
                axes = panels[row][column]
                _panel(axes, points, x, kind)
                axes.set_title(f"{words}, over {label} ({fixed})", loc="left", fontsize=10.5)
                axes.set_xlabel(label)
                axes.set_ylabel("milliseconds")
        figure.suptitle(
            f"k-NN attention, exact: {results['heads']} heads of {results['features']} features, float32, "
            f"{machine['threads']} threads of {machine['processor']}, engine {machine['engine']}\n"
            "numbers at the red line: times faster than F.scaled_dot_product_attention in the same run",
            fontsize=10.5, x=0.01, ha="left",
        )  # fmt: skip
        figure.savefig(file, dpi=130)


if __name__ == "__main__":
    for measured in Path("benchmarks/results").glob("curves-*.json"):
        draw(json.loads(measured.read_text()), measured.with_suffix(".png"))
