"""Orders in which a scan visits the positions of a grid.

Shape legend: N positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Scan


def _raster(index: Tensor) -> Tensor:
    return index.reshape(-1)


def _columns(index: Tensor) -> Tensor:
    last = index.dim() - 1
    return index.permute([last - axis for axis in range(index.dim())]).reshape(-1)


def _snake(index: Tensor) -> Tensor:
    """Rows of the last axis, every other one backwards, so that neighbours in time are neighbours on the grid."""
    rows = index.new_zeros(1)
    for n in index.shape:
        # an axis turns round whenever those before it have moved on
        line = torch.arange(n, device=index.device).expand(rows.shape[0], n)
        backwards = torch.arange(rows.shape[0], device=index.device)[:, None] % 2 == 1
        rows = (rows[:, None] * n + torch.where(backwards, n - 1 - line, line)).reshape(-1)
    return rows


_ORDERS = {"raster": _raster, "columns": _columns, "snake": _snake}


def scan_order(path: Scan, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """The raster index of the position visited at every time (N,)."""
    count = 1
    for n in grid:
        count *= n
    order = _ORDERS[path.order](torch.arange(count, device=device).reshape(grid))
    return order.flip(0) if path.reverse else order
