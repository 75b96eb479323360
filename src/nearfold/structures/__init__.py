"""Classification tasks of known structure, each made from a seed: what a word of an operator is good for.

``made:NAME`` is a data set wherever nearfold takes one: ``nearfold train --data made:pairs``. See docs/alignment.md.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from nearfold.options import meant
from nearfold.structures import patterns, reading, real, sequences
from nearfold.structures.structure import Structure

PREFIX = "made:"
TRAIN, TEST = 6000, 2000
"""Images of a task."""

STRUCTURES: dict[str, Structure] = {
    **patterns.STRUCTURES, **reading.STRUCTURES, **sequences.STRUCTURES, **real.STRUCTURES,
}  # fmt: skip
"""The tasks by name."""


def structure(source: str) -> Structure:
    """The task that a source ``made:NAME`` names.

    Raises:
        ValueError: there is none of this name.

    >>> structure("made:pairs").title
    'same or different'
    """
    name = source.removeprefix(PREFIX)
    if name not in STRUCTURES:
        raise ValueError(f"no task is called {source!r}: {PREFIX}{', '.join(STRUCTURES)}{meant(name, STRUCTURES)}")
    return STRUCTURES[name]


@functools.lru_cache(maxsize=4)
def made(source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The images and labels of a task: uint8 (N, C, H, W) and int64 (N,), `TRAIN` and `TEST` of them; always the same.

    Raises:
        ValueError: there is no such task.

    >>> images, labels = made("made:pairs")["train"]
    >>> images.shape, images.dtype, labels.unique().tolist()
    (torch.Size([6000, 4, 8, 8]), torch.uint8, [0, 1])
    """
    task = structure(source)
    splits = {}
    for part, count in (("train", TRAIN), ("test", TEST)):
        draw = task.held_out if part == "test" and task.held_out else task.draw
        seed = hashlib.blake2b(f"{source} {part}".encode(), digest_size=8).digest()
        images, labels = draw(count, torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1))
        splits[part] = ((255 * images.clamp(0, 1)).round().to(torch.uint8), labels)
    return splits


__all__ = ["PREFIX", "STRUCTURES", "Structure", "made", "structure"]
