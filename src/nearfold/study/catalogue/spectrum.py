"""The main job: one small network, its mixing layer swapped from convolution to attention, everything else equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nearfold.grammar import CATALOGUE
from nearfold.models import stem_stride
from nearfold.study.catalogue.matched import SHAPES
from nearfold.study.catalogue.presets import Preset
from nearfold.study.catalogue.readings import gap
from nearfold.study.compare import accuracy, against_reference, differences, points
from nearfold.study.document import count, first
from nearfold.study.grid import Data, Study, Trial
from nearfold.study.headline import panels
from nearfold.study.results import Results, Row
from nearfold.train import Recipe


@dataclass(frozen=True)
class Stop:
    """One operator of the spectrum.

    Attributes:
        name: what it is called on the command line.
        title: what it is called in tables and plots.
        notation: the Operation.
        family: a key of `nearfold.study.plots.FAMILIES`.
    """

    name: str
    title: str
    notation: str
    family: str


def _known(name: str, title: str, family: str) -> Stop:
    return Stop(name, title, CATALOGUE[name].notation, family)


def _blend(lam: float) -> Stop:
    notation = f"nearest(9, blend({lam:g}), self) | ranked | kernel"
    return Stop(f"blend-{lam:g}", f"blend λ = {lam:g}", notation, "between")


SPECTRUM: tuple[Stop, ...] = (
    _known("conv", "convolution 3x3", "space"),
    _known("separable", "depthwise + pointwise", "space"),
    *(_blend(lam) for lam in (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)),
    _known("convnn", "ConvNN all", "features"),
    _known("convnn_random", "ConvNN random 32", "features"),
    _known("kvt", "KVT k = 9", "features"),
    _known("attention", "self-attention", "features"),
    _known("branch", "branch conv + ConvNN", "both"),
    _known("acmix", "ACmix", "both"),
)
"""The operators in their order along the spectrum, from space to features; last, those that do both."""

RECIPE = Recipe(epochs=6, batch_size=32, lr=5e-3, weight_decay=0.05, warmup_epochs=1.0)
"""Equal for every operator and every data set. No augmentation: it would hide the gap that is measured."""

RECIPES = {"cpu": RECIPE, "strong": replace(RECIPE, epochs=12), "paper": replace(RECIPE, epochs=30)}
"""By preset. Nothing about this experiment was published: the larger ones are ours, too."""

DEPTH, WIDTH, SEEDS = 2, 32, 3
"""Blocks of the network, so mixing layers in a row; its channels; runs of every operator."""


def spectrum(p: Preset) -> Study:
    """From convolution to attention."""
    sizes = {data: (data.image_size,) if data.image_size else SHAPES[data.name][1:] for data in p.data}
    return along(sizes, RECIPES[p.name], preset=p.name)


def along(
    sizes: Mapping[Data, Sequence[int]],
    recipe: Recipe,
    *,
    preset: str = "cpu",
    seeds: int = SEEDS,
    width: int = WIDTH,
    stops: Sequence[Stop] = SPECTRUM,
) -> Study:
    """The study on any data.

    Args:
        sizes: height and width of the images, by data set.
        recipe: of every run, but for the seed.
        preset: its name.
        seeds: as in `Study`.
        width: channels of the network.
        stops: the operators, at least one; convolution, or else the first, is what the others are compared with.
    """
    trials = [
        Trial(
            {"data": data.name, "operator": stop.title},
            {
                "name": "spectrum",
                "operation": stop.notation,
                "width": width,
                "depth": DEPTH,
                "stride": stem_stride(size),
            },
            data,
            recipe,
        )
        for data, size in sizes.items()
        for stop in stops
    ]
    reference = next((stop for stop in stops if stop.name == "conv"), stops[0])
    return Study(
        "spectrum",
        preset,
        "From convolution to attention",
        "A convolution reads its neighbours in space. Self-attention reads whatever looks alike, wherever it is. Both "
        "are one operator: look somewhere (path), in some form (shape), and value what is found (weight). Between the "
        "two ends lies a spectrum. What does moving along it change, when nothing else changes: accuracy, the gap "
        "between training and test, and cost?",
        "Convolution and self-attention are two ends of k-nearest-neighbour aggregation, and the way between them is "
        "continuous (arXiv 2511.14137). No numbers were published for these networks.",
        trials,
        seeds,
        "operator",
        reference.title,
        (
            f"The network is small: a convolutional stem, {DEPTH} residual blocks of {width} channels (norm, the "
            "operator, then a pointwise MLP), average pooling, a linear classifier. Only the operator changes. A "
            "position code is added after the stem, for every operator alike.",
            "The recipe is equal for every operator; nothing was tuned for one of them. That of six epochs was chosen "
            "once, among about nine (epochs, batch, learning rate, width), by the test accuracy of convolution, ConvNN "
            "and attention on the digits: read accuracies on digits as slightly optimistic. A recipe that suits one "
            "operator better than another is part of what is compared.",
            "FLOPs: one image, forward, evaluation mode; random candidates are drawn in training only, so they are not "
            "cheaper here. Images/s: forward and backward, the median of up to twenty steps on the machine named below "
            "(CPU: one thread). Peak MiB: the most memory allocated at one time in one training step beyond parameters "
            "and batch.",
        ),
        answer=_answer,
        limits=_limits,
        cost=True,
        figure="spectrum",
        families={stop.title: stop.family for stop in SPECTRUM},
        looks=True,
    )


def _limits(results: Results) -> list[str]:
    """What is said of the layer that this project is built around, wherever it was compared."""
    ours = next(stop.title for stop in SPECTRUM if stop.name == "convnn")
    texts = []
    for panel in panels(results):
        for d in (d for d in panel.found if d.row.title == ours and not math.isnan(d.p)):
            text = (
                f"{ours}, the layer of nearest neighbours that this project is built around, is "
                f"{'' if d.found else 'not '}found different from {results.study.reference} on {panel.name}: "
                f"{points(d.estimate)}"
            )
            if not (d.found or d.estimate.low <= 0 <= d.estimate.high):
                many = f"among {len(panel.found)} comparisons such an interval is to be expected"
                text += f" (taken alone; {many}, and it is not counted)"
            texts.append(
                text + ". That is one small network, trained briefly on few small images by one recipe, where every "
                "operator stands alone in its layer. It does not say how a layer does in a large network, on large "
                "images, or beside convolutions, as it was published (branch, ratio 1/2); the studies of these claims "
                "are listed by nearfold study list."
            )
    return texts


def _answer(results: Results) -> list[str]:
    """What was found against convolution, then the way between the ends, the gap and the cost."""
    paragraphs = against_reference(results)
    for name, rows in results.panels.items():
        texts = [_between(rows, results), _gap(rows), _cost([row for row in rows if row.cost])]
        paragraphs += [f"{name}: {text}" for text in texts if text]
    return paragraphs


def _test(row: Row) -> str:
    return accuracy(row.estimate("test_accuracy"))


def _between(rows: Sequence[Row], results: Results) -> str:
    families = results.study.families
    way = [row for row in rows if families.get(row.trial.labels["operator"]) == "between"]
    if len(way) < 2:
        return ""
    start, end = way[0], way[-1]
    top = max(way, key=lambda row: row.mean("test_accuracy"))
    text = (
        f"on the way from space to features with one and the same kernel, accuracy goes from {_test(start)} "
        f"({start.title}) to {_test(end)} ({end.title}), and is highest "
    )
    text += "at an end of the way" if top in (start, end) else f"on the way, {_test(top)} ({top.title})"
    ends = [d for d in differences(way, start) if d.row is end and not math.isnan(d.p)]
    return text + "".join(f"; the ends differ by {points(d.estimate)}" for d in ends) + "."


def _gap(rows: Sequence[Row]) -> str:
    def train(row: Row) -> float:
        return row.mean("train_accuracy")

    ranked = sorted(rows, key=lambda row: row.mean("gap"))
    low, high = ranked[0], ranked[-1]
    if low is high:
        return f"the gap between train and test accuracy is {gap(low, 'gap')}."
    text = (
        f"the gap between train and test accuracy is smallest for {low.title}, {gap(low, 'gap')} (train accuracy "
        f"{100 * train(low):.1f} %), and largest for {high.title}, {gap(high, 'gap')} ({100 * train(high):.1f} %)."
    )
    if train(low) < train(high) - 0.01:
        text += (
            f" {first(low.title)} also fits its training images less well: part of its small gap is a "
            "lower ceiling, not better generalization."
        )
    return text


def _cost(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return ""
    slow, *_, fast = sorted(rows, key=lambda row: row.cost["images_per_second"])
    lean, *_, heavy = sorted(rows, key=lambda row: row.cost["flops"])
    return (
        f"the fastest to train is {fast.title} ({count(fast.cost['images_per_second'])} images/s), "
        f"{fast.cost['images_per_second'] / slow.cost['images_per_second']:.1f} times as fast as {slow.title}. FLOPs "
        f"per image range from {count(lean.cost['flops'])} ({lean.title}) to {count(heavy.cost['flops'])} "
        f"({heavy.title})."
    )


STUDIES = (spectrum,)
