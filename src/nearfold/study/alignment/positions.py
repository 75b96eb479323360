"""A data set as the small network's operators meet it: a grid of positions, each with the features of its patch.

Only the training images are read. Shape legend: N images, C channels, P = H * W positions, D features of a position,
S slots, B blocks of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.models import stem_stride

if TYPE_CHECKING:
    from nearfold.train import ImageData

FEATURES = 24
"""At most so many features of a position."""
BLOCKS, FOLDS = 20, 5
"""Images fall into blocks, every fifth block into the same fold: what is fitted leaves a fold out, and every measure is
kept by the block, so that it can be drawn again."""
LEAST = 8
"""Images in a block, at the least: with fewer than `BLOCKS` times as many nothing is measured."""
GRID = (4, 1024)
"""Positions of an image: from, to. All pairs of them are compared."""
FLOOR = 0.01
"""Of the mean variance: features that vary less are not blown up to unit variance."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Images as positions with features.

    Attributes:
        x_NPD: features, centred, of about unit variance: float32.
        scale_D: what they were divided by: their standard deviations, and a little more where these are small.
        grid: rows and columns of positions.
        labels: int64 (N,).
        classes: how many.
    """

    x_NPD: Tensor
    scale_D: Tensor
    grid: tuple[int, int]
    labels: Tensor
    classes: int

    @property
    def blocks(self) -> Tensor:
        """The block of every image, int64 (N,)."""
        return torch.arange(len(self.labels)) % BLOCKS

    @property
    def folds(self) -> Tensor:
        """The fold of every image, int64 (N,)."""
        return self.blocks % FOLDS


def positions(data: ImageData, limit: int = 2000) -> Positions:
    """The training images of a data set as positions; no other split is touched.

    A position is a patch of the size that the small network's stem has (`nearfold.models.stem_stride`). A patch of one
    pixel keeps its channels; the pixels of a larger one, or more than `FEATURES` channels, are turned to their
    principal components, of which the first `FEATURES` stay.

    Args:
        data: the data set.
        limit: at most so many images, in an order drawn once.

    Raises:
        ValueError: too few training images, positions or classes, too many positions, or nothing but one value.

    >>> from nearfold.train import load_data
    >>> found = positions(load_data("made:texture"), limit=200)
    >>> found.x_NPD.shape, found.grid, found.classes
    (torch.Size([200, 64, 1]), (8, 8), 8)
    """
    split = data.train
    count = min(limit, len(split))
    if count < BLOCKS * LEAST:
        raise ValueError(
            f"{data.name} has {len(split)} training images, without those put aside, and limit={limit}: at least "
            f"{BLOCKS * LEAST} are needed, so take more images"
        )
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
    images = split.images[chosen].float() / 255
    side = min(stem_stride(data.size), *data.size)  # a row of positions is no patch
    mean, std = (statistic[:, None, None] for statistic in (data.mean, data.std))
    grid = (data.size[0] // side, data.size[1] // side)
    if not GRID[0] <= grid[0] * grid[1] <= GRID[1]:
        raise ValueError(
            f"{data.name}: images of {data.size} pixels make {grid[0]} x {grid[1]} positions, and from {GRID[0]} to "
            f"{GRID[1]} can be measured; image_size= changes their size"
        )
    if len(split.labels[chosen].unique()) < 2:
        raise ValueError(f"{data.name}: all training images are of one class; at least two are needed")
    x_NPD = F.unfold((images - mean) / std, side, stride=side).mT.contiguous()
    x_NPD = x_NPD - x_NPD.mean((0, 1))
    if side > 1 or x_NPD.shape[2] > FEATURES:
        flat = x_NPD.flatten(0, 1).double()
        _, turn = torch.linalg.eigh(flat.T @ flat)
        x_NPD = x_NPD @ turn.flip(1)[:, :FEATURES].float()
    variance = x_NPD.square().mean((0, 1))
    if float(variance.sum()) < 1e-9:
        raise ValueError(f"{data.name}: all training images are alike, pixel by pixel: nothing can be measured")
    scale_D = (variance + FLOOR * variance.mean()).sqrt().clamp_min(1e-6)
    return Positions(x_NPD / scale_D, scale_D, grid, split.labels[chosen], len(data.classes))


def window(size: int | tuple[int, int], dilation: int = 1) -> tuple[tuple[int, int], ...]:
    """Offsets (rows, columns) of a window, in raster order, its middle among them.

    >>> window((1, 3), dilation=2)
    ((0, -2), (0, 0), (0, 2))
    """
    rows, columns = (
        [dilation * (n - k // 2) for n in range(k)] for k in ((size, size) if isinstance(size, int) else size)
    )
    return tuple((row, column) for row in rows for column in columns)


def slots(grid: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> Tensor:
    """The position at every offset of every position, int64 (P, S); P itself, one too many, where that is outside.

    Offsets that lead outside from everywhere are left out: of a window on one row its row stays.

    >>> slots((1, 3), window(3))
    tensor([[3, 0, 1],
            [0, 1, 2],
            [1, 2, 3]])
    """
    rows, columns = (torch.arange(n) for n in grid)
    found = []
    for down, right in offsets:
        row, column = (rows + down)[:, None].expand(grid), (columns + right).expand(grid)
        inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
        if inside.any():
            found.append(torch.where(inside, row * grid[1] + column, grid[0] * grid[1]).flatten())
    return torch.stack(found, 1) if found else torch.empty(grid[0] * grid[1], 0, dtype=torch.int64)


def read(x_NPD: Tensor, table_PS: Tensor) -> Tensor:
    """What stands in the slots, (N, P, S, D): zeros outside."""
    return F.pad(x_NPD, (0, 0, 0, 1))[:, table_PS]
