"""A whole layer over a window whose slots are moved, for `nearfold.kernels.whole`.

It is the convolution that makes the offsets, `corners` and `aggregate`, one after another.

Shape legend: B batch, I channels of the input, C of the value, O of the output, H groups of channels that are moved on
their own, S slots, M outputs, N positions, a grid axes, `size` the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfold.kernels import engine
from nearfold.kernels.corners_torch import Frame
from nearfold.kernels.whole import Operands, as_map, rows_like


@dataclass(frozen=True)
class DeformedWindow:
    """A layer, settled.

    Its operands are the input that offsets are made of (B, I, *grid), None where it is the value; value (B, C, *grid);
    offset_weight (H * S * a, I, *size) and offset_bias; mask_weight (H * S, I, *size) and mask_bias, None where slots
    are not weighed; weight (O, C / groups, *size) and bias (O,). Every bias, and weight, may be None.

    Attributes:
        heads: H.
        groups: of the weight; 0: as many as channels.
        frame: where the window lies.
    """

    heads: int
    groups: int
    frame: Frame
    differentiable = True

    def _settled(self, value: Tensor) -> tuple[object, ...]:
        f = self.frame
        return self.heads, self.groups or value.shape[1], f.grid, f.out, f.size, f.stride, f.dilation, f.before

    def _threads(self, value: Tensor, offset_weight: Tensor, O: int) -> int:
        """By the multiplications of the convolution and the sums."""
        C, S = value.shape[1], math.prod(self.frame.size)
        made = offset_weight.numel() + C * S * (O // (self.groups or C) + 2**self.frame.axes)
        return engine.threads(value.shape[0] * math.prod(self.frame.out) * made)

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor | None, ...] | None:
        """(B, O, *out), laid out as rows of channels; every offset and mask."""
        x, value, *parameters, bias = operands
        offset_weight, _, mask_weight, _, weight = parameters
        assert value is not None and offset_weight is not None
        B, O = value.shape[0], value.shape[1] if weight is None else weight.shape[0]
        y = rows_like(value, O, self.frame.out)
        moves = len(offset_weight) + (0 if mask_weight is None else len(mask_weight))
        moved = value.new_empty(B * moves * math.prod(self.frame.out)) if keep else None
        still = [None if t is None else t.contiguous() for t in (*parameters, bias)]
        threads = self._threads(value, offset_weight, O)
        ran = engine.run("deformed", x, value, *still, *self._settled(value), moved, y, threads)
        return (y, moved) if ran else None

    def backward(self, grad: Tensor, operands: Operands, kept: Operands) -> list[Tensor | None] | None:
        """The gradients."""
        x, value, *parameters, bias = operands
        assert value is not None and parameters[0] is not None
        d_value = value.new_empty(value.shape[0], value[0, 0].numel(), value.shape[1])
        d_x = None if x is None else x.new_empty(x.shape[0], d_value.shape[1], x.shape[1])
        still = [None if t is None else t.contiguous() for t in parameters]
        slopes = [None if t is None else torch.empty_like(t) for t in (*still, bias)]
        ran = engine.run(
            "deformed_backward",
            *(grad, x, value, *still, *kept, *self._settled(value), d_x, d_value, *slopes),
            self._threads(value, parameters[0], grad.shape[1]),
        )
        if not ran:
            return None
        return [None if x is None or d_x is None else as_map(d_x, x), as_map(d_value, value), *slopes]
