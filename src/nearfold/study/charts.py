"""The figures of a study's page, as inline SVG: every point tells its numbers when pointed at."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from nearfold.study.authors import Points
from nearfold.study.catalogue.readings import COSTS, complexity, front, scores
from nearfold.study.compare import accuracy, differences, points
from nearfold.study.document import Chart, first, seeds
from nearfold.study.labels import Point, log_axis, name_points
from nearfold.study.looks import Looks, picture
from nearfold.study.plots import FAMILIES, THEME, new_figure, plain, svg
from nearfold.study.results import Results, Row
from nearfold.study.statistics import Estimate

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, TRAIN, THEIRS, FRONT = (THEME[name] for name in ("blue", "orange", "gray", "green"))


@dataclass
class Tips:
    """Texts for points: given to an artist here, put into the SVG once it is drawn."""

    texts: list[str] = field(default_factory=list)

    def add(self, artist: Any, text: str) -> None:
        """Let an artist, or all parts of a container, say a text."""
        from matplotlib.container import Container

        parts: Sequence[Any] = artist.get_children() if isinstance(artist, Container) else [artist]
        for part in parts:
            part.set_gid(f"tip-{len(self.texts)}")
            self.texts.append(text)

    def into(self, drawn: str) -> Markup:
        """The SVG with a title in every group that has a text, which takes the place of its id."""
        from markupsafe import Markup

        def title(match: re.Match[str]) -> str:
            return f"<g><title>{escape(self.texts[int(match.group(1))])}</title>"

        return Markup(re.sub(r'<g id="tip-(\d+)">', title, drawn))


def draw(results: Results, authors: Sequence[Points]) -> list[Chart]:
    """The figures of a study."""
    return CHARTS[results.study.figure](results, authors)


def _chart(make: Callable[[Tips], Figure], label: str, caption: str) -> Chart:
    tips = Tips()
    return Chart(tips.into(svg(lambda: make(tips), label)), label, caption)


def _arms(e: Estimate) -> list[list[float]] | None:
    """The arms of an error bar, in percent or points; one seed has none."""
    return None if math.isnan(e.low) else [[100 * arm] for arm in e.arms]


def _settings(results: Results, authors: Sequence[Points]) -> list[Chart]:
    """Accuracy at every setting, and the difference to the reference."""
    charts = []
    for name, rows in results.panels.items():
        base = results.study.reference_on(name)
        caption = (
            f"{name}. Above: accuracy on test images (blue) and, of the same weights, on training images (orange): "
            "diamonds are means over seeds with 95 % intervals, dots single seeds. Below: test accuracy less that of "
            f"the reference ({results.study.axis} = {_short(base)}), paired by seed, with 95 % "
            "intervals; where one does not touch the line there is a difference before correction for the number of "
            "comparisons."
        )
        reference = results.reference(rows)
        theirs = [(p.text, p.differences(base)) for p in authors if p.data == name]
        theirs = [(text, found) for text, found in theirs if found and reference is not None]
        for text, _ in theirs:
            caption += (
                f" Gray circles: {text}, likewise less the mean of theirs at the reference; another network and "
                "recipe. Triangles: beyond the axis."
            )
        charts.append(_chart(partial(_two_panels, results, rows, theirs), f"{name}, by setting", caption))
    return charts


def _two_panels(
    results: Results, rows: Sequence[Row], theirs: Sequence[tuple[str, dict[Any, list[float]]]], tips: Tips
) -> Figure:
    axis = results.study.axis
    figure = new_figure(9.2, 6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = {row.trial.labels[axis]: place for place, row in enumerate(rows)}
    for row in rows:
        place = places[row.trial.labels[axis]]
        for measure, colour, shift in (("train_accuracy", TRAIN, 0.12), ("test_accuracy", OURS, -0.12)):
            _mean(above, place + shift, row, measure, colour, tips)
    reference = results.reference(rows)
    if reference is not None:
        below.axhline(0, color=THEME["edge"], lw=1)
        for d in differences(rows, reference):
            e = d.estimate
            place = places[d.row.trial.labels[axis]]
            bars = below.errorbar(place, 100 * e.mean, yerr=_arms(e), fmt="D", ms=5.5, color=OURS, capsize=3)
            tips.add(bars, f"{d.row.title}: {points(e)}; adjusted p = {d.p:.3g}")
    for _, found in theirs:
        for value in (value for value in found if value in places):
            _beside(below, places[value] + 0.16, f"the authors, {_short(value)}", found[value], tips)
    above.set_ylabel("accuracy, %")
    below.set_ylabel("test accuracy less\nthe reference's, points")
    labels = [_short(value) for value in places]
    crowded = max(map(len, labels)) * len(labels) > 90
    below.set_xticks(list(places.values()), labels, rotation=25 if crowded else 0, ha="right" if crowded else "center")
    below.set_xlabel(plain(axis))
    return figure


def _mean(axes: Axes, place: float, row: Row, measure: str, colour: str, tips: Tips, *, across: bool = False) -> None:
    """A row's mean with its interval, and its seeds, upward or across, at a place on the other axis."""
    e, values = row.estimate(measure), [100 * v for v in row.values(measure).values()]
    dots, spot = [(place, value) for value in values], (place, 100 * e.mean)
    if across:
        dots, spot = [(y, x) for x, y in dots], spot[::-1]
    arms: dict[str, Any] = {"xerr" if across else "yerr": _arms(e)}
    axes.plot(*zip(*dots, strict=True), "o", ms=3.2, color=colour, alpha=0.45, mew=0)
    bars = axes.errorbar(*spot, **arms, fmt="D", ms=5.5, color=colour, capsize=3, lw=1.4)
    tips.add(bars, f"{row.title}, {measure.replace('_', ' ')}: {accuracy(e)}, {seeds(e.n)}")


