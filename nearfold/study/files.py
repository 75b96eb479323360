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
from nearfold.study.store import run_key, write_whole

RUN = (
    "val_accuracy", "test_accuracy", "train_accuracy", "test_accuracy_last", "train_accuracy_last", "best_epoch",
    "epochs", "seconds",
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
        "runs.csv": _csv(plan, results),
        "results.json": json.dumps(_json(plan, results, command), indent=1) + "\n",
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def summary(results: Results) -> str:
    """The answer and the table, in Markdown."""
    lines = [f"# {results.study.title}", "", results.study.question, "", f"Published: {results.study.claim}", ""]
    lines += [text for paragraph in page.answer(results) for text in (paragraph, "")]
    measure = "gap_last" if results.study.figure == "gaps" else MEASURE
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


def _csv(plan: Plan, results: Results) -> str:
    axes = list(dict.fromkeys(axis for row in results.rows for axis in row.trial.labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, "seed", *RUN, "run"])
    for (index, seed), run in plan.training.items():
        trial = plan.study.trials[index]
        row = next((row for row in results.rows if row.trial is trial), None)
        if row is not None and seed in row.results:
            result = row.results[seed]
            writer.writerow(
                [*(trial.labels.get(a, "") for a in axes), seed, *(result[n] for n in RUN), run_key(run.config)]
            )
    return text.getvalue()


def _json(plan: Plan, results: Results, command: str) -> dict[str, Any]:
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
                "runs": {
                    str(seed): {"run": run_key(plan.training[_index(plan, row.trial), seed].config)}
                    | {n: r[n] for n in RUN}
                    for seed, r in row.results.items()
                },
            }
            for row in results.rows
        ],
    }


def _index(plan: Plan, trial: object) -> int:
    return next(i for i, other in enumerate(plan.study.trials) if other is trial)
