"""Sentences about the results of a study, every one computed from them.

Settings are chosen by held-out images, compared on test images, paired by seed; a difference counts as found when
Holm's adjusted p is below 0.05 among all comparisons with the reference on that data set. The spread of a difference is
estimated from all settings of the data set (`statistics.between`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nearfold.study.document import first, names, seeds
from nearfold.study.results import Results, Row
from nearfold.study.statistics import LEVEL, Estimate, between, holm, paired

MEASURE = "test_accuracy"


@dataclass(frozen=True)
class Difference:
    """A row against the reference of its data set.

    Attributes:
        row: the row.
        estimate: row minus reference, over the seeds that both have.
        p: Holm's adjusted p among the rows of the data set.
    """

    row: Row
    estimate: Estimate
    p: float

    @property
    def found(self) -> bool:
        """Whether a difference was found."""
        return self.p < 1 - LEVEL

    @property
    def side(self) -> int:
        """1 where the row was found above the reference, -1 below, 0 where no difference was found."""
        return self.found * ((self.estimate.mean > 0) - (self.estimate.mean < 0))


def differences(rows: Sequence[Row], reference: Row, measure: str = MEASURE) -> list[Difference]:
    """Every other row of a data set against the reference, in the order of the rows, corrected for their number.

    Gaps of the last weights are compared where both have memorised.
    """
    if measure == "gap_last":
        rows = [row for row in rows if row.memorised and reference.memorised]
    others = [row for row in rows if row is not reference and row.results.keys() & reference.results.keys()]
    spread = between([row.values(measure) for row in (reference, *others)])
    base = reference.values(measure)
    estimates = [paired(row.values(measure), base, spread).cut(-1.0, 1.0) for row in others]
    adjusted = holm([found.p for found in estimates])
    return [Difference(row, found, p) for row, found, p in zip(others, estimates, adjusted, strict=True)]


def against_reference(results: Results) -> list[str]:
    """The answer of a study that compares settings with one of them: two sentences for every data set."""
    return [_panel(name, rows, results.reference(rows)) for name, rows in results.panels.items()]


def _panel(name: str, rows: Sequence[Row], reference: Row | None) -> str:
    best = max(rows, key=lambda row: row.mean("val_accuracy"))
    text = (
        f"{name}: the held-out images choose {best.title}, which has {accuracy(best.estimate(MEASURE))} on the test "
        f"images ({seeds(len(best.results))})"
    )
    if reference is None:
        return f"{text}; the reference has not been run."
    if best is reference:
        text += ", the reference itself. "
    else:
        text += f"; {reference.title} has {accuracy(reference.estimate(MEASURE))}. "
    return text + verdict(differences(rows, reference), reference.title)


def verdict(found: Sequence[Difference], reference: str, words: tuple[str, str] = ("better", "worse")) -> str:
    """What the comparisons with a reference of that title come to, in a sentence; ``words``: above it, and below."""
    if not found:
        return "Nothing to compare it with."
    if all(math.isnan(d.p) for d in found):
        return "With one seed there is no interval: no difference can be found."
    level = [d for d in found if not d.found and not math.isnan(d.p)]
    single = [d for d in found if math.isnan(d.p)]
    parts = []
    for word, side in zip(words, (1, -1), strict=True):
        if told := "; ".join(f"{d.row.title} ({points(d.estimate)})" for d in found if d.side == side):
            parts.append(f"{word} than {reference}: {told}")
    if level:
        widest = max(d.estimate.half for d in level)
        parts.append(
            f"no difference found between {reference} and {_these([d.row.title for d in level])}: the intervals "
            f"are up to {100 * widest:.1f} points to either side"
        )
    if single:
        told = "; ".join(f"{d.row.title} ({points(d.estimate)})" for d in single)
        parts.append(f"with one seed, so without an interval: {told}")
    return first("; ".join(parts)) + "."


def _these(titles: Sequence[str]) -> str:
    """A few settings by name, many by their number: the table has them."""
    if len(titles) <= 3 and not any("," in title for title in titles):
        return names(titles)
    return titles[0] if len(titles) == 1 else f"{len(titles)} others"


def accuracy(e: Estimate) -> str:
    """A share in percent with its interval.

    >>> accuracy(Estimate(0.9, 0.88, 0.92, 5, 0.0)), accuracy(Estimate(0.9, math.nan, math.nan, 1, math.nan))
    ('90.0 % (88.0 to 92.0)', '90.0 %')
    >>> accuracy(Estimate(0.01, -0.01, 0.03, 5, 0.2))
    '1.0 % (−1.0 to 3.0)'
    """
    text = f"{100 * e.mean:.1f} %" + ("" if math.isnan(e.low) else f" ({100 * e.low:.1f} to {100 * e.high:.1f})")
    return text.replace("-", "−")


def points(e: Estimate) -> str:
    """A difference of shares in points with its interval.

    >>> points(Estimate(0.012, -0.003, 0.027, 5, 0.1))
    '+1.2 points, −0.3 to +2.7'
    """
    return f"{signed(e.mean)} points" + ("" if math.isnan(e.low) else f", {signed(e.low)} to {signed(e.high)}")


def signed(difference: float) -> str:
    """A difference of shares in points, with its sign; nothing has a plus.

    >>> signed(-0.0123), signed(-0.0002)
    ('−1.2', '+0.0')
    """
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "−")
