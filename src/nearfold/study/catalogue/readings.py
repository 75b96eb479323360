"""How the studies that do more than compare settings with a reference are read."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nearfold.grammar import parse
from nearfold.grammar.complexity import c_d
from nearfold.nn import Mixer
from nearfold.recognise.report import TIERS
from nearfold.study.compare import accuracy, differences, points, verdict
from nearfold.study.document import names, seeds
from nearfold.study.headline import headline, panels, quoted
from nearfold.study.results import Results, Row
from nearfold.study.statistics import pareto

COSTS = {"latency_ms": "latency", "flops": "FLOPs", "peak_memory_mib": "memory"}
UNITS = {"latency_ms": " ms", "flops": "", "peak_memory_mib": " MiB"}


def memorise_answer(results: Results) -> list[str]:
    """Gaps of the operators that memorised, against complexity; the others are said not to have."""
    paragraphs = []
    for name, rows in results.panels.items():
        there = [row for row in rows if row.memorised]
        missed = [row for row in rows if not row.memorised]
        text = f"{name}: "
        if there:
            low, high = (pick(there, key=lambda row: row.mean("gap_last")) for pick in (min, max))
            text += (
                f"among the {len(there)} of {len(rows)} operators that memorised with every seed, the gap is smallest "
                f"for {low.title}, {gap(low)}, and largest for {high.title}, "
                f"{gap(high)}. "
            )
        reference = results.reference(there)
        if reference is not None:
            found = differences(there, reference, "gap_last")
            text += f"Gaps: {verdict(found, reference.title, ('larger', 'smaller'))} "
        if len(there) > 3:
            text += _ranks(there) + " "
        if missed:
            text += "Did not memorise with every seed, so no gap is compared: " + names(
                [f"{row.title} ({100 * row.mean('train_accuracy_last'):.1f} %)" for row in missed]
            )
            text += "."
        paragraphs.append(text.strip())
    return paragraphs


def gap(row: Row, measure: str = "gap_last") -> str:
    """The gap of an operator, in points, with its interval."""
    return accuracy(row.estimate(measure)).replace(" %", " points")


def _ranks(rows: Sequence[Row]) -> str:
    """Rank correlation of the gap with complexity."""
    from scipy import stats

    gaps = [row.mean("gap_last") for row in rows]
    parts = []
    for name in ("C_D", "C_P", "Omega"):
        values = [complexity(row)[name] for row in rows]
        found = stats.spearmanr(values, gaps)
        parts.append(f"{name} {found.statistic:+.2f} (p = {found.pvalue:.2f})".replace("-", "−"))
    return f"Rank correlation of the mean gap with complexity over these {len(rows)} operators: {', '.join(parts)}."


def complexity(row: Row) -> dict[str, float]:
    """C_D, C_P (millions) and Omega of the operator layers of a row's network."""
    network = row.trial.network
    notation = str(network.get("operation", network.get("layer")))
    c_p = sum(_c_p(notation, *channels) for channels in _layers(network))
    total = c_d(parse(notation)) * len(_layers(network))
    return {"C_D": total, "C_P": c_p, "Omega": total + c_p}


