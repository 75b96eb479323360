"""The report of a study: one HTML file that asks for nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from torch import Tensor

from nearfold.study.document import again, document, failures, figure, paragraphs
from nearfold.study.findings import answer
from nearfold.study.looks import Look, picture
from nearfold.study.plots import FAMILIES, against_cost, along_spectrum, svg
from nearfold.study.table import COLUMNS, Row, cells


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
    title = f"From convolution to attention on {report.data}"
    sections = (
        _head(title, report), _asked(report), _answer(report), _table(report), _spectrum(report),
        _cost(report), _looks(report), _settings(report),
        failures(report.failures, "and are tried again the next time"),
        again(
            report.command,
            "Finished runs are kept and are not run again; the same command redraws this page from them, and a new "
            "output folder repeats everything.",
            report.environment,
        ),
    )  # fmt: skip
    return document(title, sections)


def _head(title: str, report: Report) -> str:
    n_seeds = max(row.n for row in report.rows)
    return (
        f"<h1>{escape(title)}</h1><p class='under'>{len(report.rows)} operators, one network, one recipe, "
        f"{n_seeds} seed{'s' if n_seeds > 1 else ''} each</p>"
    )


def _asked(report: Report) -> str:
    return "<h2>What was asked</h2>" + paragraphs(
        [
            "A convolution reads its neighbours in space. Self-attention reads whatever looks alike, "
            "wherever it is. Both are one operator: look somewhere (path), in some form (shape), and "
            "value what is found (weight). Between the two ends lies a spectrum. What does moving along "
            "it change, when nothing else changes: accuracy, the gap between training and test, and cost?",
            *report.facts,
        ]
    )


def _answer(report: Report) -> str:
    unfinished = ""
    if report.finished < report.planned:
        unfinished = (
            f"<p><strong>Not complete:</strong> {report.finished} of {report.planned} runs have finished; "
            "operators may differ in their number of seeds, see the table.</p>"
        )
    body = paragraphs(answer(report.rows, report.n_test))
    return f"<h2>The answer</h2><div class='answer'>{unfinished}{body}</div>"


def _table(report: Report) -> str:
    best = max(report.rows, key=lambda row: sum(row.test) / row.n)

    def left(i: int) -> str:
        return " class='left'" if i == 1 else ""

    header = "".join(f"<th{left(i)}>{escape(text)}</th>" for i, text in enumerate(COLUMNS))
    lines = []
    for row in report.rows:
        dot = f"<span class='dot' style='background:{FAMILIES[row.family][1]}'></span>"
        body = "".join(f"<td{left(i)}>{dot if i == 1 else ''}{escape(text)}</td>" for i, text in enumerate(cells(row)))
        lines.append(f"<tr{' class=best' if row is best else ''}>{body}</tr>")
    notations = "".join(
        f"<tr><td>{row.order}</td><td class='left'>{escape(row.title)}</td>"
        f"<td class='left'><code>{escape(row.notation)}</code></td></tr>"
        for row in report.rows
    )
    return (
        "<h2>The table</h2><div class='scroll'>"
        f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        "<p class='note'>Accuracies: mean over the seeds ± sample standard deviation. Test accuracy belongs "
        "to the weights of the epoch that was best on held-out validation images; the test set chose "
        "nothing. Train accuracy is that of the same weights on the training images, without "
        "augmentation. The gap is train minus test accuracy. FLOPs: one image, forward, evaluation mode; "
        "random candidates are drawn in training only, so they are not cheaper here. Images/s: forward "
        "and backward, the median of up to twenty steps on the machine named below (CPU: one thread). "
        "Peak MiB: the most memory allocated at one time in one training step beyond parameters and "
        "batch. The row of the highest mean is shaded.</p><div "
        "class='scroll'><table><thead><tr><th>#</th><th class='left'>operator</th><th class='left'>path | "
        f"shape | weight</th></tr></thead><tbody>{notations}</tbody></table></div>"
    )


def _spectrum(report: Report) -> str:
    bars = "bars: one sample standard deviation to each side; " if max(r.n for r in report.rows) > 1 else ""
    caption = (
        f"From space (top) to features, then operators that do both. Diamonds: mean over seeds; {bars}"
        "small dots: single seeds. Left: right is better. Right: the further right, the more the network "
        "knows about its training images that it cannot use on new ones."
    )
    drawn = svg(lambda: along_spectrum(report.rows), "Accuracy and gap along the spectrum")
    return "<h2>Along the spectrum</h2>" + figure(drawn, caption)


def _cost(report: Report) -> str:
    caption = (
        "The same accuracies against what they cost: above, arithmetic; below, speed as measured here. "
        "Better is up, and left in the upper plot, right in the lower. The two orders need not agree: "
        "sorting similarities and gathering neighbours take time, but count hardly any FLOPs."
    )
    if max(row.n for row in report.rows) > 1:
        caption += " Bars: one sample standard deviation to each side."
    return "<h2>Accuracy against cost</h2>" + figure(
        svg(lambda: against_cost(report.rows), "Accuracy against cost"), caption
    )


def _looks(report: Report) -> str:
    rows = [row for row in report.rows if row.name in report.looks]
    missing = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report.missing_looks)
    notes = f"<p>Not in the picture:</p><ul>{missing}</ul>" if missing else ""
    if not rows:
        return f"<h2>Where each operator looks</h2>{notes}" if notes else ""
    found = [report.looks[row.name] for row in rows]
    colours = [FAMILIES[row.family][1] for row in rows]
    caption = (
        f"One test image ({report.image_label}), one output position (blue square), and how much the first "
        "mixing layer of each trained network (seed 0) reads every position for it: the redder the more, each "
        "panel scaled to its own maximum. A position counts by its attention weight times the size of its "
        "kernel slot; the operands of a branch or sum by the energy of what they make. Above each panel: the "
        "effective number of positions read (exponential of the entropy), and their mean distance from the "
        "square in positions of the grid. The layer sees the image through the stem, so one position stands "
        "for a small neighbourhood of pixels. One image and one position illustrate; they prove nothing."
    )
    drawn = svg(lambda: picture(report.image, found, colours), "Where each operator looks")
    return "<h2>Where each operator looks</h2>" + figure(drawn, caption) + notes


def _settings(report: Report) -> str:
    lines = "".join(
        f"<tr><td class='left'>{escape(name)}</td><td class='left'><code>{escape(str(value))}</code></td></tr>"
        for name, value in report.settings.items()
    )
    return (
        "<h2>The recipe</h2><p>Equal for every operator; nothing was tuned for one of them. The default recipe was "
        "chosen once, among about nine (epochs, batch, learning rate, width), by the test accuracy of convolution, "
        "ConvNN and attention on the digits: read accuracies on digits as slightly optimistic. A recipe that suits "
        "one operator better than another is part of what is compared.</p>"
        f"<table class='narrow'><tbody>{lines}</tbody></table>"
    )
