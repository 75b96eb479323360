"""The one sentence that stands first on a page, and what may be concluded from it; both are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nearfold.study.compare import MEASURE, Difference, differences
from nearfold.study.document import first, names, seeds
from nearfold.study.results import Results
from nearfold.study.statistics import sampling


@dataclass(frozen=True)
class Words:
    """How a comparison reads: (than, short) of what is wanted, of what is not, and of neither; sign of the wanted."""

    wanted: tuple[str, str]
    unwanted: tuple[str, str]
    neither: str
    sign: int


ACCURACY = Words(("better than", "better"), ("worse than", "worse"), "better or worse than", 1)
GAP = Words(
    ("to have a smaller gap than", "a smaller one"),
    ("to have a larger gap than", "a larger one"),
    "to have another gap than",
    -1,
)


@dataclass(frozen=True)
class Panel:
    """The comparisons on one data set.

    Attributes:
        name: of the data set.
        reference: what the others are compared with; empty: it has not been run.
        found: the comparisons.
    """

    name: str
    reference: str
    found: Sequence[Difference]


def panels(results: Results) -> list[Panel]:
    """The comparisons of a study, by data set."""
    found = []
    for name, rows in results.panels.items():
        reference = results.reference(rows)
        against = [] if reference is None else differences(rows, reference, results.study.measure)
        found.append(Panel(name, "" if reference is None else reference.title, against))
    return found


def verdict(results: Results) -> str:
    """The sentence of a study: its own, or what its comparisons come to."""
    if results.study.verdict is not None:
        return results.study.verdict(results)
    if results.study.measure == MEASURE:
        return headline(panels(results), what="operators" if results.study.axis == "operator" else "settings")
    return headline(panels(results), GAP, "settings that memorised their images")


def headline(asked: Sequence[Panel], words: Words = ACCURACY, what: str = "settings") -> str:
    """What comparisons come to, in one sentence; data sets of which the same is to be said share it.

    Args:
        asked: by data set; at least one.
        words: how it reads.
        what: is compared.
    """
    clauses: dict[str, list[str]] = {}
    for panel in asked:
        clauses.setdefault(_clause(panel, words, what), []).append(panel.name)
    compared = [panel for panel in asked if not all(math.isnan(d.p) for d in panel.found)]  # by more than one seed
    level = [panel.name for panel in compared if panel.found and not any(d.found for d in panel.found)]
    if len(clauses) > 1 and level:  # what was found stands for itself, the rest in a word
        clauses = {clause: where for clause, where in clauses.items() if where[0] not in level}
        rest = names(level) if len(level) < 3 else f"the {len(level)} others"
        told = [f"{names(where)}: {clause}" for clause, where in clauses.items()] + [f"no difference found on {rest}"]
    else:
        told = [clause if len(asked) == 1 else f"{names(where)}: {clause}" for clause, where in clauses.items()]
    widest = unseen(asked)
    text = "; ".join(told) + (f" (less than about {widest:.1f} points cannot be seen)." if widest else ".")
    return first(text) if len(asked) == 1 else text


def _clause(panel: Panel, words: Words, what: str) -> str:
    found, reference = panel.found, quoted(panel.reference)
    if not panel.reference:
        return "what the others are compared with has not been run"
    if not found:
        return f"nothing to compare {reference} with"
    if all(math.isnan(d.p) for d in found):
        return "with one seed no difference can be found"
    found = [d for d in found if not math.isnan(d.p)]  # one seed is compared with nothing
    wanted, unwanted = ([d for d in found if d.side == side] for side in (words.sign, -words.sign))
    if not wanted and not unwanted:
        who = f"none of {len(found)} other {what} is" if len(found) > 1 else f"{quoted(found[0].row.title)} is not"
        return f"{who} found {words.neither} {reference}"
    parts: list[str] = []
    for group, (than, short) in ((wanted, words.wanted), (unwanted, words.unwanted)):
        if not group:
            continue
        most = max(abs(d.estimate.mean) for d in group)
        some = f"both other {what}" if len(group) == len(found) == 2 else f"{len(group)} of {len(found)} other {what}"
        who = quoted(group[0].row.title) if len(group) == 1 else some
        by = f", by {'up to ' if len(group) > 1 else ''}{100 * most:.1f} points"
        verb = "is" if len(group) == 1 else "are"
        parts.append(f"{who} {short}{by}" if parts else f"{who} {verb} found {than} {reference}{by}")
    text = ", and ".join(parts)
    if len(found) > 1 and len(parts) == 1:
        text += f", none {(words.unwanted if wanted else words.wanted)[1]}"
    return text


def quoted(title: str) -> str:
    """A title in a sentence, where it may be any words and have commas."""
    return f"“{title}”"


def unseen(asked: Sequence[Panel]) -> float:
    """Half the width of the widest interval among the comparisons that found nothing, in points; 0 where all did."""
    halves = [d.estimate.half for panel in asked for d in panel.found if not d.found and not math.isnan(d.p)]
    return 100 * max(halves, default=0.0)


def limits(results: Results, facts: Sequence[str]) -> list[str]:
    """What a reader may conclude from a study, and what not."""
    study = results.study
    counts = {len(row.results) for row in results.rows}
    many = seeds(max(counts)) if len(counts) == 1 else f"{min(counts)} to {seeds(max(counts))}"
    texts = [] if study.limits is None else study.limits(results)
    texts.append(
        f"What is said holds for what was run: one kind of network ({study.trials[0].network['name']}), {many}, and "
        + (f"these images. {' '.join(facts)}" if len(facts) <= 4 else f"{len(facts)} sets of images, listed under How.")
    )
    if widest := unseen(panels(results)):
        texts.append(
            f"“Not found” is not “equal”: with these seeds a difference of less than about {widest:.1f} points "
            "cannot be seen. The intervals are over seeds; that other test images would give other numbers is not in "
            "them."
        )
    texts += _tested(results)
    if study.preset == "cpu":
        texts.append(
            "The preset is cpu: a small network, few images, minutes of training. A result that was published at "
            "another size is neither confirmed nor refuted by it."
        )
    return texts


def _tested(results: Results) -> list[str]:
    """What one test image, and the choice of them, are worth: data sets with as many test images share a sentence."""
    by_number: dict[int, list[tuple[str, float]]] = {}
    for name, rows in results.panels.items():
        if n := results.tested.get(name):
            by_number.setdefault(n, []).append((name, max(row.mean(MEASURE) for row in rows)))
    texts = []
    for n, found in by_number.items():
        name, p = max(found, key=lambda one: sampling(one[1], n))  # where it matters most
        where = names([name for name, _ in found]) if len(found) <= 3 else f"each of {len(found)} data sets"
        which = "" if len(found) == 1 else f" (of {name})"
        texts.append(
            f"One of the {n:,} test images of {where} is {100 / n:.2f} points, and another test set of that size would "
            f"move an accuracy of {100 * p:.1f} %{which} by about {100 * sampling(p, n):.1f} points."
        )
    return texts
