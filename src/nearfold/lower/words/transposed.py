"""`transposed`: a window of fixed offsets on a grid of which only every up-th position holds an input.

Shape legend: o outputs of an axis, s slots of an axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from nearfold._kept import once
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Transposed
from nearfold.lower.meaning import Lengths, means
from nearfold.lower.windows import AxesMeaning


@dataclass(frozen=True)
class FineGeometry:
    """Per axis the size, factor, dilation, and outputs left out before and after (added there where negative)."""

    size: Lengths
    up: Lengths
    dilation: Lengths
    before: Lengths
    after: Lengths

    @staticmethod
    @once
    def of(op: Basic, ndim: int) -> FineGeometry:
        """The geometry of an operation on so many axes."""
        path = cast(Transposed, op.path)
        size, up, dilation = (
            as_tuple(n, ndim, name) for n, name in ((path.size, "size"), (path.up, "up"), (path.dilation, "dilation"))
        )
        if isinstance(path.padding, str):
            # what reaches further than `up` outputs for every input; the odd one is left out before, as torch does
            over = tuple(d * (s - 1) + 1 - u for s, u, d in zip(size, up, dilation, strict=True))
            before = tuple(max(0, (n + 1) // 2) for n in over)
            after = tuple(n - b for n, b in zip(over, before, strict=True))
        else:
            before = after = as_tuple(path.padding, ndim, "padding")
        return FineGeometry(size, up, dilation, before, after)

    def output(self, grid: Lengths) -> Lengths:
        """The output grid."""
        axes = zip(grid, self.size, self.up, self.dilation, self.before, self.after, strict=True)
        return tuple((n - 1) * u + d * (s - 1) + 1 - b - a for n, s, u, d, b, a in axes)


@means(Transposed)
class TransposedMeaning(AxesMeaning):
    """Fixed offsets, seen from the output."""

    planes = True

    def takes_mask(self, op: Basic) -> bool:
        return False  # its outputs are finer than the map

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        out = FineGeometry.of(op, len(grid)).output(grid)
        if min(out) < 1:
            raise ValueError(f"{op}: padding leaves no output of {grid} positions, got {out}; use padding=same")
        return out

    def axis(self, op: Basic, grid: Lengths, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        fine, n = FineGeometry.of(op, len(grid)), grid[axis]
        up, place_o = fine.up[axis], torch.arange(fine.output(grid)[axis], device=device) + fine.before[axis]
        on_os = place_o[:, None] - torch.arange(fine.size[axis], device=device) * fine.dilation[axis]
        at_os = torch.div(on_os, up, rounding_mode="floor")
        valid_os = (on_os % up == 0) & (at_os >= 0) & (at_os < n)
        return at_os, valid_os, torch.div(place_o, up, rounding_mode="floor").clamp(max=n - 1)
