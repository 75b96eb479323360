"""Measures of the labels: how well they are told from frozen features of each combination of words.

Shape legend: N images, P positions, D features of a position, Q what is read, M features of an image, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfold.study.alignment import frozen
from nearfold.study.alignment.frozen import Room, pooled
from nearfold.study.alignment.positions import BLOCKS, Positions, window
from nearfold.study.alignment.ridge import KEPT, OWN, right

BATCH = 64


@dataclass(frozen=True)
class Probe:
    """Frozen features of one combination of words.

    Attributes:
        path: the primitive of its path (`Word.primitives`), by which operators find it.
        shape: that of its shape.
        weight: that of its weight.
        reach: side of its window in positions, or 0.
        features: x (N, P, D), room -> (N, M).
    """

    path: str
    shape: str
    weight: str
    features: Callable[[Tensor, Room], Tensor]
    reach: int = 0
    spread: int = 1


def _both(name: str, reads: frozen.Reads) -> Callable[[Tensor, Room], Tensor]:
    return lambda x, room: pooled(x, reads(x, room), room, room.draws(name))


def _fixed(name: str, reads: frozen.Reads) -> Callable[[Tensor, Room], Tensor]:
    return lambda x, room: frozen.mixed(x, reads(x, room), room, room.draws(name))


def _products(name: str, reads: frozen.Reads) -> Callable[[Tensor, Room], Tensor]:
    return lambda x, room: pooled(x, reads(x, room), room, room.draws(name), units=False)


def _sliding(shape: str, weight: str, name: str, reads: frozen.Reads, reach: int, made: object = _both, spread: int = 1) -> Probe:  # fmt: skip
    return Probe("STATIC_SLIDING", shape, weight, made(name, reads), reach, spread)  # type: ignore[operator]


BOX, KERNEL, MEAN, ATTENTION = "DENSE_SQUARE", "SHARED_KERNEL", "IDENTITY", "DYNAMIC_ATTENTION"
PROBES: dict[str, Probe] = {
    **{
        f"window({size}) | box | kernel": _sliding(
            BOX, KERNEL, f"window{size}", frozen.offsets(*window(size)), size
        )
        for size in (3, 5, 7, 9)
    },
    "window(3, dilation=2) | box | kernel": _sliding(
        BOX, KERNEL, "dilated", frozen.offsets(*window(3, 2)), 5, spread=2
    ),
    "window(5) | box | mean": _sliding(BOX, MEAN, "mean", frozen.averaged(*window(5)), 5),
    "window(5) | rings | kernel": _sliding("RINGS", KERNEL, "rings", frozen.rings, 5),
    "window((1, 7)) | box | kernel": _sliding("ROW", KERNEL, "row", frozen.offsets(*window((1, 7))), 7),
    "window((7, 1)) | box | kernel": _sliding("COLUMN", KERNEL, "column", frozen.offsets(*window((7, 1))), 7),
    "window(5) | causal | kernel": _sliding(
        "CAUSAL_1D", KERNEL, "causal", frozen.offsets(*(at for at in window(5) if at <= (0, 0))), 5
    ),
    "window(7) | box | generated": _sliding(
        BOX, "DYNAMIC_KERNEL", "generated", frozen.offsets(*window(7)), 7, _products
    ),
    "window(5) | box | softmax": _sliding(BOX, ATTENTION, "local", frozen.attention(5), 5),
    "deformable(3) | box | kernel": Probe("CONTENT_AWARE", BOX, KERNEL, _both("deformable", frozen.deformed), 3),
    "all | row | mean": Probe("GLOBAL_INDEXED", "FULL_ROW", MEAN, _both("all", frozen.everywhere)),
    "all | row | softmax": Probe("GLOBAL_INDEXED", "FULL_ROW", ATTENTION, _both("attention", frozen.attention())),
    "all | row | table": Probe("GLOBAL_INDEXED", "FULL_ROW", KERNEL, frozen.by_place),
    "nearest(9) | ranked | kernel": Probe("CONTENT_AWARE", "RANKED", KERNEL, _both("nearest", frozen.nearest())),
    "nearest(9) | ranked | mean": Probe(
        "CONTENT_AWARE", "RANKED", MEAN, _both("nearest mean", frozen.nearest(ranked=False))
    ),
    "nearest(9, blend(0.5)) | ranked | kernel": Probe(
        "BLEND", "RANKED", KERNEL, _both("blend", frozen.nearest(0.5))
    ),
    "scan | causal | fading": Probe("RECURRENT", "CAUSAL_1D", KERNEL, _both("fading", frozen.fading)),
    "scan | causal | selective": Probe("RECURRENT", "CAUSAL_1D", "SELECTIVE", frozen.selective),
}
ITSELF = "itself"
"""The measure that stands for nothing read: position by position."""
Progress = Callable[[int, int, str], None]


def of_labels(at: Positions, progress: Progress = lambda done, of, name: None) -> dict[str, Tensor]:
    """Accuracy above chance, by the block, of ridge classifiers on frozen features: float64 (BLOCKS,) each.

    `ITSELF` is from what every position has; each probe's is from that and what its words read. Zero is chance, and one
    is everything right: (accuracy - 1/K) / (1 - 1/K) of K classes.

    Args:
        at: the images.
        progress: is told how many probes are done, of how many, and what comes next.
    """
    room = frozen.room_of(at)
    own = _features(frozen.itself, at, room)
    chance = 1 / at.classes
    found = {}
    for number, (name, probe) in enumerate([(ITSELF, None), *PROBES.items()]):
        progress(number, len(PROBES) + 1, name)
        groups = [own] if probe is None else [own, _features(probe.features, at, room)]
        keep = [OWN + KEPT] if probe is None else [OWN, KEPT]
        good = right(groups, keep, at.labels, at.classes, at.folds).double()
        counts = torch.zeros(BLOCKS, dtype=torch.float64).index_add(0, at.blocks, good)
        found[name] = (counts / torch.bincount(at.blocks, minlength=BLOCKS) - chance) / (1 - chance)
    progress(len(PROBES) + 1, len(PROBES) + 1, "")
    return found


def _features(make: Callable[[Tensor, Room], Tensor], at: Positions, room: Room) -> Tensor:
    return torch.cat([make(x_NPD, room) for x_NPD in at.x_NPD.split(BATCH)])
