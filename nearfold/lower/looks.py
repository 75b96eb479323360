"""`looks`: where one output position of a layer looks, from the operation's own Selection.

Shape legend: B batch, H heads, M outputs, S slots, N positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nearfold.grammar import Operation
from nearfold.lower import oracle
from nearfold.lower.call import Call
from nearfold.lower.execute import execute
from nearfold.lower.geometry import padding_of
from nearfold.lower.selection import select


class HasOperation(Protocol):
    """What `looks` needs of a layer: `nearfold.nn.Mixer` has it."""

    operation: Operation

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by name."""
        ...


def looks(layer: HasOperation, x: Tensor, at: tuple[int, ...]) -> Tensor:
    """How much output position ``at`` reads every input position: (B, *grid), non-negative, summing to one.

    A position's share is |alpha| times the size of the kernel's slot, over all heads; the parts of a sum or a
    branch count by the energy of what each of them makes there. Random candidates are not drawn.

    Args:
        layer: a `Mixer`, or anything with ``operation`` and ``tensors()``.
        x: (B, C, *grid).
        at: output position, one entry per grid axis.
    """
    grid = tuple(x.shape[2:])
    if len(at) != len(grid):
        raise ValueError(f"at must have {len(grid)} entries, one per grid axis, got {at}")
    total = x.new_zeros(x.shape[0], *grid)

    def spy(call: Call) -> Tensor:
        y = oracle.run(call)
        out = tuple(y.shape[2:])
        if any(not 0 <= a < n for a, n in zip(at, out, strict=True)):
            raise ValueError(f"at={at} is outside the output grid {out}")
        m = 0
        for a, n in zip(at, out, strict=True):
            m = m * n + a
        chosen = select(call)
        share = _share(call, oracle.weights(call, chosen)[..., m, :].abs())
        index = chosen.index[..., m, :].expand(x.shape[0], share.shape[1], -1)
        row = x.new_zeros(*share.shape[:2], chosen.positions).scatter_add_(2, index, share.to(x.dtype))
        border = padding_of(call.op)
        inside = (slice(None), *(slice(border, border + n) for n in grid))
        row = row.sum(1).unflatten(1, call.padded)[inside]
        row = row / row.flatten(1).sum(1).clamp(min=1e-12).view(-1, *(1,) * len(grid))
        energy = y.flatten(2)[..., m].square().sum(1).sqrt()
        total.add_(row * energy.view(-1, *(1,) * len(grid)).to(x.dtype))
        return y

    with torch.no_grad():
        execute(layer.operation, layer.tensors(), x, lambda op: spy)
    return total / total.flatten(1).sum(1).clamp(min=1e-12).view(-1, *(1,) * len(grid))


def _share(call: Call, alpha_BHS: Tensor) -> Tensor:
    """Alpha times the root-sum-square of every slot's kernel, per head: (B, H, S)."""
    B, H = call.value.shape[0], call.heads
    share = alpha_BHS.expand(B, H, -1)
    kernel = oracle.kernel_weight(call)
    if kernel is None:
        return share
    weight, _ = kernel
    size = weight.flatten(2).square().sum((0, 1)).sqrt()
    return share * size
