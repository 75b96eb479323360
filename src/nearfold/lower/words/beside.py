"""`beside`: tokens that read everything, in front of a map that reads them and along its own path.

Shape legend: N positions, T tokens, M positions of the map, S slots.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Beside
from nearfold.kernels.names import INVALID
from nearfold.lower.meaning import Lengths, meaning, means
from nearfold.lower.windows import TableMeaning, window_index


@means(Beside)
class BesideMeaning(TableMeaning):
    """A table, but one of whose rows some are as long as the map: the backend parts them."""

    table = False
    everywhere = True

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        path = cast(Beside, op.path)
        if math.prod(grid) != path.positions:
            raise ValueError(
                f"{op}: {path.tokens} tokens and a map of {path.grid} are {path.positions} positions, got "
                f"{'x'.join(map(str, grid))}; name the grid of this input"
            )
        return grid

    def takes_mask(self, op: Basic) -> bool:
        return False

    def home(self, op: Basic, grid: Lengths, device: torch.device) -> Tensor:
        return torch.arange(math.prod(grid), device=device)

    def index(self, op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
        path, N = cast(Beside, op.path), math.prod(grid)
        map_MS = around(op, device)
        many = max(map_MS.shape[1], N if path.tokens else 0)
        all_TN = torch.arange(N, device=device).expand(path.tokens, N)
        rows = [F.pad(part, (0, many - part.shape[1]), value=INVALID) for part in (all_TN, map_MS) if len(part)]
        index_NS = torch.cat(rows)
        return index_NS.masked_fill(index_NS < 0, missing), index_NS >= 0


def around(op: Basic, device: torch.device) -> Tensor:
    """What the slots of the map's positions read (M, S) of the sequence: every token, then along the path; -1 none."""
    path = cast(Beside, op.path)
    grid = path.grid if isinstance(path.grid, tuple) else (path.grid,)
    inner = dataclasses.replace(op, path=path.path)
    inner = meaning(inner.path).fit(inner, grid, grid, False)
    index_MS, _ = window_index(inner, grid, device, INVALID)
    tokens_MT = torch.arange(path.tokens, device=device).expand(len(index_MS), -1)
    return torch.cat([tokens_MT, torch.where(index_MS < 0, INVALID, index_MS + path.tokens)], 1)
