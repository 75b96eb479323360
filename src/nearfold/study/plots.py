"""The plots of the pages, as inline SVG. matplotlib is imported when a plot is drawn, not before."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

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
"""Where an operator stands between space and features: what a legend says, and its colour in `THEME`."""

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
