"""Sentences about the rows of a study. Every statement is computed from the rows it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nearfold.study.table import Row, count, mean, names, percent, seeds


def separated(a: Row, b: Row) -> bool:
    """Whether every seed of one operator beats every seed of the other in test accuracy.

    This asks for no distribution. With one seed each it is always true of different numbers and means
    nothing: `answer` does not use it there.
    """
    return min(a.test) > max(b.test) or min(b.test) > max(a.test)


def chance_of_separation(n_a: int, n_b: int) -> float:
    """How often two equal operators would come out `separated`, by chance alone (ties aside).

    >>> chance_of_separation(3, 3)
    0.1
    """
    return 2 / math.comb(n_a + n_b, n_a)


def answer(rows: Sequence[Row], n_test: int) -> list[str]:
    """The answer of the study, as paragraphs.

    Args:
        rows: at least one operator.
        n_test: number of test images.
    """
    parts = [_accuracy(rows), _along_blend(rows), _gap(rows), _cost(rows), _caution(rows, n_test)]
    return [part for part in parts if part]


def _accuracy(rows: Sequence[Row]) -> str:
    ranked = sorted(rows, key=lambda row: -mean(row.test))
    best, others = ranked[0], ranked[1:]
    n = best.n
    text = f"{_first(best.title)} has the highest mean test accuracy, {percent(best.test)} % over {seeds(n)}"
    if not others:
        return text + "; it is the only operator that was run."
    text += f"; {others[-1].title} has the lowest, {percent(others[-1].test)} %."
    if min(row.n for row in rows) < 2:
        return text + " With one seed there is no spread to compare a difference with: read no ranking into it."
    apart = [row for row in others if separated(best, row)]
    level = [row for row in others if not separated(best, row)]
    if apart:
        text += f" Every seed of {best.title} is above every seed of {names([row.title for row in apart])}."
    if level:
        text += (
            f" Against {names([row.title for row in level])} the seeds overlap: "
            f"{'these' if len(level) > 1 else 'this'} cannot be told from the best with {seeds(n)}."
        )
    return text


def _along_blend(rows: Sequence[Row]) -> str:
    blend = [row for row in rows if row.family == "between"]
    if len(blend) < 2:
        return ""
    first, last = blend[0], blend[-1]
    top = max(blend, key=lambda row: mean(row.test))
    difference = 100 * (mean(last.test) - mean(first.test))
    text = (
        f"On the way from space to features with one and the same kernel, accuracy goes from "
        f"{percent(first.test)} % ({first.title}) to {percent(last.test)} % ({last.title}), "
        f"{difference:+.1f} points".replace("-", "−")
    )
    if top in (first, last):
        text += ", and is highest at an end of the way"
    else:
        text += f", and is highest on the way, {percent(top.test)} % ({top.title})"
    if min(row.n for row in blend) < 2:
        return text + "."
    if separated(first, last):
        return text + "; the seeds of the two ends do not overlap."
    return text + "; the seeds of the two ends overlap."


def _gap(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return f"The gap between train and test accuracy is {percent(rows[0].gap)} points."
    ranked = sorted(rows, key=lambda row: mean(row.gap))
    low, high = ranked[0], ranked[-1]
    text = (
        f"The gap between train and test accuracy is smallest for {low.title} ({percent(low.gap)} points, "
        f"train accuracy {percent(low.train)} %) and largest for {high.title} ({percent(high.gap)} points, "
        f"train accuracy {percent(high.train)} %)."
    )
    if mean(low.train) < mean(high.train) - 0.01:
        text += (
            f" {_first(low.title)} also fits its training images less well: part of its small gap is a "
            "lower ceiling, not better generalization."
        )
    return text


def _cost(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return ""
    fast = max(rows, key=lambda row: row.images_per_second)
    slow = min(rows, key=lambda row: row.images_per_second)
    lean = min(rows, key=lambda row: row.flops)
    heavy = max(rows, key=lambda row: row.flops)
    return (
        f"The fastest to train is {fast.title} ({count(fast.images_per_second)} images/s), "
        f"{fast.images_per_second / slow.images_per_second:.1f} times as fast as {slow.title}. "
        f"FLOPs per image range from {count(lean.flops)} ({lean.title}) to {count(heavy.flops)} "
        f"({heavy.title})."
    )


def _caution(rows: Sequence[Row], n_test: int) -> str:
    p = max(mean(row.test) for row in rows)
    error = math.sqrt(p * (1 - p) / n_test)
    text = (
        f"How far to trust this: one of the {n_test:,} test images is {100 / n_test:.2f} points, and drawing "
        f"another test set of that size would move an accuracy of {100 * p:.1f} % by about "
        f"{100 * error:.1f} points, which the spread over seeds does not contain."
    )
    n = min(row.n for row in rows)
    if n > 1 and len(rows) > 1:
        chance = chance_of_separation(n, n)
        text += (
            f" Two equal operators would come out with non-overlapping seeds with probability {chance:.2g} "
            f"at {seeds(n)} each, so among {len(rows) - 1} comparisons with the best some such separations "
            "are expected by chance."
        )  # fmt: skip
    return text


def _first(title: str) -> str:
    """A title as the first word of a sentence."""
    return title[:1].upper() + title[1:]
