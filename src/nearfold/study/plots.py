"""The plots of the report, as inline SVG. matplotlib is imported when a plot is drawn, not before."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nearfold.study.table import Row, mean, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

FAMILIES = {
    "space": ("looks in space", "#2f6db3"),
    "between": ("between the ends", "#8a5fb0"),
    "features": ("looks in features", "#cf5a36"),
    "both": ("both at once", "#3f8f6b"),
}
"""Where an operator stands on the spectrum: what the legend says, and its colour."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#333333",
    "axes.grid": True,
    "grid.color": "#e7e7e7",
    "grid.linewidth": 0.8,
    "svg.fonttype": "path",
}


def svg(draw: Callable[[], Figure], label: str) -> str:
    """Draw a figure and return it as an `<svg>` element that asks for nothing outside itself.

    Args:
        draw: makes the figure; runs under the report's style.
        label: what the picture shows, for those who cannot see it; also keeps the ids of two pictures apart.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        draw().savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, that belongs to no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def along_spectrum(rows: Sequence[Row]) -> Figure:
    """Test accuracy and train-test gap of every operator, in the order of the spectrum, with error bars."""
    figure = new_figure(9.2, 1.3 + 0.34 * len(rows))
    axes = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    panels: tuple[tuple[str, Callable[[Row], tuple[float, ...]]], ...] = (
        ("test accuracy, %", lambda row: row.test),
        ("train minus test accuracy, points", lambda row: row.gap),
    )
    for axis, (label, values_of) in zip(axes, panels, strict=True):
        for place, row in zip(places, rows, strict=True):
            values = [100 * v for v in values_of(row)]
            colour = FAMILIES[row.family][1]
            axis.plot(values, [place] * len(values), "o", ms=3.2, color=colour, alpha=0.45, mew=0)
            axis.errorbar(mean(values), place, xerr=spread(values), fmt="D", ms=5.5, color=colour, capsize=3, lw=1.4)
        axis.set_xlabel(label)
        axis.margins(y=0.5 / max(len(rows), 1))
    axes[1].axvline(0, color="#999999", lw=0.9)
    axes[0].set_yticks(list(places), [row.title for row in rows])
    axes[0].invert_yaxis()
    _legend(figure, rows)
    return figure


def against_cost(rows: Sequence[Row]) -> Figure:
    """Test accuracy against FLOPs per image, and against images per second, both on a log axis."""
    figure = new_figure(9.2, 8.0)
    axes = figure.subplots(2, 1, sharey=True)
    panels: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("FLOPs per image, forward (log scale): less is better", lambda row: row.flops),
        (
            "images per second, forward and backward (log scale): more is better",
            lambda r: r.images_per_second,
        ),
    )
    for axis, (label, cost) in zip(axes, panels, strict=True):
        for row in rows:
            values = [100 * v for v in row.test]
            axis.errorbar(
                cost(row), mean(values), yerr=spread(values),
                fmt="o", ms=6, color=FAMILIES[row.family][1], capsize=2.5, lw=1.0, elinewidth=0.8,
            )  # fmt: skip
        low, high = min(map(cost, rows)), max(map(cost, rows))
        room = (high / low) ** 0.12 if high > low else 1.5
        axis.set(xscale="log", xlim=(low / room, high * room), xlabel=label, ylabel="test accuracy, %")
        ticks = list(_log_ticks(low / room, high * room))
        axis.set_xticks(ticks, [_short(tick) for tick in ticks])
        axis.minorticks_off()
        axis.margins(y=0.15)
    _legend(figure, rows)
    figure.draw_without_rendering()  # the layout must stand before labels are placed by their pixels
    figure.set_layout_engine("none")
    for axis, (_, cost) in zip(axes, panels, strict=True):
        _label_points(axis, [(cost(row), row) for row in rows])
    return figure


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    used = [family for family in FAMILIES if any(row.family == family for row in rows)]
    handles = [Line2D([], [], marker="o", ls="", color=FAMILIES[f][1], label=FAMILIES[f][0]) for f in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(used), frameon=False)


def _short(value: float) -> str:
    """A round number with a unit: 2500000 is 2.5M."""
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, ""))
    return f"{value / scale:g}{unit}"


def _log_ticks(low: float, high: float) -> Iterator[float]:
    """1, 2 and 5 times powers of ten inside [low, high]; in a narrow range also the multiples between."""
    steps = (1.0, 2.0, 5.0) if high / low > 4 else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (step * 10.0**power for step in steps if low <= step * 10.0**power <= high)


def _label_points(axis: Axes, points: Sequence[tuple[float, Row]]) -> None:
    """Write every title where it covers no other title, point or bar: the nearest free place."""
    from matplotlib.transforms import Bbox

    renderer = axis.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axis.get_window_extent(renderer)
    pixels = {}
    taken: list[Bbox] = []
    for x, row in points:
        centre, sd = 100 * mean(row.test), 100 * (spread(row.test) or 0)
        (px, low), (_, py), (_, high) = axis.transData.transform([(x, centre + d) for d in (-sd, 0, sd)])
        pixels[row.name] = px, py
        taken.append(Bbox.from_bounds(px - 5, py - 5, 10, 10))
        taken.append(Bbox.from_extents(px - 3, low - 1, px + 3, high + 1))
    scale = 72 / axis.figure.dpi
    for x, row in sorted(points, key=lambda point: -mean(point[1].test)):
        at, (px, py) = (x, 100 * mean(row.test)), pixels[row.name]
        trial = axis.annotate(row.title, at, fontsize=8.5)
        size = trial.get_window_extent(renderer)
        trial.remove()
        dx, dy = _free_place(px, py, size.width, size.height, taken, frame)
        taken.append(Bbox.from_bounds(px + dx, py + dy, size.width, size.height))
        near = max(dx, -dx - size.width, dy, -dy - size.height) < 12
        axis.annotate(
            row.title, at, xytext=(dx * scale, dy * scale), textcoords="offset points", fontsize=8.5,
            color=FAMILIES[row.family][1],
            arrowprops=None if near else {"arrowstyle": "-", "color": "#aaaaaa", "lw": 0.7, "shrinkB": 3},
        )  # fmt: skip


def _free_place(
    px: float, py: float, width: float, height: float, taken: Sequence[Bbox], frame: Bbox
) -> tuple[float, float]:
    """Offset in pixels of a label's lower left corner from its point: the nearest one that is free."""
    from matplotlib.transforms import Bbox

    for radius in range(9, 140, 6):
        for degrees in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160):
            angle = math.radians(degrees)
            cx = px + math.cos(angle) * (radius + width / 2)
            cy = py + math.sin(angle) * (radius + height / 2)
            box = Bbox.from_bounds(cx - width / 2 - 1, cy - height / 2 - 1, width + 2, height + 2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                return box.x0 + 1 - px, box.y0 + 1 - py
    return 9.0, -height / 2
