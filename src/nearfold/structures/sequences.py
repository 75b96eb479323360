"""Tasks on sequences, maps of one row, and on sets of points.

Shape legend: N sequences, L positions, V symbols, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nearfold.structures.structure import FAINT, Structure, balanced, below, distinct, labels, noisy, one_hot, one_of

LENGTH = 32
SYMBOLS = 4
COPIED = SYMBOLS
"""Symbols to remember, each of them once; one is asked for."""
ALPHABET, FOLLOWERS, COUPLES = 8, 4, 12
"""Of induction: symbols that are asked for, symbols that come after them, and how many of both."""
STEPS = 24
POINTS = 48
BODIES = ("ball", "sphere", "cube", "torus", "cylinder", "spiral")


def as_rows(values_NLC: Tensor, rng: torch.Generator) -> Tensor:
    """Values in 0..1, with noise: (N, C, 1, L)."""
    return noisy(0.25 + 0.5 * values_NLC.mT[:, :, None], rng, FAINT)


def _remembered(at: Tensor, others: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols at the positions `at` (N, COPIED), and at the end the number of one: which symbol is it?

    Args:
        at: positions before the last.
        others: (N, L, SYMBOLS): what stands elsewhere.
        rng: of the draws.
    """
    count = len(at)
    drawn = labels(count, SYMBOLS, rng)
    every, symbols = torch.arange(count), distinct(count, COPIED, SYMBOLS, rng)
    which = (symbols == drawn[:, None]).int().argmax(1)
    mark, asked = torch.zeros(count, LENGTH, 1), torch.zeros(count, LENGTH, COPIED)
    mark[every[:, None], at] = 1
    others[every[:, None], at] = one_hot(symbols, SYMBOLS)
    others[:, -1] = 0
    asked[every, -1, which] = 1
    return as_rows(torch.cat([others, mark, asked], 2), rng), drawn


