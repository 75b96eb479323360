"""Measures of the labels: how well they are told from frozen features of each combination of words.

Shape legend: N images, P positions, D features of a position, M features of an image, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nearfold.study.alignment import frozen
from nearfold.study.alignment.frozen import Reads, Room, pooled
from nearfold.study.alignment.positions import BLOCKS, Positions, window
from nearfold.study.alignment.ridge import Task, beside, right, screened

BATCH = 64
ITSELF = "itself"
"""The measure for which nothing is read: position by position."""
RINGS = "window(5), by distance alone"
"""A window's slots averaged over all directions; no operator of the notation."""
BOTH = "branch(0.5, nearest(9, euclidean) | ranked | kernel, window(3) | box | kernel)"
"""By content, and from there in space."""
READS: dict[str, Reads] = {
    "window(3) | box | kernel": frozen.offsets(*window(3)),
    "window(5) | box | kernel": frozen.offsets(*window(5)),
    "window(7) | box | kernel": frozen.offsets(*window(7)),
    "window(9) | box | kernel": frozen.offsets(*window(9)),
    "window(3, dilation=2) | box | kernel": frozen.offsets(*window(3, 2)),
    "window(5) | box | mean": frozen.averaged(*window(5)),
    RINGS: frozen.rings,
    "window((1, 7)) | box | kernel": frozen.offsets(*window((1, 7))),
    "window((7, 1)) | box | kernel": frozen.offsets(*window((7, 1))),
    "window(5) | causal | kernel": frozen.offsets(*(at for at in window(5) if at <= (0, 0))),
    "window(5) | box | softmax": frozen.attention(5),
    "deformable(3) | box | kernel": frozen.deformed,
    "all | row | mean": frozen.everywhere,
    "all | row | softmax": frozen.attention(),
    "nearest(9, euclidean) | ranked | kernel": frozen.nearest(),
    "nearest(9, euclidean) | ranked | softmax": frozen.attention(count=frozen.NEAREST),
    "nearest(9, euclidean) | ranked | mean": frozen.nearest(ranked=False),
    BOTH: frozen.nearest(around=True),
    "nearest(9, blend(0.5)) | ranked | kernel": frozen.nearest(0.5),
    "all | causal | s4d(4)": frozen.decaying,
}
"""What is read, by the operator that reads so."""


def _both(name: str, reads: Reads) -> Reads:
    return lambda x_NPD, room: pooled(x_NPD, reads(x_NPD, room), room, room.draws(name))


def _products(x_NPD: Tensor, room: Room) -> Tensor:
    """A kernel made from the position's own features: its products with what stands at the offsets, and no units."""
    name = "generated"
    return pooled(x_NPD, frozen.offsets(*window(7))(x_NPD, room), room, room.draws(name), units=False)


PROBES: dict[str, Reads] = {
    **{name: _both(name, reads) for name, reads in READS.items()},
    "window(7) | box | generated(groups=1)": _products,
    "all | row | table(1)": frozen.by_place,
    "scan(state=4) | causal | selective": frozen.selective,
}
"""Features of images (N, M), by the operator whose words they are made by."""
Progress = Callable[[int, int, str], None]


def silent(done: int, of: int, name: str) -> None:
    """Tell nobody."""


def of_labels(at: Positions, progress: Progress = silent) -> dict[str, Tensor]:
    """Accuracy above chance, by the block, of ridge classifiers on frozen features: float64 (BLOCKS,) each.

    `ITSELF` is from what every position has; each probe's is from that and what its words read. Zero is chance, and one
    is everything right: (accuracy - 1/K) / (1 - 1/K) of K classes.

    Args:
        at: the images.
        progress: is told how many probes are done, of how many, and which one comes next.
    """
    room = frozen.room_of(at)
    task = Task(at.labels, at.classes, at.folds)
    own = screened(_features(frozen.itself, at, room), task)
    alone = right(own, task)
    chance = 1 / at.classes
    found = {ITSELF: _above(alone, at, chance)}
    for number, (name, make) in enumerate(PROBES.items()):
        progress(number, len(PROBES), name)
        found[name] = _above(beside(own, screened(_features(make, at, room), task), alone, task), at, chance)
    progress(len(PROBES), len(PROBES), "")
    return found


def _above(good_N: Tensor, at: Positions, chance: float) -> Tensor:
    """Accuracy above chance in every block."""
    counts = torch.zeros(BLOCKS, dtype=torch.float64).index_add(0, at.blocks, good_N.double())
    return (counts / torch.bincount(at.blocks, minlength=BLOCKS) - chance) / (1 - chance)


def _features(make: Reads, at: Positions, room: Room) -> Tensor:
    return torch.cat([make(x_NPD, room) for x_NPD in at.x_NPD.split(BATCH)])
