"""The report of a study: one HTML file that asks for nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from torch import Tensor

from nearfold.study.findings import answer
from nearfold.study.looks import Look, picture
from nearfold.study.plots import FAMILIES, against_cost, along_spectrum, svg
from nearfold.study.table import COLUMNS, Row, cells

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f4f1; color: #22262b; font: 16px/1.6 "Source Sans 3", "Segoe UI",
  "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 44px 48px 60px; background: #fff; }
h1 { font-size: 31px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.3px; }
h2 { font-size: 20px; margin: 42px 0 8px; padding-top: 14px; border-top: 1px solid #e3e3de; }
p, ul { max-width: 76ch; margin: 10px 0; }
.under { color: #666; margin-top: 0; }
.answer { background: #f6f8fb; border-left: 4px solid #2f6db3; padding: 8px 20px; margin: 14px 0; }
.answer p { max-width: none; }
code { font: 13px/1.5 "DejaVu Sans Mono", Menlo, Consolas, monospace; background: #f3f3ef;
  padding: 1px 4px; border-radius: 3px; }
pre { background: #f3f3ef; padding: 12px 16px; overflow-x: auto; border-radius: 4px; }
pre code { padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 12px 0; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #444; padding: 5px 8px;
  vertical-align: bottom; line-height: 1.3; }
td { text-align: right; padding: 5px 8px; border-bottom: 1px solid #e8e8e4; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th.left, td.left { text-align: left; }
td code { white-space: normal; }
table.narrow { width: auto; }
table.narrow td { padding: 3px 28px 3px 0; }
td code { white-space: normal; }
table.narrow { width: auto; }
table.narrow td { padding: 3px 28px 3px 0; }
tr.best td { background: #eef4ea; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }
.scroll { overflow-x: auto; }
figure { margin: 14px 0 6px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, .note { color: #555; font-size: 14.5px; line-height: 1.5; max-width: 84ch; margin-top: 8px; }
.failed { background: #fdf1ee; border-left: 4px solid #c8402a; padding: 8px 20px; }
footer { color: #777; font-size: 13.5px; margin-top: 40px; border-top: 1px solid #e3e3de; padding-top: 12px; }
@media (max-width: 720px) { main { padding: 24px 18px; } }
"""


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
        _cost(report), _looks(report), _settings(report), _failures(report), _again(report),
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _head(title: str, report: Report) -> str:
    n_seeds = max(row.n for row in report.rows)
    return (
        f"<h1>{escape(title)}</h1><p class='under'>{len(report.rows)} operators, one network, one recipe, "
        f"{n_seeds} seed{'s' if n_seeds > 1 else ''} each</p>"
    )


def _asked(report: Report) -> str:
    return "<h2>What was asked</h2>" + _paragraphs(
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
    body = _paragraphs(answer(report.rows, report.n_test))
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


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _spectrum(report: Report) -> str:
    bars = "bars: one sample standard deviation to each side; " if max(r.n for r in report.rows) > 1 else ""
    caption = (
        f"From space (top) to features, then operators that do both. Diamonds: mean over seeds; {bars}"
        "small dots: single seeds. Left: right is better. Right: the further right, the more the network "
        "knows about its training images that it cannot use on new ones."
    )
    drawn = svg(lambda: along_spectrum(report.rows), "Accuracy and gap along the spectrum")
    return "<h2>Along the spectrum</h2>" + _figure(drawn, caption)


def _cost(report: Report) -> str:
    caption = (
        "The same accuracies against what they cost: above, arithmetic; below, speed as measured here. "
        "Better is up, and left in the upper plot, right in the lower. The two orders need not agree: "
        "sorting similarities and gathering neighbours take time, but count hardly any FLOPs."
    )
    if max(row.n for row in report.rows) > 1:
        caption += " Bars: one sample standard deviation to each side."
    return "<h2>Accuracy against cost</h2>" + _figure(
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
    return "<h2>Where each operator looks</h2>" + _figure(drawn, caption) + notes


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


def _failures(report: Report) -> str:
    if not report.failures:
        return ""
    items = "".join(f"<li>{escape(name)}: <code>{escape(error)}</code></li>" for name, error in report.failures)
    return (
        "<h2>Runs that failed</h2><div class='failed'><p>They are in no table and no plot, and are tried "
        f"again the next time:</p><ul>{items}</ul></div>"
    )


def _again(report: Report) -> str:
    machine = " · ".join(f"{name} {value}" for name, value in report.environment.items())
    return (
        f"<h2>To reproduce</h2><pre><code>{escape(report.command)}</code></pre><p>Finished runs are kept and "
        "are not run again; the same command redraws this page from them, and a new output folder repeats "
        f"everything.</p><footer>{escape(machine)}</footer>"
    )
