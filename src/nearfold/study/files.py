"""What a study leaves behind for people: report.html, runs.csv, results.json and summary.md in a folder of its own."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nearfold.study import page
from nearfold.study.authors import read
from nearfold.study.compare import MEASURE, accuracy, differences, points
from nearfold.study.plan import Plan
from nearfold.study.publish import environment
from nearfold.study.results import Results
from nearfold.study.store import write_whole

RUN = (
    "val_accuracy", "test_accuracy", "train_accuracy", "test_accuracy_last", "train_accuracy_last", "best_epoch",
    "epochs", "seconds", "run",
)  # fmt: skip


def leave(plan: Plan, folder: Path, *, command: str, authors: Path | None = None) -> list[Path]:
    """Write what has finished.

    Args:
        plan: the study and its runs.
        folder: where.
        command: what makes the same study elsewhere.
        authors: table of the authors' runs.

    Returns:
        The paths written.
    """
    results = plan.results
    theirs = read(authors, results.study.authors) if authors is not None else []
    contents = {
        "report.html": page.html(
            results, facts=plan.facts, command=command, environment=environment(), authors=theirs, missing=plan.missing
        ),
        "summary.md": summary(results),
        "runs.csv": _csv(results),
        "results.json": json.dumps(_json(results, command), indent=1) + "\n",
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def summary(results: Results) -> str:
    """The answer and the table, in Markdown."""
    lines = [f"# {results.study.title}", "", results.study.question, "", f"Published: {results.study.claim}", ""]
    lines += [text for paragraph in page.answer(results) for text in (paragraph, "")]
    measure = results.study.measure
    for name, rows in results.panels.items():
        reference = results.reference(rows)
        against = {d.row.title: d for d in differences(rows, reference, measure)} if reference is not None else {}
        lines += [
            f"| {name} | {'gap' if measure != MEASURE else 'test accuracy'} | less the reference's | adjusted p | "
            "seeds |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in rows:
            d = against.get(row.title)
            difference = ("", "") if d is None else (points(d.estimate), f"{d.p:.3g}")
            lines.append(
                f"| {row.title} | {accuracy(row.estimate(measure))} | {' | '.join(difference)} | {len(row.results)} |"
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


def _json(results: Results, command: str) -> dict[str, Any]:
    study = results.study
    return {
        "study": study.name,
        "preset": study.preset,
        "question": study.question,
        "claim": study.claim,
        "answer": page.answer(results),
        "command": command,
        "environment": environment(),
        "planned": results.planned,
        "finished": results.finished,
        "failures": [{"run": label, "error": error} for label, error in results.failures],
        "rows": [
            {
                "labels": dict(row.trial.labels),
                "network": dict(row.trial.network),
                "recipe": row.trial.recipe.to_dict(),
                "data": asdict(row.trial.data),
                "cost": dict(row.cost),
                "runs": {str(seed): {n: result[n] for n in RUN} for seed, result in row.results.items()},
            }
            for row in results.rows
        ],
    }
