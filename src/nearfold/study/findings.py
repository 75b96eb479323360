"""Sentences about the rows of a study. Every statement is computed from the rows it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nearfold.study.compare import Difference, compared, points
from nearfold.study.compare import verdict as all_of_them
from nearfold.study.headline import Panel, headline, unseen
from nearfold.study.table import Row, count, mean, percent, seeds


def comparisons(rows: Sequence[Row]) -> tuple[Row, list[Difference]]:
    """Convolution (or, where it was not run, the first operator), and the others against it."""
    reference = next((row for row in rows if row.name == "conv"), rows[0])
    others = [row for row in rows if row is not reference and row.by_seed.keys() & reference.by_seed.keys()]
    return reference, compared([(row, row.by_seed) for row in others], reference.by_seed)


def verdict(rows: Sequence[Row]) -> str:
    """The study in one sentence."""
    reference, found = comparisons(rows)
    if not found:
        return f"{_first(reference.title)} has {percent(reference.test)} % test accuracy; nothing else was run."
    return headline([Panel("", reference.title, found)], what="operators")


def _alone(d: Difference, comparisons: int) -> str:
    """Why a difference whose interval does not hold zero is not found."""
    if d.found or d.estimate.low <= 0 <= d.estimate.high:
        return ""
    return f" (taken alone; among {comparisons} comparisons such an interval is to be expected, and it is not counted)"


def conclusions(rows: Sequence[Row], n_test: int) -> list[str]:
    """What a reader may conclude, and what not."""
    reference, found = comparisons(rows)
    texts = []
    for d in found:
        if isinstance(d.row, Row) and d.row.name == "convnn" and not math.isnan(d.p):
            texts.append(
                f"{d.row.title}, the layer of nearest neighbours that this project is built around, is "
                + ("" if d.found else "not ")
                + f"found different from {reference.title} here: {points(d.estimate)}"
                + f"{_alone(d, len(found))}. That is one small network, "
                "trained briefly on few small images by one recipe, where every operator stands alone in its layer. It "
                "does not say how a layer does in a large network, on large images, or beside convolutions, as it was "
                "published (branch, ratio 1/2); the studies of these claims are listed by nearfold study list."
            )
    p = max(mean(row.test) for row in rows)
    error = math.sqrt(p * (1 - p) / n_test)
    text = (
        f"One of the {n_test:,} test images is {100 / n_test:.2f} points, and another test set of that size would "
        f"move an accuracy of {100 * p:.1f} % by about {100 * error:.1f} points, which the intervals over seeds do not "
        "contain."
    )
    if widest := unseen([Panel("", reference.title, found)]):
        text = (
            f"“Not found” is not “equal”: with {seeds(min(row.n for row in rows))} a difference of less than about "
            f"{widest:.1f} points cannot be seen. {text}"
        )
    return [*texts, text]


def answer(rows: Sequence[Row]) -> list[str]:
    """The answer of the study, as paragraphs.

    Args:
        rows: at least one operator.
    """
    parts = [_accuracy(rows), _along_blend(rows), _gap(rows), _cost(rows)]
    return [part for part in parts if part]


def _accuracy(rows: Sequence[Row]) -> str:
    ranked = sorted(rows, key=lambda row: -mean(row.test))
    best, others = ranked[0], ranked[1:]
    text = f"{_first(best.title)} has the highest mean test accuracy, {percent(best.test)} % over {seeds(best.n)}"
    if not others:
        return text + "; it is the only operator that was run."
    text += f"; {others[-1].title} has the lowest, {percent(others[-1].test)} %. "
    reference, found = comparisons(rows)
    return text + all_of_them(found, reference)


def _along_blend(rows: Sequence[Row]) -> str:
    blend = [row for row in rows if row.family == "between"]
    if len(blend) < 2:
        return ""
    first, last = blend[0], blend[-1]
    top = max(blend, key=lambda row: mean(row.test))
    text = (
        f"On the way from space to features with one and the same kernel, accuracy goes from "
        f"{percent(first.test)} % ({first.title}) to {percent(last.test)} % ({last.title})"
    )
    if top in (first, last):
        text += ", and is highest at an end of the way"
    else:
        text += f", and is highest on the way, {percent(top.test)} % ({top.title})"
    found = compared(
        [(row, row.by_seed) for row in blend[1:] if row.by_seed.keys() & first.by_seed.keys()], first.by_seed
    )
    ends = [d for d in found if d.row is last and not math.isnan(d.p)]
    return text + "".join(f"; the ends differ by {points(d.estimate)}" for d in ends) + "."


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


def _first(title: str) -> str:
    """A title as the first word of a sentence."""
    return title[:1].upper() + title[1:]
