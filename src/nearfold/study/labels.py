"""Names beside the points of a plot, where they cover nothing, and axes on a log scale with round numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

SIZE, ROOM = 8.5, 3
"""Of the letters, in points; around a name, in pixels."""


class Point(NamedTuple):
    """A point with its bar and its name, in the units of the axes."""

    x: float
    y: float
    low: float
    high: float
    name: str
    colour: str


def name_points(axes: Axes, points: Sequence[Point], line: Sequence[tuple[float, float]] = ()) -> None:
    """Write every name at the nearest place where it covers nothing; where there is none, leave it out.

    The layout of the figure is fixed by this.

    Args:
        axes: of the points.
        points: with their names.
        line: corners of a line through some of them.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout must stand before names are placed by their pixels
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    corners = [tuple(corner) for corner in axes.transData.transform(list(line))] if line else []
    taken = [box for start, end in itertools.pairwise(corners) for box in _boxes(start, end)]
    pixels = []
    for p in points:
        (px, low), (_, py), (_, high) = axes.transData.transform([(p.x, p.low), (p.x, p.y), (p.x, p.high)])
        pixels.append((px, py))
        taken.append(Bbox.from_bounds(px - 5, py - 5, 10, 10))
        taken.append(Bbox.from_extents(px - 3, low - 1, px + 3, high + 1))
    scale = 72 / figure.dpi
    named: list[Bbox] = []
    for p, (px, py) in sorted(zip(points, pixels, strict=True), key=lambda pair: -pair[0].y):
        trial = axes.annotate(p.name, (p.x, p.y), fontsize=SIZE)
        size = trial.get_window_extent(renderer)
        trial.remove()
        for box in _places(px, py, 1.06 * size.width + 2 * ROOM, size.height + 2 * ROOM):  # fonts differ
            near = max(box.x0 - px, px - box.x1, box.y0 - py, py - box.y1) < 12
            leader = [] if near else _boxes((px, py), ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            crossed = any(a.overlaps(b) for a in leader for b in named)
            if inside and not crossed and not any(box.overlaps(o) for o in (*taken, *named)):
                break
        else:
            continue
        named.append(box)
        taken += leader
        axes.annotate(
            p.name, (p.x, p.y), xytext=((box.x0 + ROOM - px) * scale, (box.y0 + ROOM - py) * scale),
            textcoords="offset points", fontsize=SIZE, color=p.colour,
            arrowprops=None if near else {"arrowstyle": "-", "color": "#888888", "lw": 0.7, "shrinkB": 3},
        )  # fmt: skip


def _places(px: float, py: float, width: float, height: float) -> Iterator[Bbox]:
    """Where a name of a size in pixels may stand, the nearest to its point first."""
    from matplotlib.transforms import Bbox

    for radius in range(7, 140, 6):
        for degrees in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160):
            angle = math.radians(degrees)
            cx = px + math.cos(angle) * (radius + width / 2)
            cy = py + math.sin(angle) * (radius + height / 2)
            yield Bbox.from_bounds(cx - width / 2, cy - height / 2, width, height)


def _boxes(start: Sequence[float], end: Sequence[float]) -> list[Bbox]:
    """A line between two points as a chain of small boxes."""
    from matplotlib.transforms import Bbox

    steps = max(1, int(math.dist(start, end) / 4))
    at = [[a + (b - a) * i / steps for a, b in zip(start, end, strict=True)] for i in range(steps + 1)]
    return [Bbox.from_bounds(x - 1.5, y - 1.5, 3, 3) for x, y in at]


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Put the x axis on a log scale around positive values, with round numbers where there is room for them."""
    low, high = min(values), max(values)
    room = (high / low) ** 0.12 if high > 1.001 * low else 1.5
    low, high = low / room, high * room
    ticks = list(log_ticks(low, high))
    axes.set(xscale="log", xlim=(low, high))
    axes.set_xticks(ticks, [short(tick) for tick in ticks])
    axes.minorticks_off()


def log_ticks(low: float, high: float) -> Iterator[float]:
    """1, 2 and 5 times powers of ten inside [low, high]; in a narrow range also the multiples between.

    >>> list(log_ticks(0.9, 12))
    [1.0, 2.0, 5.0, 10.0]
    """
    steps = (
        (1.0,)
        if high / low > 3e3
        else (1.0, 2.0, 5.0)
        if high / low > 4
        else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    )
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (step * 10.0**power for step in steps if low <= step * 10.0**power <= high)


def short(value: float) -> str:
    """A round number with a unit.

    >>> short(2_500_000), short(0.5)
    ('2.5M', '0.5')
    """
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, ""))
    return f"{value / scale:g}{unit}"
