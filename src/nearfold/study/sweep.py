"""How few positions the attention of a trained model needs: accuracy against latency over k, without training.

Every setting lets some of the model's attention layers read the k best keys instead of all. Held-out images are in
two halves: one chooses, the other reports. Latency is measured in turn with the model as it was. The model is put back
after every setting, however it ends.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import Basic, Operation
from nearfold.grammar.word import with_arguments
from nearfold.grammar.words import All, Nearest, Ranked, Softmax
from nearfold.look.derivative import evaluating
from nearfold.study.measure import timed
from nearfold.study.statistics import Estimate, changed_share
from nearfold.surgery import Rule, Site, convert

ROUNDS = 15
"""How often the model as it was and the changed one are timed, in turn."""
WARM_UP = 2
AGREES = 1e-3
"""Largest relative change of the output where the new layers read every position, as the old ones do."""


@dataclass(frozen=True)
class Images:
    """Held-out images as the model takes them, (N, C, H, W) floating, and their labels (N,) int64.

    The first half chooses a setting, the second reports.
    """

    x: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.x) < 2:
            raise ValueError(f"two images are needed, one to choose by and one to report on; got {len(self.x)}")

    @property
    def half(self) -> int:
        """How many choose."""
        return len(self.labels) // 2


@dataclass(frozen=True)
class Setting:
    """Which layers read how many positions."""

    k: int
    where: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """A setting and what it came to.

    Attributes:
        setting: the setting.
        chosen: change of accuracy on the images that choose.
        reported: change of accuracy on the others.
        accuracy: on these others.
        latency_ms: median, of one call.
        before_ms: median of the model as it was, timed in turn with it.
        faster: old time over new time: lower quartile, median and upper quartile over the rounds.
    """

    setting: Setting
    chosen: Estimate
    reported: Estimate
    accuracy: float
    latency_ms: float
    before_ms: float
    faster: tuple[float, float, float]


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to.

    Attributes:
        layers: (name, positions) of the attention layers.
        accuracy: of the model as it was, on the images that report.
        most: share of the most frequent class among these, which naming it always would get.
        images: how many these are.
        batch: images of a timed call.
        found: the settings.
    """

    layers: Sequence[tuple[str, int]]
    accuracy: float
    most: float
    images: int
    batch: int
    found: Sequence[Measured]

    @property
    def knows(self) -> bool:
        """Whether the model as it was is better than naming the most frequent class, by two standard errors."""
        return self.accuracy - 2 * math.sqrt(self.accuracy * (1 - self.accuracy) / self.images) > self.most

    def recommended(self, keep: float) -> Measured | None:
        """The fastest setting that is faster and, on the images that choose, loses no more than `keep`, a share.

        Faster: in three of four rounds. Loses no more: by the lower end of the interval.
        """
        fitting = [m for m in self.found if m.faster[0] > 1 and m.chosen.low >= -keep]
        return max(fitting, key=lambda m: m.faster[1], default=None)


def attention(model: nn.Module, input_size: tuple[int, ...]) -> list[tuple[str, int]]:
    """The attention layers that could read fewer positions: name, and how many they read now.

    Args:
        model: any.
        input_size: channels and grid of an image.

    Raises:
        ValueError: the model has none, or does not run on such an image.
    """
    found: list[tuple[str, int]] = []

    def note(site: Site) -> None:
        if (most := _reads(site)) is not None and most > 1:
            found.append((site.name, most))

    report = convert(model, Rule(note), input_size=input_size)
    if not found:
        there = ", ".join(dict.fromkeys(row.operation or row.layer for row in report.rows)) or "no layer that mixes any"
        raise ValueError(
            "the model has no attention that reads all positions, or the nearest, and could read fewer; its layers "
            f"that mix positions: {there[:300]}"
        )
    return found


def _reads(site: Site) -> int | None:
    """How many positions a layer's softmax goes over, where that could be fewer."""
    op = site.operation
    if not (isinstance(op, Basic) and isinstance(op.weight.rho, Softmax) and op.weight.kernel is None):
        return None
    if not isinstance(op.path, All | Nearest) or op.path.cross or op.path.stride != 1 or site.positions is None:
        return None
    return min(getattr(op.path, "k", site.positions), site.positions)


def fewer(op: Operation, k: int) -> Operation:
    """The operation over the k best keys, by its own similarity.

    >>> from nearfold import parse
    >>> str(fewer(parse("all | row | softmax(heads=2)"), 4))
    'nearest(4, scaled) | ranked | softmax(heads=2)'
    >>> str(fewer(parse("nearest(9, dot) | ranked | softmax"), 4))
    'nearest(4, dot) | ranked | softmax'
    """
    assert isinstance(op, Basic), op
    path = op.path
    new = with_arguments(path, k=k) if hasattr(path, "k") else Nearest(k, path.similarity)
    return dataclasses.replace(op, path=new, shape=Ranked())


