"""Frozen features: what positions read by each word, without any training, pooled over an image.

A probe is one combination of words. It makes of the positions' features x what its slots read, z, and `pooled` makes
features of an image of the two: random units between them, and all their products.

Shape legend: N images, P positions, D features of a position, S slots, Q what is read (S * D, or heads * D), U random
units, W pooling weights, M features of an image.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.study.alignment.positions import Positions, read, slots, window

UNITS = 192
"""Random units of a probe."""
INPUTS = 6
"""What every second unit reads: so many numbers; the others read all."""
PRODUCTS = 6000
"""At most so many products, drawn at random where there are more."""
NEAREST = 9
DECAYS = (0.3, 0.6, 0.8, 0.95)
"""Of a scan that forgets, by the position."""
KEPT = (0.0, 0.3, 0.7, 1.0)
"""What a selective scan keeps of its state where its gate is open; elsewhere it keeps everything."""
BESIDE = ((-1, 0), (0, -1), (0, 1), (1, 0))
"""Offsets of what stands beside a position."""
HEADS = 4
"""Heads that compare by a random half of the features each, beside one that compares by all."""


@dataclass(frozen=True)
class Room:
    """What does not depend on the images.

    Attributes:
        grid: rows and columns of positions.
        size: D, features of a position.
        middle: of every feature, halfway between its least and its greatest value.
    """

    grid: tuple[int, int]
    size: int
    middle: tuple[float, ...]

    @property
    def places(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def line(self) -> bool:
        """Whether the grid is one row: its end is then a place to read from."""
        return self.grid[0] == 1

    def draws(self, name: str) -> torch.Generator:
        """The random numbers of one probe, always the same."""
        return torch.Generator().manual_seed(zlib.crc32(name.encode()))


Reads = Callable[[Tensor, Room], Tensor]
"""x (N, P, D), room -> z (N, P, Q)."""


def code(room: Room, most: int) -> Tensor:
    """Low cosines of the grid, (P, W): products of `most` along an axis, or as many as there are along a line."""

    def along(n: int, count: int) -> Tensor:
        steps = (torch.arange(n) + 0.5) * math.pi / n
        return torch.cos(torch.arange(min(n, count))[:, None] * steps)

    rows, columns = (along(n, most if min(room.grid) > 1 else most**2) for n in room.grid)
    return torch.einsum("ap,bq->pqab", rows, columns).flatten(2).flatten(0, 1)


@functools.lru_cache(maxsize=8)
def _pools(room: Room) -> Tensor:
    """Weights of the pools, (P, W): the mean, three slow cosines, and on a line its end."""
    found = code(room, 2) / room.places
    if room.line:
        found = torch.cat([found, F.one_hot(torch.tensor([room.places - 1]), room.places).T.float()], 1)
    return found


def pooled(x_NPD: Tensor, z_NPQ: Tensor, room: Room, draws: torch.Generator, units: bool = True) -> Tensor:
    """Features of images (N, M): products of what a position has and what it reads, and random units of both.

    The products are averaged over the positions, on a line also read at its end; the units, ReLU, are averaged with
    the weights of `_pools`, and their largest values taken.
    """
    found = [_drawn(torch.einsum("npd,npq->ndq", x_NPD, z_NPQ).flatten(1) / room.places, draws)]
    if room.line:
        found.append(_drawn(torch.einsum("nd,nq->ndq", x_NPD[:, -1], z_NPQ[:, -1]).flatten(1), draws))
    return torch.cat([*found, mixed(x_NPD, z_NPQ, room, draws)] if units else found, 1)


def mixed(x_NPD: Tensor, z_NPQ: Tensor, room: Room, draws: torch.Generator) -> Tensor:
    """Pooled random units of what a position has and what it reads."""
    both = torch.cat([x_NPD, z_NPQ], 2)
    many = both.shape[2]
    weight = torch.randn(many, UNITS, generator=draws)
    few = torch.rand(many, UNITS // 2, generator=draws).argsort(0) < INPUTS
    weight[:, ::2] *= few
    weight = weight / weight.norm(dim=0)
    units_NPU = (both @ weight + torch.randn(UNITS, generator=draws)).relu()
    means = torch.einsum("npu,pw->nwu", units_NPU, _pools(room)).flatten(1)
    return torch.cat([means, units_NPU.amax(1)], 1)


def _drawn(products_NM: Tensor, draws: torch.Generator) -> Tensor:
    """At most `PRODUCTS` of them."""
    if products_NM.shape[1] <= PRODUCTS:
        return products_NM
    return products_NM[:, torch.randperm(products_NM.shape[1], generator=draws)[:PRODUCTS]]


def itself(x_NPD: Tensor, room: Room) -> Tensor:
    """Features of images from positions that read nothing: where something stands, and what stands together."""
    draws = room.draws("itself")
    where = torch.einsum("npd,pw->nwd", x_NPD, code(room, 4)).flatten(1) / room.places
    own = torch.einsum("npd,npe->nde", x_NPD, x_NPD).flatten(1) / room.places
    ends = [x_NPD[:, -1]] if room.line else []
    return torch.cat([where, own, *ends, mixed(x_NPD, x_NPD[..., :0], room, draws)], 1)


def offsets(*at: tuple[int, int]) -> Reads:
    """Fixed offsets, each a slot of its own."""
    return lambda x_NPD, room: read(x_NPD, slots(room.grid, at)).flatten(2)


def averaged(*at: tuple[int, int]) -> Reads:
    """The mean over fixed offsets."""
    return lambda x_NPD, room: read(x_NPD, slots(room.grid, at)).mean(2)


def rings(x_NPD: Tensor, room: Room) -> Tensor:
    """The mean over all offsets of one distance, for every distance in a window of 5: no direction is special."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for row, column in window(5):
        groups.setdefault(row**2 + column**2, []).append((row, column))
    return torch.cat([read(x_NPD, slots(room.grid, at)).sum(2) / len(at) for at in groups.values()], 2)


