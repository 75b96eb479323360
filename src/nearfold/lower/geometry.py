"""Grids: padding, output sizes, which positions are queries. Plain integers; no tensors of data.

Shape legend: N input positions (of the padded grid), M output positions, S slots, a grid axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearfold._kept import kept, once
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.kernels.local import pad
from nearfold.lower.meaning import meaning

MOST_SLOTS = 2**24 - 1  # of a window: what the kernels count to


@dataclass(frozen=True)
class WindowGeometry:
    """A window on a grid: per axis the size, stride, dilation, and positions added before and after."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    anchor: tuple[int, ...]  # where in the window the query sits: its centre, or its end when causal

    @staticmethod
    @once
    def of(op: Basic, ndim: int) -> WindowGeometry:
        """The geometry of a window operation on ndim axes."""
        path: Any = op.path  # a window, or one whose slots are moved
        size = as_tuple(path.size, ndim, "size")
        if math.prod(size) > MOST_SLOTS:
            raise ValueError(f"{op}: its window has {math.prod(size)} slots on this map; at most {MOST_SLOTS}")
        dilation = as_tuple(path.dilation, ndim, "dilation")
        reach = tuple(d * (s - 1) for s, d in zip(size, dilation, strict=True))
        anchor = tuple(r // 2 for r in reach)
        if op.shape.causal:
            ends = causal_axes(op, ndim)
            before = tuple(r if a in ends else r // 2 for a, r in enumerate(reach))
            after = tuple(0 if a in ends else r - r // 2 for a, r in enumerate(reach))
            anchor = before
        elif path.padding == "same":
            before = tuple(r // 2 for r in reach)
            after = tuple(r - b for r, b in zip(reach, before, strict=True))
        else:
            before = after = as_tuple(path.padding, ndim, "padding")
        compares = op.weight.rho.needs_score or (op.weight.kernel is not None and op.weight.kernel.edges)
        if compares and any(b > a for b, a in zip(before, anchor, strict=True)):
            raise ValueError(f"{op}: padding={before} leaves outputs without a query; at most {anchor} here")
        return WindowGeometry(size, as_tuple(path.stride, ndim, "stride"), dilation, before, after, anchor)

    def home(self) -> tuple[int, ...]:
        """Position of the first query, per axis; the others follow at the stride."""
        return tuple(a - b for a, b in zip(self.anchor, self.before, strict=True))

    def output(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Output grid; ValueError when the window does not fit."""
        out = []
        for axis, n in enumerate(grid):
            room = n + self.before[axis] + self.after[axis] - self.dilation[axis] * (self.size[axis] - 1) - 1
            if room < 0:
                raise ValueError(
                    f"window of size {self.size[axis]} with dilation {self.dilation[axis]} does not fit into {n} "
                    f"positions padded by {self.before[axis]} and {self.after[axis]} (axis {axis}); use padding=same"
                )
            out.append(room // self.stride[axis] + 1)
        return tuple(out)

    def offsets(self) -> list[tuple[int, ...]]:
        """Offset of every slot in the padded grid, raster order."""
        axes = [[i * d for i in range(s)] for s, d in zip(self.size, self.dilation, strict=True)]
        return list(itertools.product(*axes))

    def pad(self, x: Tensor, mode: str) -> Tensor:
        """Pad the grid axes (all but the first two) with zeros, or by reflection at any size."""
        return pad(x, self.before, self.after, mode == "reflect")


def surely(condition: bool) -> bool:
    """A condition on sizes; where a compiler leaves them open, whether it holds for every size.

    It then asks nothing, so that nothing is fixed by the sizes of the example.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def row(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers made of sizes as a tensor (n,), which leaves them open where a compiler does."""
    if not torch.compiler.is_compiling():
        return like.new_tensor(values)
    return torch.stack([torch.full((), v, dtype=like.dtype, device=like.device) for v in values])


def causal_axes(op: Basic, ndim: int) -> tuple[int, ...]:
    """The axes along which a window ends at the query."""
    if not op.shape.causal:
        return ()
    if not op.shape.axes and ndim > 1:
        raise ValueError(f"{op}: name the axes of the {ndim} that are causal, such as causal(axes=(0,))")
    if any(a >= ndim for a in op.shape.axes):
        raise ValueError(f"{op}: causal axes {op.shape.axes} are beyond the input's {ndim} grid axes")
    return op.shape.axes or (0,)


def crop(x: Tensor, first: Sequence[int], count: Sequence[int], step: Sequence[int] | int = 1) -> Tensor:
    """The grid axes (the last ones) of x: ``count`` positions from ``first`` on, of them every ``step``-th."""
    steps = (step,) * len(first) if isinstance(step, int) else step
    if torch.compiler.is_exporting() and max(steps) > 1:  # strides of a view would become conditions on open sizes
        for axis, (f, n, s) in enumerate(zip(first, count, steps, strict=True), x.dim() - len(first)):
            x = x.index_select(axis, torch.arange(f, f + n, s, device=x.device))
        return x
    where: list[Any] = [slice(f, f + n, s) for f, n, s in zip(first, count, steps, strict=True)]
    return x[(..., *where)]


def padding_of(op: Basic) -> int:
    """Zero inputs that a path adds on every side of the grid."""
    return meaning(op.path).border(op)


def pads_input(op: Basic, grid: tuple[int, ...]) -> bool:
    """Whether an operation adds zero inputs, which it projects with the others: it shares no projection then."""
    return padding_of(op) > 0 or any(meaning(op.path).fill(op, grid))


@kept
def query_index(grid: tuple[int, ...], padding: int, stride: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions (M,) of the padded grid that are queries: the strided positions of the unpadded one."""
    flat = torch.zeros(1, dtype=torch.long, device=device)
    for n, s in zip(grid, stride, strict=True):
        axis = torch.arange(padding, padding + n, s, device=device)
        flat = (flat[:, None] * (n + 2 * padding) + axis).reshape(-1)
    return flat


@kept
def all_positions(count: int, device: torch.device) -> Tensor:
    """Positions (count,), all of them."""
    return torch.arange(count, device=device)
