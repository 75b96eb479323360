"""The authors' own runs of ConvNN, from the table of their logs, as points beside ours."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfold.study.grid import Authors, Label

ACCURACY = "final_test_top1"


@dataclass(frozen=True)
class Points:
    """Their runs on our axis.

    Attributes:
        data: what it was run on.
        text: what was run.
        values: test accuracies in percent, one a run, by our value on the axis.
    """

    data: str
    text: str
    values: dict[Label, list[float]]

    def differences(self, reference: Label) -> dict[Label, list[float]]:
        """Their accuracies less the mean of theirs at our reference, in points; empty where they have none there."""
        base = self.values.get(reference)
        if not base:
            return {}
        return {value: [a - statistics.fmean(base) for a in found] for value, found in self.values.items()}


def read(path: Path, asked: Sequence[Authors]) -> list[Points]:
    """Their runs that answer a study's question.

    Args:
        path: a CSV file, one run a line, its arguments in columns ``arg_*``, accuracies in percent.
        asked: which runs.

    Raises:
        ValueError: the file is missing, or lacks a column.
    """
    if not path.is_file():
        raise ValueError(f"--authors {path} does not exist: leave it out, or name the table of the authors' runs")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = []
    for one in asked:
        needed = {ACCURACY, *one.columns, *one.where}
        if missing := needed - set(rows[0] if rows else ()):
            raise ValueError(f"--authors {path} has no column {', '.join(sorted(missing))}")
        try:
            found.append(Points(one.data, one.text, _points(rows, one)))
        except (TypeError, ValueError) as error:  # a line that is too short, or holds something else
            raise ValueError(f"--authors {path}: {ACCURACY} must be a number in every line ({error})") from error
    return [points for points in found if points.values]


def _points(rows: Sequence[dict[str, str]], asked: Authors) -> dict[Label, list[float]]:
    values: dict[Label, list[float]] = {}
    for row in rows:
        wanted = {c: (v,) if isinstance(v, str) else v for c, v in asked.where.items()}
        if all(row[column] in allowed for column, allowed in wanted.items()):
            theirs = " ".join(row[column] for column in asked.columns)
            spelled = asked.values.get(theirs, theirs)
            values.setdefault(_label(spelled), []).append(float(row[ACCURACY]))
    return dict(sorted(values.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _label(text: str) -> Label:
    try:
        return float(text)
    except ValueError:
        return text
