"""How the study of data and operators is read: who is level with the best where, and what a fixed choice would cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from nearfold.study.catalogue.readings import complexity
from nearfold.study.compare import differences
from nearfold.study.document import names, seeds
from nearfold.study.results import Results, Row

ATTENTION, CONVOLUTION = "self-attention", "convolution 3x3"


def skill(row: Row, classes: int) -> float:
    """Mean test accuracy above chance: 0 for guessing, 1 for no error.

    Args:
        row: of the study.
        classes: of its task, guessed alike often.
    """
    return (row.mean("test_accuracy") - 1 / classes) / (1 - 1 / classes)


def best(rows: Sequence[Row]) -> Row:
    """The row of the highest mean test accuracy; of equal ones the first."""
    return max(rows, key=lambda row: row.mean("test_accuracy"))


def level(rows: Sequence[Row]) -> list[str]:
    """The operators that are not found worse than the best of a task, itself among them."""
    top = best(rows)
    worse = {d.row.title for d in differences(rows, top) if d.found}
    return [row.title for row in rows if row.title not in worse]


def behind(rows: Sequence[Row], title: str) -> float | None:
    """How far an operator's mean accuracy is behind the best of the task, 0..1; None: it was not run."""
    found = [row.mean("test_accuracy") for row in rows if row.title == title]
    return best(rows).mean("test_accuracy") - found[0] if found else None


def choices(results: Results, aligned: Mapping[str, str]) -> dict[str, Callable[[str], str]]:
    """Ways to choose an operator without looking at accuracies on the task: task -> operator.

    Args:
        results: of the study.
        aligned: operator by task.
    """
    return {
        "the aligned one": lambda task: aligned[task],
        "always convolution": lambda task: CONVOLUTION,
        "always self-attention": lambda task: ATTENTION,
        "the best on the other tasks": lambda task: on_average(results, task),
        "the lowest Omega": lambda task: min(results.panels[task], key=lambda row: complexity(row)["Omega"]).title,
    }


def on_average(results: Results, left_out: str = "") -> str:
    """The operator of the highest mean accuracy over all tasks but one."""
    tasks = [rows for name, rows in results.panels.items() if name != left_out]
    titles = [row.title for row in next(iter(results.panels.values()))]

    def mean(title: str) -> float:
        found = [row.mean("test_accuracy") for rows in tasks for row in rows if row.title == title]
        return statistics.fmean(found) if found else 0.0

    return max(titles, key=mean)


def judged(results: Results, choose: Callable[[str], str]) -> tuple[int, float, int]:
    """What a way to choose comes to: tasks where it is level with the best, mean points behind it, tasks counted."""
    good, lost = 0, []
    for name, rows in results.panels.items():
        short = behind(rows, choose(name))
        if short is not None:
            good += choose(name) in level(rows)
            lost.append(100 * short)
    return good, statistics.fmean(lost) if lost else 0.0, len(lost)


def readers(aligned: Mapping[str, str]) -> tuple[Callable[[Results], str], Callable[[Results], list[str]]]:
    """The verdict and the answer of the study.

    Args:
        aligned: by task, the operator whose words are most like those that the task was made from.
    """

    def verdict(results: Results) -> str:
        told = []
        for title, choose in choices(results, aligned).items():
            good, lost, _ = judged(results, choose)
            told.append(f"{title} {good} times ({lost:.1f})")
        return (
            f"Level with the best operator of {len(results.panels)} tasks, and in brackets the mean points behind it: "
            f"{names(told)}."
        )

    def answer(results: Results) -> list[str]:
        tops = {name: (best(rows), level(rows)) for name, rows in results.panels.items()}
        hits = [name for name, (_, there) in tops.items() if aligned[name] in there]
        missed = {name: top for name, (top, _) in tops.items() if name not in hits}
        paragraphs = [
            f"Structural alignment holds on {len(hits)} of {len(tops)} tasks: the operator whose words the task was "
            f"made from is not found worse than the best. It fails on {_failures(results, missed, aligned)}."
            if missed
            else f"Structural alignment holds on all {len(tops)} tasks.",
            _omega(results),
        ]
        for name, (top, there) in tops.items():
            others = [title for title in there if title != top.title]
            accuracy = 100 * top.mean("test_accuracy")
            paragraphs.append(
                f"{name}: {top.title} is the best, {accuracy:.1f} % ({seeds(len(top.results))}); "
                + (
                    "no other one is found worse."
                    if len(others) == len(results.panels[name]) - 1
                    else f"not found worse: {names(others)}."
                    if others
                    else "every other one is found worse."
                )
            )
        return paragraphs

    return verdict, answer


def _failures(results: Results, missed: Mapping[str, Row], aligned: Mapping[str, str]) -> str:
    return names(
        [
            f"{name} ({aligned[name]}, {100 * (behind(results.panels[name], aligned[name]) or 0):.1f} points behind "
            f"{top.title})"
            for name, top in missed.items()
        ]
    )


def _omega(results: Results) -> str:
    """How the order by GWO's complexity and that by accuracy agree, task by task."""
    from scipy import stats

    found = []
    for rows in results.panels.values():
        if len(rows) > 2:
            accuracies = [row.mean("test_accuracy") for row in rows]
            rho = stats.spearmanr([complexity(row)["Omega"] for row in rows], accuracies).statistic
            found.append(float(rho))
    if not found:
        return "Too few operators to rank them by Omega."
    negative = sum(value < 0 for value in found)
    text = f"{statistics.median(found):+.2f}".replace("-", "−")
    return (
        f"GWO's Omega (lower is said to be better) against accuracy: the rank correlation is {text} in the median of "
        f"{len(found)} tasks, and negative, as claimed, on {negative} of them."
    )
