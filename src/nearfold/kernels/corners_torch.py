"""`nearfold::corners` in PyTorch: the formula itself, on any device.

Shape legend: P samples and groups, S slots, M outputs, E = 2^a corners, a grid axes, `out` the output grid.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """A window on a grid: per axis the grid, the output grid, size, stride, dilation, and positions added before."""

    grid: list[int]
    out: list[int]
    size: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]

    @property
    def axes(self) -> int:
        """Grid axes."""
        return len(self.grid)

    def starts(self, like: Tensor) -> Tensor:
        """Where every slot lies before it moves: (S, a, M), whole numbers in ``like``'s dtype."""
        a = self.axes
        parts = []
        for axis in range(a):
            o = torch.arange(self.out[axis], device=like.device) * self.stride[axis] - self.before[axis]
            s = torch.arange(self.size[axis], device=like.device) * self.dilation[axis]
            at = [1] * (2 * a)
            at[axis], at[a + axis] = self.size[axis], self.out[axis]
            parts.append((s[:, None] + o).view(at).expand(*self.size, *self.out))
        return torch.stack(parts, a).to(like.dtype).flatten(a + 1).flatten(0, a - 1)


def corners(offset_PSaM: Tensor, mask_PSM: Tensor | None, frame: Frame) -> tuple[Tensor, Tensor]:
    """Share (P, M, S * E), and index (P, M, S * E), -1 outside the grid; differentiable."""
    where = frame.starts(offset_PSaM) + offset_PSaM
    low = where.floor()
    share = where - low
    lost_PSM = where.isnan().any(2)
    # far outside there is no corner on the grid, and no integer overflows
    low = low.clamp(-2, max(frame.grid) + 1).nan_to_num(-2).long()
    sizes = torch.tensor(frame.grid, device=low.device)[:, None]
    index, parts = [], []
    for corner in itertools.product((0, 1), repeat=frame.axes):
        at = low + torch.tensor(corner, device=low.device)[:, None]
        inside = ((at >= 0) & (at < sizes)).all(2)
        flat = at[:, :, 0]
        for axis in range(1, frame.axes):
            flat = flat * frame.grid[axis] + at[:, :, axis]
        part = torch.ones_like(share[:, :, 0]) if mask_PSM is None else mask_PSM
        for axis, one in enumerate(corner):
            part = part * (share[:, :, axis] if one else 1 - share[:, :, axis])
        index.append(flat.masked_fill(~inside, -1).masked_fill(lost_PSM, 0))
        parts.append(part.masked_fill(~inside, 0).masked_fill(lost_PSM, float("nan")))
    rows = [torch.stack(t, -1).permute(0, 2, 1, 3).flatten(2) for t in (parts, index)]
    return rows[0], rows[1]


def backward(grad_PMe: Tensor, offset: Tensor, mask: Tensor | None, frame: Frame) -> tuple[Tensor, Tensor | None]:
    """Gradients at offset and mask; a slot whose offset is NaN has none."""
    slots, outputs = offset.shape[1], offset.shape[3]
    grad_PSMe = grad_PMe.unflatten(2, (slots, -1)).transpose(1, 2)
    index_PSMe = corners(offset, mask, frame)[1].unflatten(2, (slots, -1)).transpose(1, 2)
    where = frame.starts(offset) + offset
    there = (index_PSMe >= 0) & ~where.isnan().any(2)[..., None]
    share = where - where.floor()
    d_share, d_mask = torch.zeros_like(offset), offset.new_zeros(offset.shape[0], slots, outputs)
    for e, corner in enumerate(itertools.product((0, 1), repeat=frame.axes)):
        parts = [share[:, :, axis] if one else 1 - share[:, :, axis] for axis, one in enumerate(corner)]
        g = grad_PSMe[..., e]
        d_mask += (g * torch.stack(parts).prod(0)).masked_fill(~there[..., e], 0)
        for axis, one in enumerate(corner):
            others = torch.stack([torch.ones_like(g), *parts[:axis], *parts[axis + 1 :]]).prod(0)
            d_share[:, :, axis] += (g * others * (1 if one else -1)).masked_fill(~there[..., e], 0)
    return (d_share, None) if mask is None else (d_share * mask[:, :, None], d_mask)
