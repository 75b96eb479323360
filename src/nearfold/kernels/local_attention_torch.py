"""`nearfold::local_attention` in plain PyTorch, by shifted views: for devices and dtypes without the compiled engine.

Shape legend: B batch, H heads, P = B H problems, e embedded features, d value features, S slots, `*grid` the keys'
grid, `*out` the output grid.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfold.kernels import second
from nearfold.kernels.local import (
    local_scores,
    local_scores_backward,
    local_sum,
    local_sum_backward,
    pad,
    shifted,
    unpad,
)


@dataclass(frozen=True)
class Window:
    """Slots of a window: per axis the size, stride, dilation and positions added before; what lies outside."""

    size: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    reflect: bool

    def offsets(self) -> list[int]:
        """First positions of the slots in the padded grid, raster order, one axis after the other."""
        axes = [[k * d for k in range(s)] for s, d in zip(self.size, self.dilation, strict=True)]
        return [n for offset in itertools.product(*axes) for n in offset]

    def after(self, grid: torch.Size, out: torch.Size) -> list[int]:
        """Positions that the last outputs read beyond the grid, per axis; negative where they stop before its end."""
        reach = [
            (o - 1) * t + (s - 1) * d + 1 for o, t, s, d in zip(out, self.stride, self.size, self.dilation, strict=True)
        ]
        return [r - b - n for r, b, n in zip(reach, self.before, grid, strict=True)]

    def pad(self, x: Tensor, out: torch.Size) -> Tensor:
        """(B, H, c, *grid) -> (P, c, *padded)."""
        return pad(x.flatten(0, 1), self.before, self.after(x.shape[3:], out), self.reflect)

    def unpad(self, grad: Tensor, like: Tensor, out: torch.Size) -> Tensor:
        """Gradient at ``like`` (B, H, c, *grid) of `pad`, from the one at its result."""
        found = unpad(grad, like.shape[3:], self.before, self.after(like.shape[3:], out), self.reflect)
        return torch.empty_like(like).copy_(found.unflatten(0, like.shape[:2]))

    def inside(self, like: Tensor, grid: torch.Size, out: torch.Size) -> Tensor | None:
        """Which slots (1, S, *out) read inside the grid; None for all of them."""
        after = self.after(grid, out)
        if self.reflect or (not any(self.before) and max(after) <= 0):
            return None
        inside, offsets, axes = pad(like.new_ones(1, 1, *grid), self.before, after, False), self.offsets(), len(grid)
        views = [
            shifted(inside, tuple(offsets[i : i + axes]), self.stride, tuple(out)) for i in range(0, len(offsets), axes)
        ]
        return torch.cat(views, 1) > 0


def forward(
    query: Tensor, key: Tensor, value: Tensor, window: Window, metric: str, squared: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, d, *out) and stats (B, H, 2, *out)."""
    out, (B, H) = query.shape[3:], query.shape[:2]
    offsets = window.offsets()
    score = local_scores(query.flatten(0, 1), window.pad(key, out), offsets, window.stride, metric, squared)
    score = score.mul_(scale)
    inside = window.inside(score, key.shape[3:], out)
    if inside is not None:
        score.masked_fill_(~inside, float("-inf"))
    most = score.amax(1, keepdim=True)
    most.masked_fill_(most == float("-inf"), 0)
    weight = score.sub_(most).exp_()
    total = weight.sum(1, keepdim=True)
    inverse = torch.where(total == 0, 0, 1 / total)
    y = local_sum(weight.mul_(inverse), window.pad(value, out), offsets, window.stride)
    return y.unflatten(0, (B, H)), torch.cat([most, inverse], 1).unflatten(0, (B, H))


def differentiable(
    query: Tensor, key: Tensor, value: Tensor, window: Window, metric: str, squared: bool, scale: float
) -> Tensor:
    """The outputs alone, by PyTorch's operators and to any derivative."""
    out, (B, H) = query.shape[3:], query.shape[:2]
    offsets = window.offsets()
    score = scale * second.local_scores(
        query.flatten(0, 1), window.pad(key, out), offsets, window.stride, metric, squared
    )
    alpha = second.masked_softmax(score, window.inside(score, key.shape[3:], out))
    return second.local_sum(alpha, window.pad(value, out), offsets, window.stride).unflatten(0, (B, H))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stats: Tensor,
    window: Window,
    metric: str,
    squared: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at query, key and value; the scores are computed again."""
    out, offsets = query.shape[3:], window.offsets()
    q, k, v = query.flatten(0, 1), window.pad(key, out), window.pad(value, out)
    score = local_scores(q, k, offsets, window.stride, metric, squared)
    most, inverse = stats.flatten(0, 1).split(1, 1)
    alpha = (score * scale).sub_(most).exp_().mul_(inverse)
    inside = window.inside(score, key.shape[3:], out)
    if inside is not None:
        alpha.masked_fill_(~inside, 0)
    d_alpha, d_v = local_sum_backward(grad.flatten(0, 1).contiguous(), alpha, v, offsets, window.stride)
    delta = (alpha * d_alpha).sum(1, keepdim=True)
    d_score = d_alpha.sub_(delta).mul_(alpha).mul_(scale)
    d_q, d_k = local_scores_backward(d_score, q, k, score, offsets, window.stride, metric, squared)
    return (
        torch.empty_like(query).copy_(d_q.view(query.shape)),
        window.unpad(d_k, key, out),
        window.unpad(d_v, value, out),
    )