def copy(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four symbols at the start, nothing, and at the end a number: which symbol stood there?"""
    at = torch.arange(COPIED).expand(count, COPIED)
    return _remembered(at, torch.zeros(count, LENGTH, SYMBOLS), rng)


def selective(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four of 31 symbols are marked, anywhere, and at the end a number: which was that marked one?"""
    at = distinct(count, COPIED, LENGTH - 1, rng).sort(1).values
    others = one_hot(below(SYMBOLS, count * LENGTH, rng).view(count, LENGTH), SYMBOLS)
    return _remembered(at, others, rng)


def induction(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The last symbol stood once before: which one of four came after it then?

    Symbols of an alphabet of eight and of the four take turns; each of the four stands as often as the others.
    """
    drawn = labels(count, FOLLOWERS, rng)
    every, tails = torch.arange(count), balanced(count, COUPLES, FOLLOWERS, rng)
    asked = below(ALPHABET, count, rng)
    heads = (asked[:, None] + 1 + below(ALPHABET - 1, count * COUPLES, rng).view(count, COUPLES)) % ALPHABET
    heads[every, one_of(tails == drawn[:, None], rng)] = asked
    values = torch.zeros(count, 2 * COUPLES + 1, ALPHABET + FOLLOWERS)
    values[:, 0:-1:2, :ALPHABET] = one_hot(heads, ALPHABET)
    values[:, 1:-1:2, ALPHABET:] = one_hot(tails, FOLLOWERS)
    values[every, -1, asked] = 1
    return as_rows(values, rng), drawn


def tracking(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A switch of three positions is set now and then, with steps between that do not touch it: where is it at the end?

    The last set one of 24 steps decides; about a fifth of the steps set it.
    """
    drawn = labels(count, KINDS := 3, rng)
    every = torch.arange(count)
    sets = torch.rand(count, STEPS, generator=rng) < 0.2
    sets[every, below(STEPS, count, rng)] = True
    to = below(KINDS, count * STEPS, rng).view(count, STEPS)
    last = (sets * torch.arange(STEPS)).argmax(1)
    to[every, last] = drawn
    values = torch.cat([one_hot(to, KINDS), sets[..., None].float()], 2)
    return as_rows(values, rng), drawn


def composed(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Twelve steps, each of which swaps the first two of three things, moves all on by one, or neither: their order?

    The steps make the group of all orders of three things, whose product depends on the order of its factors.
    """
    drawn = labels(count, 6, rng)
    orders = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [1, 0, 2], [0, 2, 1], [2, 1, 0]]
    table = torch.tensor([[orders.index([a[i] for i in b]) for b in orders] for a in orders])
    inverse = (table == 0).int().argmax(1)
    steps = below(6, count * STEPS // 2, rng).view(count, STEPS // 2)
    state = torch.zeros(count, dtype=torch.long)
    for step in steps[:, :-1].unbind(1):
        state = table[state, step]
    steps[:, -1] = table[inverse[state], drawn]
    return as_rows(one_hot(steps, 6), rng), drawn


def points(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """48 points of one of six bodies, turned about the upright, of any size within a factor of 1.5, in random order."""
    drawn = labels(count, len(BODIES), rng)
    u, v, w = (torch.rand(count, POINTS, generator=rng) for _ in range(3))
    normal = torch.randn(count, POINTS, 3, generator=rng)
    normal = normal / normal.norm(dim=2, keepdim=True)
    a, b = 2 * math.pi * u, 2 * math.pi * v
    side = torch.stack([2 * u - 1, 2 * v - 1, torch.sign(w - 0.5)], 2)
    face = below(3, count * POINTS, rng).view(count, POINTS)
    ring = 0.7 + 0.3 * b.cos()
    made = torch.stack([
        normal * u[..., None] ** (1 / 3),
        normal,
        0.75 * torch.stack([side.gather(2, (face[..., None] + axis) % 3)[..., 0] for axis in range(3)], 2),
        torch.stack([ring * a.cos(), ring * a.sin(), 0.3 * b.sin()], 2),
        torch.stack([0.6 * a.cos(), 0.6 * a.sin(), 1.6 * v - 0.8], 2),
        torch.stack([0.7 * (2 * a).cos(), 0.7 * (2 * a).sin(), 2 * u - 1], 2),
    ])[drawn, torch.arange(count)]  # fmt: skip
    angle, size = 2 * math.pi * torch.rand(count, generator=rng), (2 + torch.rand(count, generator=rng)) / 3
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, y, z = made.unbind(2)
    turned = size[:, None, None] * torch.stack([cos * x - sin * y, sin * x + cos * y, z], 2)
    return 0.5 + 0.4 * turned.mT[:, :, None], drawn


STRUCTURES = {
    "copy": Structure(
        "copying", "all, by position", "row", "table",
        "reads the position that the number at the end names", "all | row | table(32)", tuple("abcd"),
        (SYMBOLS + 1 + COPIED, 1, LENGTH), copy,
    ),
    "selective": Structure(
        "selective copying", "scan", "causal", "selective",
        "counts the marked symbols as they come, and keeps the asked one", "scan(state=16) | causal | selective",
        tuple("abcd"), (SYMBOLS + 1 + COPIED, 1, LENGTH), selective,
    ),
    "induction": Structure(
        "induction", "all, by content", "causal", "softmax",
        "finds the symbol where it stood before, and reads what came next",
        "all | causal | softmax(heads=4)", tuple("abcd"), (ALPHABET + FOLLOWERS, 1, 2 * COUPLES + 1), induction,
    ),
    "tracking": Structure(
        "the last setting of a switch", "scan", "causal", "selective",
        "keeps what was set last", "scan(state=16) | causal | selective", tuple("abc"),
        (4, 1, STEPS), tracking,
    ),
    "composed": Structure(
        "the product of permutations", "scan", "causal", "a state that every step turns",
        "keeps the product so far; a diagonal state cannot", "scan(state=16) | causal | delta(heads=4, project=vo)",
        ("abc", "bca", "cab", "bac", "acb", "cba"), (6, 1, STEPS // 2), composed,
    ),
    "points": Structure(
        "sets of points", "nearest(9) in space", "ranked: order means nothing", "kernel",
        "looks at every point's neighbours in space, whatever their place in the row",
        "nearest(20, euclidean) | ranked | max*edge", BODIES,
        (3, 1, POINTS), points,
    ),
}  # fmt: skip
