"""Does a measure of data predict which operator is best? Judged on every task in turn, left out of what is fitted.

Legend: T tasks, K operators, E numbers of evidence.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nearfold.study.catalogue.aligned import CONVOLUTION, level
from nearfold.study.catalogue.readings import complexity
from nearfold.study.results import Results, Row, together

Table = Mapping[str, Mapping[str, float]]
"""A number for every operator, by task and title of the operator."""
Evidence = Mapping[str, Mapping[str, Mapping[str, float]]]
"""What the data say about an operator: by task, title of the operator, and name."""


@dataclass(frozen=True)
class Judgement:
    """How well the orders of a predictor agree with the measured ones.

    Attributes:
        name: of the predictor.
        correlations: Spearman's by task; a task of which all is said to be equal has 0.
        hits: tasks where what it recommends is not found worse than the best.
        behind: how many points what it recommends is behind the best, by task.
    """

    name: str
    correlations: Mapping[str, float]
    hits: Sequence[str]
    behind: Mapping[str, float]

    @property
    def correlation(self) -> float:
        """The mean over the tasks."""
        return statistics.fmean(self.correlations.values())

    def correlation_on(self, tasks: Sequence[str]) -> float:
        """The mean over some of the tasks; NaN over none."""
        return statistics.fmean(self.correlations[task] for task in tasks) if tasks else math.nan

    @property
    def share(self) -> float:
        """Tasks where the recommendation is within the noise of the best, as a share."""
        return len(self.hits) / len(self.correlations)

    @property
    def lost(self) -> float:
        """Mean points behind the best."""
        return statistics.fmean(self.behind.values())


def accuracies(results: Results) -> dict[str, dict[str, float]]:
    """Mean test accuracy by task and operator."""
    return {name: {row.title: row.mean("test_accuracy") for row in rows} for name, rows in results.panels.items()}


def apart(results: Results) -> list[str]:
    """The tasks that tell operators apart: some are found worse than the best. Of the others the order is chance."""
    return [name for name, rows in results.panels.items() if len(level(rows)) < len(rows)]


def another_seed(results: Results) -> tuple[Results, Table]:
    """The results without their first seed, and that seed's accuracies: what one whole run of each predicts."""
    rest: list[Row] = []
    said: dict[str, dict[str, float]] = {}
    for row in results.rows:
        (_, found), *others = sorted(row.results.items())
        if others:
            rest.append(replace(row, results=dict(others), beside=()))
            said.setdefault(row.trial.panel, {})[row.title] = float(found["test_accuracy"])
    return replace(results, rows=together(rest)), said


def judge(name: str, results: Results, predicted: Table) -> Judgement:
    """Compare predicted orders with the measured one of every task.

    Args:
        name: of the predictor.
        results: of the study.
        predicted: higher is better; every operator of every task.
    """
    from scipy import stats

    correlations, hits, behind = {}, [], {}
    for task, measured in accuracies(results).items():
        said = predicted[task]
        titles = list(measured)
        values = [said[title] for title in titles]
        constant = len(set(values)) == 1
        truth = [measured[title] for title in titles]
        correlations[task] = 0.0 if constant else float(stats.spearmanr(values, truth).statistic)
        choice = max(titles, key=lambda title: said[title])
        behind[task] = 100 * (max(truth) - measured[choice])
        if choice in level(results.panels[task]):
            hits.append(task)
    return Judgement(name, correlations, hits, behind)


def baselines(results: Results) -> dict[str, Table]:
    """What needs no look at the data, or trains on them: orders of the operators by task."""
    measured = accuracies(results)
    tasks = list(measured)

    def constant(title: str) -> Table:
        return {task: {other: float(other == title) for other in measured[task]} for task in tasks}

    def others(task: str) -> dict[str, float]:
        """Mean rank on the other tasks."""
        ranks = {other: _ranks(measured[other]) for other in tasks if other != task}
        return {t: statistics.fmean(ranks[other][t] for other in ranks if t in ranks[other]) for t in measured[task]}

    def first_epoch(row: Row) -> float:
        return float(row.results[min(row.results)]["history"][0]["val_accuracy"])

    def each(value: Callable[[Row], float]) -> Table:
        return {task: {row.title: value(row) for row in rows} for task, rows in results.panels.items()}

    return {
        "always self-attention": constant("self-attention"),
        "always convolution": constant(CONVOLUTION),
        "mean rank on the other tasks": {task: others(task) for task in tasks},
        "GWO's Omega, lower is better": each(lambda row: -complexity(row)["Omega"]),
        "one epoch of every operator, one seed": each(first_epoch),
    }


def leave_one_out(results: Results, evidence: Evidence, penalty: float = 1.0) -> Table:
    """Ranks predicted by ridge regression from evidence, fitted on all other tasks.

    What is predicted is an operator's rank on a task, scaled to -1..1. Evidence is standardised within a task, so that
    only differences between operators count, and has a constant for every operator besides: how good it is as a rule.

    Args:
        results: of the study.
        evidence: the same names for every operator of every task.
        penalty: of the ridge, in units of tasks.
    """
    measured = accuracies(results)
    tasks, titles = list(measured), list(dict.fromkeys(t for table in measured.values() for t in table))
    inputs = {task: _design(evidence[task], list(measured[task]), titles) for task in tasks}
    ranks = {task: _ranks(measured[task]) for task in tasks}
    targets = {task: np.array([ranks[task][title] for title in measured[task]]) for task in tasks}
    predicted = {}
    for task in tasks:
        x = np.concatenate([inputs[other] for other in tasks if other != task])
        y = np.concatenate([targets[other] for other in tasks if other != task])
        gram = x.T @ x + penalty * len(titles) * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ y)
        predicted[task] = dict(zip(measured[task], map(float, inputs[task] @ weights), strict=True))
    return predicted


def _ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Ranks scaled to -1 (lowest) .. 1 (highest); equal values share theirs."""
    from scipy import stats

    found = stats.rankdata(list(values.values()))
    scale = max(len(found) - 1, 1)
    return {title: float(2 * (rank - 1) / scale - 1) for title, rank in zip(values, found, strict=True)}


def _design(
    evidence: Mapping[str, Mapping[str, float]], titles: Sequence[str], every: Sequence[str]
) -> NDArray[np.float64]:
    """(K, E + K): standardised evidence, and which operator it is."""
    names = sorted(next(iter(evidence.values())))
    x_KE = np.array([[evidence[title][name] for name in names] for title in titles], dtype=np.float64)
    x_KE = x_KE - x_KE.mean(0)
    spread = x_KE.std(0)
    x_KE = np.divide(x_KE, spread, out=np.zeros_like(x_KE), where=spread > 1e-12)
    which = np.array([[float(title == other) for other in every] for title in titles])
    return np.concatenate([x_KE, which], 1)
