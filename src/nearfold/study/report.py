"""The page of the spectrum study: the verdict and the figure that shows it, then how, and every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nearfold.study.compare import signed
from nearfold.study.document import Cell, Chart, Line, Table, render
from nearfold.study.findings import answer, comparisons, conclusions, verdict
from nearfold.study.forest import Forest, Mark, ends, interval
from nearfold.study.looks import Look, picture
from nearfold.study.plots import FAMILIES, THEME, against_cost, along_spectrum, svg
from nearfold.study.table import COLUMNS, Row, cells, mean, seeds


@dataclass(frozen=True)
class Report:
    """All that the report says.

    Attributes:
        data: what the data is called.
        facts: what was trained on, in sentences.
        rows: one an operator with finished runs, in the order of the spectrum; at least one.
        n_test: number of test images.
        planned: number of runs that were asked for.
        finished: number of these that have finished.
        failures: (operator and seed, error) of runs that failed.
        image: the image of the picture, (C, H, W) uint8.
        image_label: what is on it.
        looks: what each operator reads of it, by the operator's name.
        missing_looks: (operator, reason) where the picture has none.
        settings: recipe and model, as a list of names and values.
        command: what makes this report again.
        environment: machine and versions, by name.
    """

    data: str
    facts: Sequence[str]
    rows: Sequence[Row]
    n_test: int
    planned: int
    finished: int
    image: Tensor
    image_label: str
    command: str
    looks: Mapping[str, Look]
    missing_looks: Sequence[tuple[str, str]] = ()
    failures: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def html(report: Report) -> str:
    """The report as one HTML document."""
    unfinished = ""
    if report.finished < report.planned:
        unfinished = (
            f"{report.finished} of {report.planned} runs have finished; operators may differ in their number of "
            "seeds, see the table."
        )
    return render(
        "spectrum.html.jinja",
        title=f"From convolution to attention on {report.data}",
        verdict=verdict(report.rows),
        unfinished=unfinished,
        forests=[_forest(report.rows)],
        operators=len(report.rows),
        seeds=seeds(max(row.n for row in report.rows)),
        limits=conclusions(report.rows, report.n_test),
        asked=[
            "A convolution reads its neighbours in space. Self-attention reads whatever looks alike, "
            "wherever it is. Both are one operator: look somewhere (path), in some form (shape), and "
            "value what is found (weight). Between the two ends lies a spectrum. What does moving along "
            "it change, when nothing else changes: accuracy, the gap between training and test, and cost?",
            *report.facts,
        ],
        answer=answer(report.rows),
        numbers=_numbers(report.rows),
        notations=_notations(report.rows),
        figures=_figures(report),
        settings=Table(
            "Recipe and network", ("setting", "value"),
            [Line([Cell(name), Cell(str(value), kind="left", code=True)]) for name, value in report.settings.items()],
            left=(0, 1),
        ),
        failures=report.failures,
        command=report.command,
        environment=report.environment,
    )  # fmt: skip


def _forest(rows: Sequence[Row]) -> Forest:
    reference, found = comparisons(rows)
    marks = []
    by_title = {d.row.title: d for d in found}
    for row in rows:
        if (d := by_title.get(row.title)) is not None:
            e = d.estimate
            texts = signed(e.mean), interval(e, signed)
            marks.append(Mark(row.title, 100 * e.mean, *ends(e), *texts, (), d.found, FAMILIES[row.family][1]))
        elif row is reference:
            marks.append(Mark(row.title, 0.0, None, None, f"{100 * mean(row.test):.1f} %", "reference", colour="gray"))
    return Forest(
        f"Test accuracy less that of {reference.title}, points",
        "points",
        "From space (top) to features, then operators that do both. Circles: mean differences, paired by seed, with "
        "95 % intervals, which one seed does not have; filled: found, after correction for the number of comparisons. "
        "Blue looks in space, orange in features, purple lies between, green does both.",
        marks,
        zero=0.0,
    )


def _numbers(rows: Sequence[Row]) -> Table:
    best = max(rows, key=lambda row: sum(row.test) / row.n)

    def line(row: Row) -> Line:
        texts = cells(row)
        dot = FAMILIES[row.family][1]
        return Line([Cell(text, dot=dot if i == 1 else "") for i, text in enumerate(texts)], best=row is best)

    return Table("Every operator", COLUMNS, [line(row) for row in rows], heads=1, left=(1,))


def _notations(rows: Sequence[Row]) -> Table:
    lines = [Line([Cell(str(r.order)), Cell(r.title), Cell(r.notation, kind="left wide", code=True)]) for r in rows]
    return Table("The operators in the notation", ("#", "operator", "path | shape | weight"), lines, 1, (1, 2))


def _figures(report: Report) -> list[tuple[str, list[Chart], list[str]]]:
    """Headings, the figures under them, and what is not in these."""
    bars = "bars: one sample standard deviation to each side; " if max(r.n for r in report.rows) > 1 else ""
    along = (
        f"From space (top) to features, then operators that do both. Diamonds: mean over seeds; {bars}"
        "small dots: single seeds. Left: right is better. Right: the further right, the more the network "
        "knows about its training images that it cannot use on new ones."
    )
    cost = (
        "The same accuracies against what they cost: above, arithmetic; below, speed as measured here. "
        "Better is up, and left in the upper plot, right in the lower. The two orders need not agree: "
        "sorting similarities and gathering neighbours take time, but count hardly any FLOPs."
    )
    if bars:
        cost += " Bars: one sample standard deviation to each side, at most to 0 and 100 %."

    figures: list[tuple[str, list[Chart], list[str]]] = [
        ("Along the spectrum", [_chart(lambda: along_spectrum(report.rows), "Accuracy and gap", along)], []),
        ("Accuracy against cost", [_chart(lambda: against_cost(report.rows), "Accuracy against cost", cost)], []),
    ]
    missing = [f"{name}: {why}" for name, why in report.missing_looks]
    looks = [_looks(report)] if report.looks else []
    return figures + ([("Where each operator looks", looks, missing)] if looks or missing else [])


def _chart(draw: Any, label: str, caption: str) -> Chart:
    return Chart(svg(draw, label), label, caption)


def _looks(report: Report) -> Chart:
    rows = [row for row in report.rows if row.name in report.looks]
    found = [report.looks[row.name] for row in rows]
    colours = [THEME[FAMILIES[row.family][1]] for row in rows]
    caption = (
        f"One test image ({report.image_label}), one output position (blue square), and how much the first "
        "mixing layer of each trained network (seed 0) reads every position for it: the redder the more, each "
        "panel scaled to its own maximum. A position counts by its attention weight times the size of its "
        "kernel slot; the operands of a branch or sum by the energy of what they make. Above each panel: the "
        "effective number of positions read (exponential of the entropy), and their mean distance from the "
        "square in positions of the grid. The layer sees the image through the stem, so one position stands "
        "for a small neighbourhood of pixels. One image and one position illustrate; they prove nothing."
    )
    return _chart(lambda: picture(report.image, found, colours), "Where each operator looks", caption)