def _beside(axes: Axes, place: float, title: str, values: Sequence[float], tips: Tips) -> None:
    """The authors' runs, in points; the axis stays as it is, and triangles at its ends point to what is beyond."""
    low, high = axes.get_ylim()
    said = f"{title}: " + ", ".join(f"{v:+.1f}" for v in values) + " points"
    for value in values:
        marker = "v" if value < low else "^" if value > high else "o"
        edge = 0.03 * (high - low)
        (spot,) = axes.plot([place], [min(max(value, low + edge), high - edge)], marker, ms=5, mfc="none", color=THEIRS)
        tips.add(spot, said)
    axes.set_ylim(low, high)


def _short(value: float | str) -> str:
    return plain(value) if isinstance(value, str) else f"{value:g}"


def _gaps(results: Results, authors: Sequence[Points]) -> list[Chart]:
    """The gap of every operator, and the gap against complexity."""
    charts = []
    for name, rows in results.panels.items():
        ranked = sorted(rows, key=lambda row: row.mean("gap_last"))
        label = "train minus test accuracy of the last weights, points (less is better)"
        charts.append(
            _chart(
                partial(_bars, ranked, {"gap_last": label}, lambda row: OURS if row.memorised else THEIRS),
                f"{name}: gaps",
                f"{name}. Diamonds: means over seeds with 95 % intervals; dots: single seeds. Gray: operators that "
                "did not memorise their images with every seed, whose gaps are not comparable.",
            )
        )
        there = [row for row in rows if row.memorised]
        if len(there) > 2:
            charts.append(
                _chart(
                    partial(_against_complexity, there),
                    f"{name}: gap against complexity",
                    f"{name}. The mean gap of the operators that memorised, against descriptive complexity C_D, the "
                    "millions of parameters that generate behaviour C_P, and Omega = C_D + C_P, of their two "
                    "layers; names where there is room.",
                )
            )
    return charts


def _bars(rows: Sequence[Row], measures: Mapping[str, str], colour: Callable[[Row], str], tips: Tips) -> Figure:
    """A line for every row, in as many columns as there are measures: label by name."""
    figure = new_figure(9.2, 1.2 + 0.36 * len(rows))
    columns = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (measure, label) in zip(columns, measures.items(), strict=True):
        for place, row in enumerate(rows):
            _mean(axes, place, row, measure, colour(row), tips, across=True)
        axes.set_xlabel(label)
    columns[0].set_yticks(range(len(rows)), [plain(row.title) for row in rows])
    columns[0].invert_yaxis()
    return figure


def _against_complexity(rows: Sequence[Row], tips: Tips) -> Figure:
    figure = new_figure(9.2, 9.0)
    panels = dict(zip(("C_D", "C_P", "Omega"), figure.subplots(3, 1, sharey=True), strict=True))
    for name, axes in panels.items():
        for row in rows:
            e, value = row.estimate("gap_last"), complexity(row)[name]
            spot = axes.errorbar(value, 100 * e.mean, yerr=_arms(e), fmt="o", ms=5, color=OURS, lw=0.8)
            tips.add(spot, f"{row.title}: {name} {value:.3g}, gap {accuracy(e)}")
        axes.margins(x=0.15, y=0.15)
        axes.set_xlabel(name + (" (millions)" if name == "C_P" else ""))
        axes.set_ylabel("gap, points")
    for name, axes in panels.items():
        name_points(axes, [_point(row, complexity(row)[name], row.estimate("gap_last")) for row in rows])
    return figure


