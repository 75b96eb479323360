"""What a study leaves behind for people: runs.csv, results.json, summary.md and report.html in a folder of its own."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

from nearfold.study import page
from nearfold.study.compare import MEASURE, accuracy, differences, points
from nearfold.study.document import markdown
from nearfold.study.headline import verdict
from nearfold.study.record import RUN, Record
from nearfold.study.results import Results
from nearfold.study.store import write_each


def leave(record: Record, folder: Path) -> list[Path]:
    """Write what has finished: first the numbers, last the page, so that a page that cannot be drawn loses nothing.

    Args:
        record: the study and its runs.
        folder: where.

    Returns:
        The paths written.

    Raises:
        ValueError: a file could not be made.
    """
    results = record.results
    return write_each(
        {
            folder / "runs.csv": lambda: _csv(results),
            folder / "results.json": lambda: record.to_json(page.answer(results), verdict(results)),
            **views(record, folder),
        }
    )


def views(record: Record, folder: Path) -> dict[Path, Callable[[], str]]:
    """What makes summary.md and report.html, by their paths."""
    return {
        folder / "summary.md": lambda: summary(record.results),
        folder / "report.html": lambda: page.html(
            record.results,
            facts=record.facts,
            command=record.command,
            environment=record.environment,
            authors=record.authors,
            missing=record.missing,
        ),
    }


def summary(results: Results) -> str:
    """The answer and the table, in Markdown."""
    study = results.study
    texts = [f"**{markdown(verdict(results))}**", study.question, f"Published: {study.claim}", *page.answer(results)]
    lines = [f"# {markdown(study.title)}", ""]
    lines += [line for i, text in enumerate(texts) for line in (text if i == 0 else markdown(text), "")]
    measure = study.measure
    for name, rows in results.panels.items():
        reference = results.reference(rows)
        against = {d.row.title: d for d in differences(rows, reference, measure)} if reference is not None else {}
        lines += [
            f"| {markdown(name)} | {'gap' if measure != MEASURE else 'test accuracy'} | less the reference's | "
            "adjusted p | seeds |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in rows:
            d = against.get(row.title)
            difference = ("", "") if d is None else (points(d.estimate), "" if math.isnan(d.p) else f"{d.p:.3g}")
            lines.append(
                f"| {markdown(row.title)} | {accuracy(row.estimate(measure))} | {' | '.join(difference)} | "
                f"{len(row.results)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _csv(results: Results) -> str:
    axes = list(dict.fromkeys(axis for row in results.rows for axis in row.trial.labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, "seed", *RUN])
    for row in results.rows:
        labels = [row.trial.labels.get(axis, "") for axis in axes]
        writer.writerows([*labels, seed, *(result[n] for n in RUN)] for seed, result in row.results.items())
    return text.getvalue()
