"""Tasks on maps whose answer is somewhere else: at an offset, anywhere, by content, or in all that looks alike.

Shape legend: N images, S pixels a side, P = S * S positions, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.structures.structure import FAINT, Structure, balanced, below, distinct, labels, noisy, one_hot, one_of

SIDE = 8
POSITIONS = SIDE * SIDE
KINDS = 4
OFFSET = (2, -3)
"""Rows down and columns to the right, from the mark to the answer."""
KEY = 6
"""Bits of a key."""
RIVALS = 4
"""Keys on a map of retrieval; one of them is the asked one."""
GROUPS = 4
SPREAD = 1.0
"""Of a position's value around that of its group, which is -1 or 1."""


def as_maps(values_NPC: Tensor, rng: torch.Generator) -> Tensor:
    """Values in -1..1 or 0..1, kept away from the border, with noise: (N, C, S, S)."""
    return noisy(0.5 + 0.25 * values_NPC.mT.unflatten(2, (SIDE, SIDE)), rng, FAINT)


def pairs(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two marks anywhere, each of one of four kinds: are they of the same kind?"""
    drawn = labels(count, 2, rng)
    first = below(KINDS, count, rng)
    second = torch.where(drawn == 1, first, (first + 1 + below(KINDS - 1, count, rng)) % KINDS)
    values = torch.zeros(count, POSITIONS, KINDS)
    at = distinct(count, 2, POSITIONS, rng)
    values[torch.arange(count), at[:, 0], first] = 1
    values[torch.arange(count), at[:, 1], second] = 1
    return as_maps(2 * values, rng), drawn


def offset(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every position has one of four values, one position a mark: what stands 2 rows below and 3 columns before it?"""
    drawn = labels(count, KINDS, rng)
    field = balanced(count, POSITIONS, KINDS, rng).view(count, SIDE, SIDE)
    down, right = OFFSET
    answers = field[:, down:, : SIDE + right] == drawn[:, None, None]  # that a mark on the map leads to
    place = one_of(answers.flatten(1), rng)
    row, column = place // (SIDE + right), place % (SIDE + right) - right
    every = torch.arange(count)
    field = field.flatten(1)
    mark = torch.zeros(count, POSITIONS, 1)
    mark[every, row * SIDE + column] = 1
    return as_maps(torch.cat([2 * mark, one_hot(field, KINDS)], 2), rng), drawn


def retrieval(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A marked position shows a key, four others a key and a value: which value has the one with the same key?

    Keys are six signs, new on every map, and the four differ, as the values do.
    """
    drawn = labels(count, KINDS, rng)
    keys = distinct(count, RIVALS, 2**KEY, rng)
    signs = 2 * ((keys[..., None] >> torch.arange(KEY)) & 1).float() - 1
    at = distinct(count, RIVALS + 1, POSITIONS, rng)
    value = (
        drawn[:, None] + torch.cat([torch.zeros(count, 1, dtype=torch.long), 1 + distinct(count, 3, 3, rng)], 1)
    ) % KINDS
    every = torch.arange(count)[:, None]
    values = torch.zeros(count, POSITIONS, 1 + KEY + KINDS)
    values[every, at[:, 1:], 1 : 1 + KEY] = signs
    values[every, at[:, 1:], 1 + KEY :] = 2 * one_hot(value, KINDS)
    values[every[:, 0], at[:, 0], 1 : 1 + KEY] = signs[:, 0]
    values[every[:, 0], at[:, 0], 0] = 2
    return as_maps(values, rng), drawn


def alike(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions fall into four groups of one look each, new on every map; a group has a sign, seen in much noise.

    A group has 16 positions; two groups have one sign, two the other.

    Which sign has the group of the marked position? Alone, a position tells it in five of six cases; the mean over its
    group nearly always.
    """
    drawn = labels(count, 2, rng)
    group = balanced(count, POSITIONS, GROUPS, rng)
    looks = distinct(count, GROUPS, 2**KEY, rng)
    signs = 2 * ((looks[..., None] >> torch.arange(KEY)) & 1).float() - 1
    sign = balanced(count, GROUPS, 2, rng)
    every = torch.arange(count)
    at = one_of(sign.gather(1, group) == drawn[:, None], rng)
    sign = 2 * sign.float() - 1
    shown = signs[every[:, None], group]
    seen = sign.gather(1, group) + SPREAD * torch.randn(count, POSITIONS, generator=rng)
    mark = torch.zeros(count, POSITIONS)
    mark[every, at] = 2
    return as_maps(torch.cat([mark[..., None], shown, 0.5 * seen[..., None]], 2), rng), drawn


STRUCTURES = {
    "pairs": Structure(
        "same or different", "all", "row: any two places", "softmax",
        "compares every mark with every other", "all | row | softmax(heads=4)", ("different", "same"),
        (KINDS, SIDE, SIDE), pairs,
    ),
    "offset": Structure(
        "a fixed offset away", "window(7), one slot of it", "box", "kernel",
        "reads one offset", "window(7) | box | kernel", tuple("abcd"),
        (1 + KINDS, SIDE, SIDE), offset,
    ),
    "retrieval": Structure(
        "retrieval by content", "nearest(1)", "ranked", "softmax",
        "finds the position whose key is most similar, and reads its value",
        "nearest(2, scaled) | ranked | softmax", tuple("abcd"),
        (1 + KEY + KINDS, SIDE, SIDE), retrieval,
    ),
    "alike": Structure(
        "the mean of what looks alike", "nearest(16)", "ranked", "mean",
        "takes the mean over all positions that look alike", "nearest(16, cosine) | ranked | mean", ("minus", "plus"),
        (2 + KEY, SIDE, SIDE), alike,
    ),
}  # fmt: skip