def _point(row: Row, x: float, e: Estimate, colour: str = THEME["ink"]) -> Point:
    low, high = (e.mean, e.mean) if math.isnan(e.low) else (e.low, e.high)
    return Point(x, 100 * e.mean, 100 * low, 100 * high, plain(row.title), colour)


def _ranking(results: Results, authors: Sequence[Points]) -> list[Chart]:
    """Accuracy and score of every operator, by score."""
    return [
        _chart(
            partial(_scores, rows),
            f"{name}: scores",
            f"{name}. By score, best first. Left: test accuracy, means with 95 % intervals over seeds. Right: "
            "GWO's score and tier.",
        )
        for name, rows in results.panels.items()
    ]


def _scores(rows: Sequence[Row], tips: Tips) -> Figure:
    table = scores(rows)
    figure = new_figure(9.2, 1.4 + 0.25 * len(table))
    left, right = figure.subplots(1, 2, sharey=True)
    for place, s in enumerate(table):
        _mean(left, place, s.row, "test_accuracy", OURS, tips, across=True)
        bar = right.barh(place, s.score, color=OURS, height=0.6)
        tips.add(bar[0], f"{s.row.title}: score {s.score:.0f}, tier {s.tier}, Omega {s.omega:.3g}")
        text = f"{s.score:.0f} {s.tier}"
        right.annotate(text, (s.score, place), xytext=(4, -3), textcoords="offset points", fontsize=7.5)
    left.set_yticks(range(len(table)), [plain(s.row.title) for s in table], fontsize=8.5)
    left.invert_yaxis()
    left.set_xlabel("test accuracy, %")
    right.set_xlabel("score = 100 accuracy / (1 + Omega)")
    right.margins(x=0.15)
    return figure


AXES = {
    "latency_ms": "milliseconds for one image, forward",
    "flops": "FLOPs for one image, forward",
    "peak_memory_mib": "MiB, most in one training step",
    "images_per_second": "images per second, forward and backward",
}
"""What is written along a cost; of the last, more is better."""


def _costs(results: Results, authors: Sequence[Points]) -> list[Chart]:
    """Accuracy against latency, FLOPs and memory, with the Pareto fronts."""
    return [
        _chart(
            partial(_against_cost, there, cost, lambda row: OURS, front(there, cost)),
            f"{name}: {text}",
            f"{name}: test accuracy against {text}, means with 95 % intervals over seeds. Green: "
            "settings that no other one beats in held-out accuracy at that cost or less. "
            "Names where there is room; every point says its own when pointed at.",
        )
        for name, rows in results.panels.items()
        if (there := [row for row in rows if row.cost])
        for cost, text in COSTS.items()
    ]


def _against_cost(
    rows: Sequence[Row], cost: str, colour: Callable[[Row], str], best: Sequence[Row], tips: Tips
) -> Figure:
    """Test accuracy against a cost; the best ones, joined by a line, in another colour."""
    figure = new_figure(9.2, 3.9)
    axes = figure.subplots()
    named = []
    for row in rows:
        e, x, own = row.estimate("test_accuracy"), row.cost[cost], FRONT if row in best else colour(row)
        spot = axes.errorbar(x, 100 * e.mean, yerr=_arms(e), fmt="D" if row in best else "o", ms=6, color=own, lw=1)
        tips.add(spot, f"{row.title}: {accuracy(e)}, {x:.4g} {AXES[cost]}")
        named.append(_point(row, x, e, own))
    line = [(row.cost[cost], 100 * row.mean("test_accuracy")) for row in best]
    if line:
        axes.plot(*zip(*line, strict=True), color=FRONT, lw=1)
    axes.set(xlabel=f"{AXES[cost]} (log scale)", ylabel="test accuracy, %")
    log_axis(axes, [row.cost[cost] for row in rows])
    axes.margins(y=0.12)
    name_points(axes, named, line)
    return figure


def family(results: Results, row: Row) -> str:
    """The name of a row's colour, by its family; empty where it has none."""
    name = results.study.families.get(row.trial.labels[results.study.axis])
    return "" if name is None else FAMILIES[name][1]


def _colour(results: Results, row: Row) -> str:
    return THEME[family(results, row) or "blue"]


def legend(results: Results) -> str:
    """What the colours of the families mean."""
    there = [name for name in FAMILIES if name in results.study.families.values()]
    return first(", ".join(f"{FAMILIES[name][1]} {FAMILIES[name][0]}" for name in there)) + "."


