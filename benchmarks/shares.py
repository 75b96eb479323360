"""Cases of shares with exact zeros, and what they are compared with.

Shape legend: B batch, N positions, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.build import Shape
from benchmarks.case import Case, Peer
from benchmarks.peers import joined, projected
from nearfold.nn import Mixer


class SortedEntmax(torch.autograd.Function):
    """Entmax 1.5 by sorting the scores (.., S), with the closed form and the Jacobian of arXiv 1905.05702."""

    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        """The shares."""
        z = score / 2
        z = z - z.amax(-1, keepdim=True)
        ranked = z.sort(dim=-1, descending=True).values
        n = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
        mean = ranked.cumsum(-1) / n
        spread = ranked.square().cumsum(-1) - n * mean.square()
        tau = mean - ((1 - spread) / n).clamp(min=0).sqrt()
        many = (tau <= ranked).sum(-1, keepdim=True)
        alpha = (z - tau.gather(-1, many - 1)).clamp(min=0).square()
        ctx.save_for_backward(alpha)
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Its gradient."""
        root = ctx.saved_tensors[0].sqrt()
        along = grad * root
        return along - along.sum(-1, keepdim=True) / root.sum(-1, keepdim=True) * root


def entmax(shape: Shape, heads: int) -> Case:
    """Entmax attention over a sequence (B, N, C), projections included."""
    layer = Mixer(f"all | row | entmax(heads={heads})", shape[2], ndim=1)

    def by_sort(x: Tensor) -> Tensor:
        q, k, v = projected(layer, x, heads)
        made: Tensor = SortedEntmax.apply(q @ k.mT * q.shape[-1] ** -0.5)  # type: ignore[no-untyped-call]
        return joined(layer, made @ v)

    return Case((torch.randn(shape),), lambda x: layer(x.mT).mT, {"sort": Peer(by_sort)}, module=layer)