def settings(layers: Sequence[tuple[str, int]], ks: Sequence[int] = ()) -> list[Setting]:
    """Every k in all layers, in the first half of them and in the second.

    Args:
        layers: from `attention`.
        ks: none: a half, a quarter, an eighth and a sixteenth of the positions.

    >>> [(s.k, s.where) for s in settings([("a", 8), ("b", 8), ("c", 8)], [4])]
    [(4, 'all 3'), (4, 'the first 1'), (4, 'the last 2')]
    """
    most = max(n for _, n in layers)
    ks = ks or sorted({max(1, math.ceil(most / part)) for part in (2, 4, 8, 16)}, reverse=True)
    names, middle = [name for name, _ in layers], len(layers) // 2
    groups = {f"all {len(names)}": names}
    if middle:
        groups |= {f"the first {middle}": names[:middle], f"the last {len(names) - middle}": names[middle:]}
    reads = dict(layers)
    found = []
    for k in ks:
        for where, group in groups.items():
            if there := tuple(name for name in group if reads[name] > k):
                found.append(Setting(k, where, there))
    return found


def sweep(
    model: nn.Module,
    images: Images,
    *,
    ks: Sequence[int] = (),
    batch: int = 1,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """Measure a trained model at every setting. Nothing is trained, and the model is left as it was.

    Args:
        model: (B, C, H, W) -> scores (B, classes), or an object with them as ``logits``.
        images: held out, on the model's device.
        ks: how many positions to read; none: as `settings` has it.
        batch: images of a timed call.
        say: gets a line a setting.

    Raises:
        ValueError: the model has no attention to sweep, does not give a score for every class, or is not itself any
            more when its layers are exchanged for ones that read every position.
    """
    with evaluating(model), torch.no_grad():
        right = _right(model, images)
        size = tuple(images.x.shape[1:])
        layers = attention(model, size)
        _require_same(model, layers, images.x[:4], size)
        found = []
        for setting in settings(layers, ks):
            found.append(_measure(model, setting, images, right, batch))
            if say is not None:
                say(f"k = {setting.k} in {setting.where} attention layers")
        labels, told = images.labels[images.half :], right[images.half :]
        most = torch.bincount(labels).max().item() / len(labels)
        return Sweep(layers, told.double().mean().item(), most, len(labels), batch, found)


def _right(model: nn.Module, images: Images) -> Tensor:
    """Which images the model tells right, (N,) bool."""
    found = []
    classes = int(images.labels.max()) + 1
    for x, labels in zip(images.x.split(64), images.labels.split(64), strict=True):
        scores = _scores(model, x)
        if scores.ndim != 2 or len(scores) != len(x) or scores.shape[1] < classes:
            raise ValueError(
                f"the model must give a score for each of {classes} classes, (B, {classes}); for {tuple(x.shape)} it "
                f"gave {tuple(scores.shape)}"
            )
        found.append(scores.argmax(1) == labels)
    return torch.cat(found)


def _scores(model: nn.Module, x: Tensor) -> Tensor:
    output: Any = model(x)
    scores = getattr(output, "logits", output)
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"the model must give a tensor of scores, or an object with logits; got {type(scores).__name__}"
        )
    return scores


def _rule(names: Sequence[str], k: int | None) -> Rule:
    """The layers of these names read k positions; None: all that they read now."""

    def to(site: Site) -> Operation:
        reads = _reads(site)
        assert reads is not None, site.name
        return fewer(site.operation, reads if k is None else k)

    return Rule(to, where=lambda site: site.name in names)


def _require_same(model: nn.Module, layers: Sequence[tuple[str, int]], x: Tensor, size: tuple[int, ...]) -> None:
    names = [name for name, _ in layers]
    old = _scores(model, x)
    report = convert(model, _rule(names, None), input_size=size)
    try:
        refused = [
            row for row in report.rows if row.name in names and (row.status != "replaced" or not _kept(row.grade))
        ]
        if refused:
            why = refused[0].reason or refused[0].grade
            raise ValueError(f"{len(refused)} attention layers cannot read fewer positions ({refused[0].name}: {why})")
        new = _scores(model, x)
    finally:
        report.undo()
    change = ((new - old).abs().max() / old.abs().max().clamp_min(1e-30)).item()
    if not change <= AGREES:
        raise ValueError(
            f"with other layers that read every position too, the model's output changes by {change:.2g} of its "
            "largest score: what a smaller k changes could not be told from that. Is there dropout in evaluation, or a "
            "mask that depends on the input?"
        )


def _kept(grade: str) -> bool:
    return grade in ("exact", "approximate")


def _measure(model: nn.Module, setting: Setting, images: Images, right: Tensor, batch: int) -> Measured:
    x = images.x[:batch]

    def call() -> None:
        _scores(model, x)

    old, new = [], []
    report = convert(model, _rule(setting.names, setting.k), input_size=tuple(x.shape[1:]))
    changed = True
    try:
        now = _right(model, images)
        for _ in range(ROUNDS + WARM_UP):
            report.undo()
            changed = False
            old.append(1000 * timed(call, images.x.device))
            report.apply()
            changed = True
            new.append(1000 * timed(call, images.x.device))
    finally:
        if changed:
            report.undo()
    old, new = old[WARM_UP:], new[WARM_UP:]
    half = images.half
    ratios = statistics.quantiles((a / b for a, b in zip(old, new, strict=True)), n=4)
    return Measured(
        setting,
        _change(right[:half], now[:half]),
        _change(right[half:], now[half:]),
        now[half:].double().mean().item(),
        statistics.median(new),
        statistics.median(old),
        (ratios[0], ratios[1], ratios[2]),
    )


def _change(before: Tensor, after: Tensor) -> Estimate:
    return changed_share(int((after & ~before).sum()), int((before & ~after).sum()), len(before)).cut(-1.0, 1.0)
