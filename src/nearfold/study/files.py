"""What a study leaves behind for people: runs.csv, results.json, summary.md and report.html in a folder of its own."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from nearfold.study import page
from nearfold.study.authors import Points
from nearfold.study.document import markdown
from nearfold.study.headline import verdict
from nearfold.study.looks import see
from nearfold.study.measure import environment
from nearfold.study.plan import Plan
from nearfold.study.record import RUN, Record
from nearfold.study.results import Results
from nearfold.study.store import write_each


def gather(planned: Plan, command: str, theirs: Sequence[Points] = ()) -> Record:
    """What has finished of a study.

    Args:
        planned: the study.
        command: what makes it elsewhere.
        theirs: the authors' runs.

    Raises:
        ValueError: no run has finished.
    """
    results = planned.results
    if not results.rows:
        raise ValueError(f"no run under {planned.place.root} has finished: there is nothing to report")
    there = environment(planned.study.trials[0].recipe.device)
    return Record(results, planned.facts, command, there, planned.missing, theirs, see(planned))


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
    return {folder / "summary.md": lambda: summary(record.results), folder / "report.html": lambda: page.html(record)}


COLUMNS = (
    "setting", "test acc. %", "train acc. %", "gap, points", "difference, points", "adjusted p", "seeds", "parameters",
    "FLOPs/image", "images/s", "peak MiB",
)  # fmt: skip
"""Of the summary."""


def summary(results: Results) -> str:
    """The answer and the tables, in Markdown."""
    study = results.study
    texts = [study.question, f"Published: {study.claim}", *page.answer(results)]
    lines = [f"# {markdown(study.title)}", f"**{markdown(verdict(results))}**", *map(markdown, texts)]
    return "\n\n".join([*lines, *(table.markdown(COLUMNS) for table in page.tables(results))])


def _csv(results: Results) -> str:
    axes = list(dict.fromkeys(axis for row in results.rows for axis in row.trial.labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, "seed", *RUN])
    for row in results.rows:
        labels = [row.trial.labels.get(axis, "") for axis in axes]
        writer.writerows([*labels, seed, *(result[n] for n in RUN)] for seed, result in row.results.items())
    return text.getvalue()