def _layers(network: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Channels into and out of every operator layer of the networks that these studies use."""
    if network["name"] == "spectrum":
        return [(network["width"], network["width"])] * network["depth"]
    return [(16, 16), (32, 32)] if network.get("embed") else [(3, 16), (16, 32)]


@functools.cache
def _c_p(notation: str, in_channels: int, out_channels: int) -> float:
    from nearfold.recognise import complexity as derive

    with torch.device("meta"):
        return float(derive(Mixer(notation, in_channels, out_channels)).c_p)


@dataclass(frozen=True)
class Score:
    """A row of GWO's table: accuracy in percent, Omega, 100 accuracy / (1 + Omega), tier."""

    row: Row
    accuracy: float
    omega: float
    score: float
    tier: str


def scores(rows: Sequence[Row]) -> list[Score]:
    """GWO's table, best score first."""
    found = []
    for row in rows:
        percent, omega = 100 * row.mean("test_accuracy"), complexity(row)["Omega"]
        score = 100 * percent / (1 + omega)
        found.append(Score(row, percent, omega, score, next((t for t, least in TIERS.items() if score >= least), "D")))
    return sorted(found, key=lambda s: -s.score)


def benchmark_answer(results: Results) -> list[str]:
    """The ranking by score beside the ranking by accuracy."""
    from scipy import stats

    paragraphs = []
    for name, rows in results.panels.items():
        table = scores(rows)
        best = max(table, key=lambda s: s.accuracy)
        text = (
            f"{name}: the best score is that of {table[0].row.title}, {table[0].score:.0f} ({table[0].accuracy:.1f} %, "
            f"Omega {table[0].omega:.3g}); the best accuracy that of {best.row.title}, "
            f"{accuracy(best.row.estimate('test_accuracy'))} ({seeds(len(best.row.results))}). "
        )
        if len(table) > 4:
            by_omega = stats.spearmanr([s.score for s in table], [-s.omega for s in table]).statistic
            by_accuracy = stats.spearmanr([s.score for s in table], [s.accuracy for s in table]).statistic
            text += (
                f"Rank correlation of the score over {len(table)} operators: {by_omega:+.2f} with a small Omega, "
                f"{by_accuracy:+.2f} with accuracy."
            ).replace("-", "−")
        else:
            text += "Scores: " + ", ".join(f"{s.row.title} {s.score:.0f} ({s.tier})" for s in table) + "."
            reference = results.reference(rows)
            text += f" {verdict(differences(rows, reference), reference.title)}" if reference is not None else ""
        paragraphs.append(text)
    return paragraphs


def benchmark_verdict(results: Results) -> str:
    """The first by score and the first by accuracy, in a sentence."""
    parts = []
    for panel in panels(results):
        table = scores(results.panels[panel.name])
        best = max(table, key=lambda s: s.accuracy)
        against = next((d for d in panel.found if d.row is best.row), None)
        if best is table[0]:
            text = f"{quoted(best.row.title)} is first by score and by accuracy"
        else:
            text = f"{quoted(table[0].row.title)} is first by score ({table[0].score:.0f})"
            text += f", {quoted(best.row.title)} by accuracy"
        if against is not None and not math.isnan(against.p):
            found = "found" if against.found and against.estimate.mean > 0 else "not found"
            text += f", {found} better than {quoted(panel.reference)} ({points(against.estimate)})"
        parts.append(f"{panel.name}: {text}")
    return "; ".join(parts) + "."


def budget_verdict(results: Results) -> str:
    """What the comparisons come to, and what costs least."""
    cheapest = {
        (cost, min((row for row in rows if row.cost), key=lambda row: row.cost[cost]).title)
        for cost in COSTS
        for rows in results.panels.values()
        if any(row.cost for row in rows)
    }
    text = headline(panels(results))
    if len({title for _, title in cheapest}) == 1 and len(cheapest) == len(COSTS):
        text = f"{text[:-1]}; {quoted(next(iter(cheapest))[1])} costs least, in {names(list(COSTS.values()))}."
    return text


def front(rows: Sequence[Row], cost: str) -> list[Row]:
    """The settings that no other one beats in held-out accuracy at that cost or less, cheapest first."""
    there = [row for row in rows if row.cost]
    return [there[i] for i in pareto([(float(row.cost[cost]), row.mean("val_accuracy")) for row in there])]


def budget_answer(results: Results) -> list[str]:
    """The Pareto fronts."""
    paragraphs = []
    for name, rows in results.panels.items():
        parts = []
        for cost, text in COSTS.items():
            best = front(rows, cost)
            if best:
                parts.append(f"for {text}, {names([row.title for row in best])}")
        if parts:
            paragraphs.append(
                f"{name}: settings that no other one beats on held-out images at that cost or less: {'; '.join(parts)}."
            )
    return [*paragraphs, *_gains(results)]


def _gains(results: Results) -> list[str]:
    told = {panel.name: verdict(panel.found, panel.reference) for panel in panels(results) if panel.reference}
    return [f"{name}: on test images, {text[:1].lower()}{text[1:]}" for name, text in told.items()]


def recommend(results: Results, budget: Mapping[str, float]) -> list[str]:
    """The setting to choose on every data set within a budget, by held-out images.

    Of those that fit and are not found worse than the best that fits, the one that costs least.

    Args:
        results: of the study `budget`.
        budget: most of a cost, by its name in `COSTS`; the first decides what costs least.

    Returns:
        A sentence for every data set.

    Raises:
        ValueError: a cost is unknown, or was not measured.
    """
    for name in budget:
        if name not in COSTS:
            raise ValueError(f"budget: no cost is called {name!r}; choose from {', '.join(COSTS)}")
    sentences = []
    for name, rows in results.panels.items():
        fitting = [row for row in rows if row.cost and all(row.cost[c] <= most for c, most in budget.items())]
        if not any(row.cost for row in rows):
            raise ValueError(f"nothing was measured on {name}: run the study first, nearfold study run budget")
        if not fitting:
            cheapest = ", ".join(
                f"{COSTS[c]} {min(row.cost[c] for row in rows if row.cost):.3g}{UNITS[c]}" for c in budget
            )
            sentences.append(f"{name}: no setting fits; the least there is: {cheapest}.")
            continue
        best = max(fitting, key=lambda row: row.mean("val_accuracy"))
        worse = {d.row.title for d in differences(fitting, best, "val_accuracy") if d.found}
        price = next(iter(budget))
        choice = min((row for row in fitting if row.title not in worse), key=lambda row: row.cost[price])
        text = f"{name}: {_costing(choice)}"
        if choice is not best:
            text += (
                f"; of the settings that the held-out images cannot tell from the best it has the least "
                f"{COSTS[price]}. The best on them: {_costing(best)}"
            )
        sentences.append(text + ".")
    return sentences


def _costing(row: Row) -> str:
    costs = ", ".join(f"{text} {row.cost[cost]:.3g}{UNITS[cost]}" for cost, text in COSTS.items())
    return f"{row.title}, {accuracy(row.estimate('test_accuracy'))} on test images ({costs})"
