"""The results of a study: what every trial came to, over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nearfold.study.grid import Run, Study, Trial
from nearfold.study.statistics import Estimate, estimate, within
from nearfold.study.store import Store, run_key

MEMORISED = 0.995
"""Training accuracy from which a network has memorised its images."""


def limits(name: str) -> tuple[float, float]:
    """What a measurement lies between: a share, a difference of shares, or a number that is not negative.

    >>> limits("test_accuracy"), limits("gap_last"), limits("seconds")
    ((0.0, 1.0), (-1.0, 1.0), (0.0, inf))
    """
    if "gap" in name:
        return -1.0, 1.0
    return 0.0, 1.0 if "accuracy" in name else math.inf


@dataclass(frozen=True)
class Row:
    """A trial and what its runs left.

    Attributes:
        trial: the trial.
        results: result by seed (`nearfold.study.tasks.KEPT`, accuracies are fractions), and ``run``, its key.
        cost: fields of `nearfold.study.measure.Cost`; empty where it was not measured.
        beside: the other rows of its data set, whose seeds tell how far a value scatters.
    """

    trial: Trial
    results: Mapping[int, Mapping[str, Any]]
    cost: Mapping[str, float]
    beside: Sequence[Row] = ()

    def values(self, name: str) -> dict[int, float]:
        """A measurement by seed; ``gap`` and ``gap_last``: train minus test accuracy of selected and last weights."""
        if name in ("gap", "gap_last"):
            train, test = (name.replace("gap", f"{part}_accuracy") for part in ("train", "test"))
            return {seed: r[train] - r[test] for seed, r in self.results.items()}
        return {seed: float(result[name]) for seed, result in self.results.items()}

    def mean(self, name: str) -> float:
        """Its mean over the seeds."""
        return statistics.fmean(self.values(name).values())

    def estimate(self, name: str) -> Estimate:
        """Its mean and interval over the seeds, by the spread of all rows of the data set, ended where values end."""
        values = self.values(name)
        found = estimate(list(values.values()), within([values, *(row.values(name) for row in self.beside)]))
        return found.cut(*limits(name))

    @property
    def memorised(self) -> bool:
        """Whether every seed knew its training images in the end."""
        return all(value >= MEMORISED for value in self.values("train_accuracy_last").values())

    @property
    def title(self) -> str:
        """Of the trial."""
        return self.trial.title


@dataclass(frozen=True)
class Results:
    """All rows of a study that have a result, in the order of its trials.

    Attributes:
        study: the study.
        rows: with at least one finished run.
        planned: runs of the grid.
        failures: label and error of runs that failed and have not succeeded since.
        tested: number of test images, by data set as labelled; empty where it is not known.
    """

    study: Study
    rows: Sequence[Row]
    planned: int
    failures: Sequence[tuple[str, str]]
    tested: Mapping[str, int] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        """Training runs with a result."""
        return sum(len(row.results) for row in self.rows)

    @property
    def panels(self) -> dict[str, list[Row]]:
        """The rows of every data set, in the study's order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.trial.panel, []).append(row)
        return found

    def reference(self, rows: Sequence[Row]) -> Row | None:
        """The row that the others of a panel are compared with."""
        axis, against = self.study.axis, self.study.reference_on
        return next((row for row in rows if row.trial.labels[axis] == against(row.trial.panel)), None)


def together(rows: Sequence[Row]) -> list[Row]:
    """The rows, each knowing those beside it on its data set."""
    return [replace(r, beside=[o for o in rows if o is not r and o.trial.panel == r.trial.panel]) for r in rows]


def collect(
    study: Study,
    runs: Mapping[tuple[int, int], Run],
    costs: Mapping[int, Run],
    store: Store,
    tested: Mapping[str, int] | None = None,
) -> Results:
    """Read what a store has of a study.

    Args:
        study: the study.
        runs: its training runs by (index of the trial, seed).
        costs: its cost runs by index of the trial.
        store: where results lie.
        tested: as in `Results`.
    """
    rows = []
    for index, trial in enumerate(study.trials):
        results = {
            seed: result | {"run": run_key(run.config)}
            for (at, seed), run in runs.items()
            if at == index and (result := store.load(run.config)) is not None
        }
        cost = store.load(costs[index].config) if index in costs else None
        if results:
            rows.append(Row(trial, results, cost or {}))
    errors = ((run.label, store.failure(run.config)) for run in [*costs.values(), *runs.values()])
    failures = [(label, error) for label, error in errors if error is not None]
    return Results(study, together(rows), len(runs), failures, tested or {})
