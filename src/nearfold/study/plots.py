"""The plots of the pages, as inline SVG. matplotlib is imported when a plot is drawn, not before."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from nearfold.study.labels import Point, log_axis, name_points
from nearfold.study.table import Row, mean, spread

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

THEME = {
    "blue": "#2f6db3", "purple": "#8a5fb0", "orange": "#bf4f2c", "green": "#33815f", "gray": "#868686",
    "ink": "#22262b", "soft": "#5a5f66", "edge": "#888888", "grid": "#e7e7e7",
}  # fmt: skip
"""Colours by their name in page.css, which has others for a dark screen."""

FAMILIES = {
    "space": ("looks in space", "blue"),
    "between": ("between the ends", "purple"),
    "features": ("looks in features", "orange"),
    "both": ("both at once", "green"),
}
"""Where an operator stands on the spectrum: what the legend says, and its colour in `THEME`."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": THEME["edge"],
    "axes.labelcolor": THEME["ink"],
    "axes.axisbelow": True,
    "text.color": THEME["ink"],
    "text.parse_math": False,  # a name with dollar signs is a name
    "xtick.color": THEME["soft"],
    "ytick.color": THEME["ink"],
    "axes.grid": True,
    "grid.color": THEME["grid"],
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: any script, any size, read aloud
}


def svg(draw: Callable[[], Figure], label: str) -> Markup:
    """Draw a figure and return it as an `<svg>` element that asks for nothing outside itself, in the page's colours.

    Args:
        draw: makes the figure; runs under the report's style.
        label: what the picture shows, for those who cannot see it; also keeps the ids of two pictures apart.
    """
    import matplotlib
    from markupsafe import Markup

    text, label = io.StringIO(), plain(label, most=200)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text, not ours
        draw().savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", element, flags=re.DOTALL)
    element = re.sub(r"<[a-z][^>]*>", _themed, element)
    return Markup(element.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def _themed(tag: re.Match[str]) -> str:
    """A tag of the drawing with the page's variables for its colours; `>` does not occur in it, nor `<` in a text."""
    found = tag.group(0)
    for name, colour in THEME.items():
        found = found.replace(colour, f"var(--{name}, {colour})")
    return found


def plain(text: str, most: int = 40) -> str:
    r"""A text in one line for a figure, cut in the middle where it is long.

    >>> plain("a\n b"), plain("abcdefghij", most=5)
    ('a b', 'ab…ij')
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else text[: most // 2] + "…" + text[len(text) - (most - 1) // 2 :]


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
    panels: tuple[tuple[str, float, Callable[[Row], tuple[float, ...]]], ...] = (
        ("test accuracy, %", 0.0, lambda row: row.test),
        ("train minus test accuracy, points", -100.0, lambda row: row.gap),
    )
    for axis, (label, least, values_of) in zip(axes, panels, strict=True):
        for place, row in zip(places, rows, strict=True):
            values = [100 * v for v in values_of(row)]
            colour = _colour(row)
            axis.plot(values, [place] * len(values), "o", ms=3.2, color=colour, alpha=0.45, mew=0)
            arms = _arms(values, least)
            axis.errorbar(mean(values), place, xerr=arms, fmt="D", ms=5.5, color=colour, capsize=3, lw=1.4)
        axis.set_xlabel(label)
        axis.margins(y=0.5 / max(len(rows), 1))
    axes[1].axvline(0, color=THEME["edge"], lw=0.9)
    axes[0].set_yticks(list(places), [plain(row.title) for row in rows])
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
                cost(row), mean(values), yerr=_arms(values),
                fmt="o", ms=6, color=_colour(row), capsize=2.5, lw=1.0, elinewidth=0.8,
            )  # fmt: skip
        log_axis(axis, list(map(cost, rows)))
        axis.set(xlabel=label, ylabel="test accuracy, %")
        axis.margins(y=0.15)
    _legend(figure, rows)
    for axis, (_, cost) in zip(axes, panels, strict=True):
        centres = [(row, 100 * mean(row.test), 100 * (spread(row.test) or 0)) for row in rows]
        name_points(axis, [Point(cost(r), y, y - sd, y + sd, plain(r.title), _colour(r)) for r, y, sd in centres])
    return figure


def _arms(values: Sequence[float], least: float = 0.0) -> list[list[float]] | None:
    """One standard deviation to each side, at most to what a percentage can be; one seed has none."""
    sd = spread(values)
    return None if sd is None else [[min(sd, mean(values) - least)], [min(sd, 100 - mean(values))]]


def _colour(row: Row) -> str:
    return THEME[FAMILIES[row.family][1]]


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    used = [family for family in FAMILIES if any(row.family == family for row in rows)]
    handles = [Line2D([], [], marker="o", ls="", color=THEME[FAMILIES[f][1]], label=FAMILIES[f][0]) for f in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(used), frameon=False)
