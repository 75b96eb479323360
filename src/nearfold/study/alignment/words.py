"""A profile in plain words and as a table: what its measures are called, what they mean, what can be said of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nearfold.study.alignment.labels import BOTH, ITSELF, PROBES, RINGS
from nearfold.study.alignment.profile import Measure, Profile
from nearfold.study.document import Cell, Table

INPUTS: dict[str, tuple[str, str]] = {
    "window(3)": ("path", "a position from the other eight of its window of 3"),
    "window(5)": ("path", "from its window of 5"),
    "window(7)": ("path", "from its window of 7"),
    "distance 1": ("path", "from the four one position away"),
    "distance 2": ("path", "from the four two positions away"),
    "distance 4": ("path", "from the four four positions away"),
    "everywhere": ("path", "from the mean of all others"),
    "nearest": ("path", "from the nine whose surroundings look most alike"),
    "similar": ("path", "gain from the nine most alike in the other features"),
    "row(7)": ("shape", "from the six nearest of its row"),
    "column(7)": ("shape", "from the six nearest of its column"),
    "earlier": ("shape", "from the half of its window of 5 before it"),
    "later": ("shape", "from the half behind it"),
    "place": ("shape", "from its place alone"),
    "own": ("shape", "gain of a regression of its own for every place, over one for all"),
    "table": ("shape", "gain from all others, by their places, over its place alone"),
    "content": ("weight", "gain from weighing by content, over fixed weights in a window of 3"),
}
"""Which word a measure of the images is about, and what predicts a position there."""
LABELS: dict[str, str] = {
    "window(3) | box | kernel": "path",
    "window(5) | box | kernel": "path",
    "window(7) | box | kernel": "path",
    "window(9) | box | kernel": "path",
    "window(3, dilation=2) | box | kernel": "path",
    "deformable(3) | box | kernel": "path",
    "nearest(9, blend(0.5)) | ranked | kernel": "path",
    "nearest(9, euclidean) | ranked | kernel": "path",
    "all | row | mean": "path",
    BOTH: "path",
    "window((1, 7)) | box | kernel": "shape",
    "window((7, 1)) | box | kernel": "shape",
    RINGS: "shape",
    "window(5) | causal | kernel": "shape",
    "all | causal | s4d(4)": "shape",
    "all | row | table(1)": "shape",
    "window(5) | box | mean": "weight",
    "window(5) | box | softmax": "weight",
    "window(7) | box | generated(groups=1)": "weight",
    "all | row | softmax": "weight",
    "nearest(9, euclidean) | ranked | mean": "weight",
    "nearest(9, euclidean) | ranked | softmax": "weight",
    "scan(state=4) | causal | selective": "weight",
}
"""Which word a probe is about, beside others that share its other two."""
assert set(LABELS) == set(PROBES)


def tables(profile: Profile) -> list[Table]:
    """The measures of the images and of the labels, by word."""

    def line(word: str, said: str, measure: Measure, base: Measure | None = None) -> list[Cell]:
        numbers = [f"{measure.value:.3f}", f"{measure.error:.3f}"]
        if base is not None:
            numbers.append(f"{measure.value - base.value:+.3f}")
        return [Cell(text) for text in (word, said, *numbers)]

    inputs = [line(word, said, profile.inputs[name]) for name, (word, said) in INPUTS.items() if name in profile.inputs]
    base = profile.labels[ITSELF]
    labels = [line("", "nothing: position by position", base, base)]
    labels += [line(word, name, profile.labels[name], base) for name, word in LABELS.items()]
    return [
        Table("Of the images", ("word", "a position is predicted", "share explained", "error"), inputs, left=(0, 1)),
        Table("Of the labels", ("word", "what is read", "above chance", "error", "gain"), labels, left=(0, 1)),
    ]


def sentences(profile: Profile) -> list[str]:
    """What the profile says, a sentence each; only differences that are clear (`Measure.above`)."""
    return [*_of_inputs(profile.inputs), *_of_labels(profile.labels)]


def _of_inputs(found: Mapping[str, Measure]) -> Iterator[str]:
    near = found.get("window(3)")
    if near is not None and near.above():
        wide = "; a window of 7 tells more" if found["window(7)"].above(near) else "; a larger window adds little"
        yield f"path: neighbours explain {100 * near.value:.0f} % of a position{wide}."
    elif near is not None:
        yield "path: neighbours explain nothing of a position by fixed weights."
    if found["everywhere"].above() and near is not None:
        yield f"path: the mean of everywhere explains {100 * found['everywhere'].value:.0f} %."
    if "similar" in found and found["similar"].above():
        share = 100 * found["similar"].value
        yield f"path: positions alike in some features are alike in the others: {share:.0f} % of the variance."
    if "column(7)" in found:
        for one, other in (("row(7)", "column(7)"), ("column(7)", "row(7)")):
            if found[one].above(found[other]):
                a, b = (100 * found[name].value for name in (one, other))
                names = (name.removesuffix("(7)") for name in (one, other))
                yield "shape: {}s tell more of a position than {}s, {:.0f} % against {:.0f} %.".format(*names, a, b)
    if found["place"].above():
        yield f"shape: the place alone explains {100 * found['place'].value:.0f} % of a position."
    if found["own"].above():
        yield f"shape: the best weights differ from place to place: {100 * found['own'].value:.1f} % more."
    if found["content"].above():
        yield f"weight: weights by content explain {100 * found['content'].value:.0f} % more than fixed ones."


def _of_labels(found: Mapping[str, Measure]) -> Iterator[str]:
    base = found[ITSELF]
    best = max((name for name in found if name != ITSELF), key=lambda name: found[name].value)
    if not found[best].above(base):
        told = (
            "they are told from positions by themselves" if base.above() else "no frozen features tell them from chance"
        )
        yield f"labels: nothing that is read from other positions helps; {told}."
        return
    yield (
        f"labels: {best} tells them best, {100 * found[best].value:.0f} % of the way from chance to everything right; "
        f"positions by themselves reach {100 * base.value:.0f} %."
    )
    for word, pairs in COMPARED.items():
        for one, other, said in pairs:
            if found[one].above(found[other]) and found[one].above(base):
                yield f"{word}: {said} ({100 * found[one].value:.0f} % against {100 * found[other].value:.0f} %)."


COMPARED: dict[str, Sequence[tuple[str, str, str]]] = {
    "path": (
        ("window(7) | box | kernel", "window(3) | box | kernel", "a window of 7 tells more than one of 3"),
        ("window(9) | box | kernel", "window(7) | box | kernel", "a window of 9 more than one of 7"),
        ("all | row | mean", "window(7) | box | kernel", "everywhere tells more than a window of 7"),
        ("nearest(9, euclidean) | ranked | kernel", "window(7) | box | kernel", "what is alike more than what is near"),
        (BOTH, "nearest(9, euclidean) | ranked | kernel", "what stands beside the one most alike more than it alone"),
    ),
    "shape": (
        ("window((1, 7)) | box | kernel", "window((7, 1)) | box | kernel", "along rows more than down columns"),
        ("window((7, 1)) | box | kernel", "window((1, 7)) | box | kernel", "down columns more than along rows"),
        ("window(5) | box | kernel", RINGS, "directions matter"),
        ("window(5) | box | kernel", "window(5) | causal | kernel", "what comes after matters, too"),
        ("all | row | table(1)", "window(7) | box | kernel", "a number for every place tells more"),
    ),
    "weight": (
        ("window(5) | box | kernel", "window(5) | box | mean", "weights by offset more than equal ones"),
        ("all | row | softmax", "all | row | mean", "weights by content more than equal ones, over all positions"),
        ("window(5) | box | softmax", "window(5) | box | kernel", "in a window, weights by content more"),
        ("scan(state=4) | causal | selective", "all | causal | s4d(4)", "a state that chooses tells more"),
    ),
}  # fmt: skip
"""By word: a probe, another one, and what is said where the first tells clearly more."""
