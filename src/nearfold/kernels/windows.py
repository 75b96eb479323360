"""Whole layers over a window, for `nearfold.kernels.whole`: attention, and ACmix's convolution.

They are `local_attention` and `grouped_conv`, on maps whose channels are not taken apart first.

Shape legend: B batch, H heads, E channels of query and key, C of the value, d features of a head, O output channels,
t maps that are shifted, `grid` and `out` one to three axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearfold.kernels import engine
from nearfold.kernels.whole import Operands


@dataclass(frozen=True)
class WindowAttention:
    """A layer, settled. Its operands: query and key (B, E, *grid), value (B, C, *grid), position (d, *grid) or None.

    Attributes:
        heads: groups of channels that attend on their own.
        home: per axis, the position of the first query; the others follow at the stride.
        window: size, stride, dilation and positions before, one number per axis each, as in `local_attention`.
        reflect: as there.
        scale: alpha is softmax of scale * q . (k - position) / sqrt(d).
        out: the output grid.
    """

    heads: int
    home: list[int]
    window: tuple[list[int], list[int], list[int], list[int]]
    reflect: bool
    scale: float
    out: tuple[int, ...]
    differentiable = True

    def _settled(self, query: Tensor) -> tuple[object, ...]:
        features = query.shape[1] // self.heads
        return *self.window, self.reflect, self.scale * float(features) ** -0.5

    def _threads(self, query: Tensor, value: Tensor) -> int:
        """By the multiplications of scores and sums."""
        reads = query.shape[0] * math.prod(self.out) * math.prod(self.window[0])
        return engine.threads(reads * (query.shape[1] + value.shape[1]))

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor | None, ...]:
        """(B, C, *out), and what the gradient needs of the softmax (B, H, 2, *out)."""
        query, key, value, position = operands
        assert query is not None and value is not None
        y = value.new_empty(value.shape[0], value.shape[1], *self.out)
        stats = value.new_empty(value.shape[0], self.heads, 2, *self.out)
        engine.run(
            "window_attention",
            *(query, key, value, position, self.heads, self.home, *self._settled(query)),
            *(y, stats, self._threads(query, value)),
        )
        return y, stats

    def backward(self, grad: Tensor, operands: Operands, kept: Operands) -> list[Tensor | None]:
        """The gradients."""
        query, key, value, position = operands
        assert query is not None and key is not None and value is not None
        everywhere = tuple(query.shape[2:]) == self.out
        d_query = query.new_empty(*query.shape[:2], *self.out)
        d_key, d_value = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (key, value))
        engine.run(
            "window_attention_backward",
            *(grad, query, key, value, position, *kept, self.heads, self.home, *self._settled(query)),
            *(d_query, d_key, d_value, self._threads(query, value)),
        )
        d_position = None if position is None else -d_key.unflatten(1, (self.heads, -1)).sum((0, 1))
        if not everywhere:
            steps = zip(self.home, self.out, self.window[1], strict=True)
            at: list[Any] = [slice(h, h + (n - 1) * s + 1, s) for h, n, s in steps]
            whole = torch.zeros_like(query, memory_format=torch.contiguous_format)
            whole[(..., *at)] = d_query
            d_query = whole
        return [d_query, d_key, d_value, d_position]


@dataclass(frozen=True)
class ShiftConv:
    """A layer, settled. Its operands: weight (t, 3 * heads), shift (O, t, *size), and three maps (B, O, *grid).

    Attributes:
        heads: groups of channels that are mapped alike.
        window: stride, dilation and positions before, one number per axis each.
        reflect: whether positions outside the grid are mirrored ones.
        interleaved: whether the heads are the last of the output's channels.
        out: the output grid.
    """

    heads: int
    window: tuple[list[int], list[int], list[int]]
    reflect: bool
    interleaved: bool
    out: tuple[int, ...]
    differentiable = True

    def _threads(self, shift: Tensor, B: int) -> int:
        """By the multiplications of the sums over shifted maps."""
        return engine.threads(B * math.prod(self.out) * shift.numel())

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor | None, ...]:
        """(B, O, *out)."""
        weight, shift, *maps = operands
        assert weight is not None and shift is not None and maps[0] is not None
        y = weight.new_empty(maps[0].shape[0], shift.shape[0], *self.out)
        engine.run(
            "shift_conv",
            *(maps, weight.contiguous(), shift.contiguous(), self.heads, *self.window, self.reflect),
            *(self.interleaved, y, self._threads(shift, len(y))),
        )
        return (y,)

    def backward(self, grad: Tensor, operands: Operands, kept: Operands) -> list[Tensor | None]:
        """The gradients."""
        assert all(t is not None for t in operands)
        weight, shift, *maps = (t for t in operands if t is not None)
        weight, shift = weight.contiguous(), shift.contiguous()
        slopes = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, shift, *maps)]
        engine.run(
            "shift_conv_backward",
            *(grad, maps, weight, shift, self.heads, *self.window, self.reflect, self.interleaved),
            *(slopes[2:], slopes[0], slopes[1], self._threads(shift, len(grad))),
        )
        return list(slopes)