def everywhere(x_NPD: Tensor, room: Room) -> Tensor:
    """The mean of all others."""
    return (x_NPD.sum(1, keepdim=True) - x_NPD) / math.sqrt(max(1, room.places - 1))


def _views(x_NPD: Tensor, room: Room) -> list[Tensor]:
    """By what positions are compared: all features, and random halves of them."""
    if room.size == 1:
        return [x_NPD]
    draws = room.draws("views")
    halves = [torch.randperm(room.size, generator=draws)[: max(1, room.size // 2)].sort().values for _ in range(HEADS)]
    return [x_NPD, *(x_NPD[..., half] for half in halves)]


def attention(near: int | None = None, count: int | None = None) -> Reads:
    """Means weighed by a softmax of minus the squared distance of features, the position itself left out.

    Args:
        near: only within a window of this size; None: over all.
        count: only over so many positions, the most alike; None: over all.
    """

    def reads(x_NPD: Tensor, room: Room) -> Tensor:
        closed = torch.eye(room.places, dtype=torch.bool)
        if near is not None:
            closed = closed | ~_within(room, near)
        found = []
        for view in _views(x_NPD, room):
            score = (-torch.cdist(view, view).square() * (4 / view.shape[2])).masked_fill(closed, -1e9)
            if count is not None:
                best = score.topk(min(count, room.places), dim=-1)
                score = torch.full_like(score, -1e9).scatter(-1, best.indices, best.values)
            found.append(torch.softmax(score, -1) @ x_NPD)
        return torch.cat(found, 2)

    return reads


def _within(room: Room, size: int) -> Tensor:
    """Which positions lie in the window of which, bool (P, P)."""
    table = slots(room.grid, window(size))
    return torch.zeros(room.places, room.places + 1, dtype=torch.bool).scatter(1, table, True)[:, :-1]


def nearest(share: float = 1.0, ranked: bool = True, around: bool = False) -> Reads:
    """The positions most alike, each rank a slot.

    Args:
        share: how much features count; the rest is the distance between the positions.
        ranked: whether each rank is a slot of its own; else their mean is read.
        around: whether what stands beside the first is read, too: two steps, one by content and one in space.
    """

    def reads(x_NPD: Tensor, room: Room) -> Tensor:
        count = min(NEAREST, room.places - 1)
        own = torch.eye(room.places, dtype=torch.bool)
        apart_PP, beside_PS = _apart(room), slots(room.grid, BESIDE)
        padded = F.pad(x_NPD, (0, 0, 0, 1))
        rows = torch.arange(len(x_NPD))[:, None, None]
        found = []
        for number, view in enumerate(_views(x_NPD, room)):
            far = share * torch.cdist(view, view) / math.sqrt(view.shape[2]) + (1 - share) * apart_PP
            index = far.masked_fill(own, torch.inf).topk(count, largest=False).indices
            values = x_NPD[rows, index]
            found.append(values.mean(2))
            if ranked:
                found.append(values.flatten(2) if number == 0 else values[:, :, 0])
            if around:
                found.append(padded[rows, beside_PS[index[..., 0]]].flatten(2))
        return torch.cat(found, 2)

    return reads


def _apart(room: Room) -> Tensor:
    """Distances between positions, (P, P), the longer side being 2."""
    at = torch.cartesian_prod(*(torch.arange(float(n)) for n in room.grid)) * 2 / max(1, max(room.grid) - 1)
    return torch.cdist(at, at)


def deformed(x_NPD: Tensor, room: Room) -> Tensor:
    """A window of 3 whose slots a random map of the window itself moves by about a position."""
    draws = room.draws("deformed")
    at = window(3)
    around = read(x_NPD, slots(room.grid, window(3))).flatten(2)
    moves = torch.randn(around.shape[2], len(at) * 2, generator=draws) / math.sqrt(around.shape[2])
    move_NPS2 = (1.5 * torch.tanh(around @ moves)).unflatten(2, (len(at), 2))
    height, width = room.grid
    base = torch.cartesian_prod(torch.arange(float(height)), torch.arange(float(width)))
    where = base[:, None] + torch.tensor(at, dtype=torch.float32) + move_NPS2
    unit = torch.stack([where[..., 1] / max(1, width - 1), where[..., 0] / max(1, height - 1)], -1) * 2 - 1
    maps = x_NPD.mT.unflatten(2, room.grid)
    return F.grid_sample(maps, unit, align_corners=True).permute(0, 2, 3, 1).flatten(2)


def decaying(x_NPD: Tensor, room: Room) -> Tensor:
    """Sums over all earlier positions that fade with the distance along the raster, one for every decay."""
    back = torch.arange(room.places)[:, None] - torch.arange(room.places) - 1
    return torch.cat([(decay ** back.clamp_min(0).float() * (back >= 0)) @ x_NPD for decay in DECAYS], 2)


def selective(x_NPD: Tensor, room: Room) -> Tensor:
    """A state that takes a position in where one feature is above its middle, and keeps a share of what it held there.

    Features of images: the states at the end, alone and times what stands at the end and the mean of all.
    """
    gate_PND = (x_NPD > torch.tensor(room.middle)).float().transpose(0, 1)
    keep_A = torch.tensor(KEPT)
    state = torch.zeros(len(x_NPD), room.size, len(KEPT), room.size)
    for x_ND, gate_ND in zip(x_NPD.transpose(0, 1), gate_PND, strict=True):
        kept_NDA = torch.where(gate_ND[..., None] > 0, keep_A, 1.0)
        state = state * kept_NDA[..., None] + (gate_ND[..., None] * x_ND[:, None])[:, :, None]
    end = state.flatten(1)
    draws = room.draws("selective")
    asked = [x_NPD[:, -1], x_NPD.mean(1)]
    products = [_drawn(torch.einsum("nd,nm->ndm", own, end).flatten(1), draws) for own in asked]
    return torch.cat([end, *products], 1)


def by_place(x_NPD: Tensor, room: Room) -> Tensor:
    """A number of its own for every pair of places: features of images from all positions, each by its place."""
    draws = room.draws("table")
    flat = x_NPD.flatten(1)
    weight = torch.randn(flat.shape[1], 2 * UNITS, generator=draws) / math.sqrt(flat.shape[1])
    asked = [x_NPD.mean(1), *([x_NPD[:, -1]] if room.line else [])]
    products = [_drawn(torch.einsum("nd,nm->ndm", own, flat).flatten(1), draws) for own in asked]
    return torch.cat([flat, (flat @ weight).relu(), *products], 1)


def room_of(at: Positions) -> Room:
    """What the frozen features have to know of a data set."""
    middle = (at.x_NPD.amin((0, 1)) + at.x_NPD.amax((0, 1))) / 2
    return Room(at.grid, at.x_NPD.shape[2], tuple(middle.tolist()))
