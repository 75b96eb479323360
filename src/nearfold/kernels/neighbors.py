"""A whole layer of nearest neighbours: rows, search, weights, sums and bias, for `nearfold.kernels.whole`.

It is `select`, `slot_softmax` and `aggregate`, one after another.

Shape legend: B batch, E channels of query and key, C of the value, O of the output, H heads, M outputs, N positions,
k slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfold.kernels import engine
from nearfold.kernels.select import METRICS
from nearfold.kernels.whole import Operands, as_map, rows_like


@dataclass(frozen=True)
class Neighbors:
    """A layer, settled.

    Its operands are query and key (B, E, *grid), both None where they are the value; value (B, C, *grid); weight
    (O, C / groups, k); bias (O,); places (M,), the positions that are queries where not all are, ascending.

    Attributes:
        k: slots; with ``own`` the first is the position itself, which is not searched.
        heads: groups of channels that search on their own.
        groups: of the weight; 0: as many as channels.
        metric: dot, cosine or euclidean, as in `select`.
        unit: whether query and key are scaled to unit vectors first.
        squared: as in `select`.
        own: see k.
        scale: alpha is softmax of scale * score; None: ones.
        scaled: whether scores are divided by the root of a head's features.
        partial: whether only some positions of the grid are queries.
        out_grid: the output grid.
    """

    k: int
    heads: int
    groups: int
    metric: str
    unit: bool
    squared: bool
    own: bool
    scale: float | None
    scaled: bool
    partial: bool
    out_grid: tuple[int, ...]

    @property
    def differentiable(self) -> bool:
        """Whether its gradient is known here: not that of scores that weigh of unit vectors, nor of some queries."""
        return self.scale is None or not (self.unit or self.partial)

    def _temperature(self, query: Tensor) -> float | None:
        """What scores are multiplied with before softmax."""
        if self.scale is None or not self.scaled:
            return self.scale
        return self.scale * float(query.shape[1] // self.heads) ** -0.5

    def _work(self, value: Tensor, query: Tensor, M: int, O: int) -> int:
        """Multiplications: of the search, and of the sums."""
        B, C, N = value.shape[0], value.shape[1], value.numel() // (value.shape[0] * value.shape[1])
        return B * M * (N * query.shape[1] + self.k * C * O // (self.groups or C))

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor | None, ...] | None:
        """(B, O, *out_grid), laid out as rows of channels; index (B, H, M, k), and alpha where scores weigh."""
        query, key, value, weight, bias, places = operands
        assert value is not None
        B, O, M = value.shape[0], value.shape[1] if weight is None else weight.shape[0], math.prod(self.out_grid)
        y = rows_like(value, O, self.out_grid)
        index = torch.empty(B, self.heads, M, self.k, dtype=torch.long) if keep else None
        weighted = keep and self.scale is not None
        alpha = torch.empty(B, self.heads, M, self.k, dtype=value.dtype) if weighted else None
        first = value if query is None else query
        ran = engine.run(
            "neighbors",
            *(query, key, value, None if weight is None else weight.contiguous(), bias, places, self.heads),
            *(self.groups or value.shape[1], self.k, METRICS[self.metric], self.unit, self.squared, self.own),
            *(self._temperature(first), index, alpha, y, engine.threads(self._work(value, first, M, O))),
        )
        return (y, index, alpha) if ran else None

    def backward(self, grad: Tensor, operands: Operands, kept: Operands) -> list[Tensor | None] | None:
        """The gradients; those of query and key are zero where scores do not weigh."""
        query, key, value, weight, bias, _ = operands
        index, alpha = kept
        assert value is not None and index is not None
        scored, first = self.scale is not None, value if query is None else query
        B, C, N = value.shape[0], value.shape[1], value.numel() // (value.shape[0] * value.shape[1])
        d_value = value.new_empty(B, N, C)
        d_query = first.new_empty(B, index.shape[2], first.shape[1]) if scored else None
        d_key = first.new_empty(B, N, first.shape[1]) if scored else None
        still = None if weight is None else weight.contiguous()
        d_weight = None if still is None else torch.empty_like(still)
        d_bias = None if bias is None else torch.empty_like(bias)
        ran = engine.run(
            "neighbors_backward",
            *(grad, query if scored else None, key if scored else None, value, still, self.heads),
            *(self.groups or C, METRICS[self.metric], self.squared, self._temperature(first), index, alpha),
            *(d_query, d_key, d_value, d_weight, d_bias),
            engine.threads(self._work(value, first, index.shape[2], grad.shape[1])),
        )
        if not ran:
            return None
        at_value, at_query, at_key = as_map(d_value, value), None, None
        if d_query is None or d_key is None:
            at_query, at_key = (None if t is None else torch.zeros_like(t) for t in (query, key))
        elif query is None:
            at_value = at_value + as_map(d_query, value) + as_map(d_key, value)
        elif key is None:
            at_query = as_map(d_query, query) + as_map(d_key, query)
        else:
            at_query, at_key = as_map(d_query, query), as_map(d_key, key)
        return [at_query, at_key, at_value, d_weight, d_bias, None]