def _spectrum(results: Results, authors: Sequence[Points]) -> list[Chart]:
    """Accuracy and gap in the order of the study, then accuracy against what it costs, coloured by family."""
    charts, colour = [], partial(_colour, results)
    measures = {"test_accuracy": "test accuracy, %", "gap": "train minus test accuracy, points"}
    for name, rows in results.panels.items():
        caption = (
            f"{name}, along the spectrum: from space (top) to features, then operators that do both. Diamonds: means "
            f"over seeds with 95 % intervals; dots: single seeds. {legend(results)} Left: right is better. Right: the "
            "further right, the more the network knows about its training images that it cannot use on new ones."
        )
        charts.append(_chart(partial(_bars, rows, measures, colour), f"{name}: along the spectrum", caption))
        there = [row for row in rows if row.cost]
        for cost, what, better in (("flops", "FLOPs", "left"), ("images_per_second", "speed", "right")):
            caption = (
                f"{name}: accuracy against {what}: better is up, and {better}. Means with 95 % intervals over seeds. "
                f"{legend(results)} The orders by FLOPs and by speed need not agree: sorting similarities and "
                "gathering neighbours take time, but count hardly any FLOPs."
            )
            if there:
                drawn = partial(_against_cost, there, cost, colour, ())
                charts.append(_chart(drawn, f"{name}: accuracy against {what}", caption))
    return charts


def looks(results: Results, seen: Looks) -> Chart:
    """Where every setting looks."""
    by_title = {row.title: _colour(results, row) for row in results.rows}
    colours = [by_title.get(look.title, THEME["ink"]) for look in seen.found]
    label = "Where each operator looks"
    caption = (
        f"{label}. One test image ({seen.label}), one output position (blue square), and how much the first mixing "
        "layer of each trained network (seed 0) reads every position for it: the redder the more, each panel scaled to "
        "its own maximum. A position counts by its attention weight times the size of its kernel slot; the operands of "
        "a branch or sum by the energy of what they make. Above each panel: the effective number of positions read "
        "(exponential of the entropy), and their mean distance from the square in positions of the grid. The layer "
        "sees the image through the stem, so one position stands for a small neighbourhood of pixels. One image and "
        "one position illustrate; they prove nothing."
    )
    return Chart(svg(lambda: picture(seen, colours), label), label, caption)


NOTHING = 10.0
"""Points between the lowest and the highest of a row below which its colours fade: not to paint chance."""


def _matrix(results: Results, authors: Sequence[Points]) -> list[Chart]:
    """Accuracy of every setting on every data set, as a map of colours."""
    label = f"Test accuracy by {results.study.axis} and data"
    caption = (
        f"{label}, in percent: means over seeds. Every row is coloured from its lowest to its highest accuracy, less "
        "where these are close, so that colours compare operators on a task, not tasks. Bold: not found worse than the "
        "best of the row (paired by seed, Holm's adjusted p below 0.05)."
    )
    return [_chart(partial(_colours, results), label, caption)]


def _colours(results: Results, tips: Tips) -> Figure:
    from nearfold.study.catalogue.aligned import level

    panels, axis = results.panels, results.study.axis
    titles = list(dict.fromkeys(row.title for rows in panels.values() for row in rows))
    figure = new_figure(9.2, 1.9 + 0.29 * len(panels))
    axes = figure.subplots()
    for y, rows in enumerate(panels.values()):
        means = [100 * row.mean("test_accuracy") for row in rows]
        low, high, good = min(means), max(means), level(rows)
        for row, mean in zip(rows, means, strict=True):
            share = (mean - low) / max(high - low, NOTHING)
            x = titles.index(row.title)
            cell = axes.barh(y, 0.96, left=x - 0.48, height=0.92, color=OURS, alpha=0.06 + 0.6 * share, lw=0)
            tips.add(cell, f"{row.trial.panel}, {row.title}: {accuracy(row.estimate('test_accuracy'))}")
            weight = "bold" if row.title in good else "normal"
            axes.text(x, y, f"{mean:.0f}", ha="center", va="center", fontsize=7.5, weight=weight, color=THEME["ink"])
    axes.set_xticks(range(len(titles)), [plain(title) for title in titles], rotation=40, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(panels)), [plain(name) for name in panels], fontsize=8.5)
    axes.set(xlim=(-0.6, len(titles) - 0.4), ylim=(len(panels) - 0.4, -0.6))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(visible=False)
    axes.set_xlabel(plain(axis))
    return figure


CHARTS: dict[str, Callable[[Results, Sequence[Points]], list[Chart]]] = {
    "settings": _settings,
    "gaps": _gaps,
    "ranking": _ranking,
    "costs": _costs,
    "spectrum": _spectrum,
    "matrix": _matrix,
}
"""Figures by the name that a study gives."""
