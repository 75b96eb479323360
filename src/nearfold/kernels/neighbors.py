"""A whole layer of nearest neighbours in one call of the compiled engine: rows, search, weights, sums and bias.

What it computes is `select`, `slot_softmax` and `aggregate`, one after another. Those are operators that torch knows; this
is a shorter way for plain CPU tensors where nobody watches, and whoever watches (a compiler, a tracer, a profiler, a
counter, a second derivative) sees the three.

Shape legend: B batch, C channels of the value, O output channels, H heads, M outputs, N positions, k slots, `grid` any axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nearfold.kernels import engine
from nearfold.kernels.operator import unwatched
from nearfold.kernels.select import METRICS, MOST_SLOTS

Operands = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]
"""query (B, E, *out), key (B, E, *grid), both None where they are the value; value (B, C, *grid); weight (O, C / groups, k);
bias (O,)."""


@dataclass(frozen=True)
class Neighbors:
    """What is settled before a call.

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

    def temperature(self, query: Tensor) -> float | None:
        """What scores are multiplied with before softmax."""
        if self.scale is None or not self.scaled:
            return self.scale
        return self.scale * float(query.shape[1] // self.heads) ** -0.5


def serves(settled: Neighbors, operands: Operands) -> bool:
    """Whether the engine may run it on these tensors, unseen."""
    dtype = operands[2].dtype
    if dtype not in engine.COMPUTE or not unwatched(operands) or forward_ad._current_level >= 0 or engine.get() is None:
        return False
    if settled.k > MOST_SLOTS or any(t is not None and (t.dtype != dtype or not t.numel()) for t in operands):
        return False
    return settled.differentiable or not (torch.is_grad_enabled() and torch._C._any_requires_grad(*operands))


def neighbors(settled: Neighbors, operands: Operands, places: Tensor | None, again: Callable[..., Tensor]) -> Tensor:
    """(B, O, *out_grid), laid out as rows of channels.

    ``places`` (M,) are the positions that are queries where ``partial``, ascending. ``again`` computes the same from the same operands by the operators that torch knows: for strides of which a grid
    cannot be one axis, and for second derivatives.
    """
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        made: Tensor = _Neighbors.apply(settled, again, places, *operands)
        return made
    y, _, _ = _forward(settled, operands, places, keep=False)
    return again(*operands) if y is None else y


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _forward(
    settled: Neighbors, operands: Operands, places: Tensor | None, keep: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The output, None where the strides do not fit; and index (B, H, M, k) and alpha, which its gradient wants."""
    query, key, value, weight, bias = operands
    first = value if query is None else query
    B, O, M = value.shape[0], value.shape[1] if weight is None else weight.shape[0], 1
    strides = []
    for n in settled.out_grid[::-1]:
        strides.append(M * O)
        M *= n
    y = torch.empty_strided((B, O, *settled.out_grid), (M * O, 1, *strides[::-1]), dtype=value.dtype)
    index = torch.empty(B, settled.heads, M, settled.k, dtype=torch.long) if keep else None
    weighted = keep and settled.scale is not None
    alpha = torch.empty(B, settled.heads, M, settled.k, dtype=first.dtype) if weighted else None
    ran = engine.run(
        "neighbors",
        query,
        key,
        value,
        _contiguous(weight),
        bias,
        places,
        settled.heads,
        settled.groups or value.shape[1],
        settled.k,
        METRICS[settled.metric],
        settled.unit,
        settled.squared,
        settled.own,
        settled.temperature(first),
        index,
        alpha,
        y,
        engine.threads(),
    )
    return y if ran else None, index, alpha


class _Neighbors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settled: Neighbors, again: Callable[..., Tensor], places: Tensor | None, *operands: Any
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, index, alpha = _forward(settled, operands, places, keep=True)  # type: ignore[arg-type]
        ctx.settled, ctx.again = settled, again
        ctx.save_for_backward(*operands, index if y is not None else None, alpha if y is not None else None)
        if y is None:
            y = again(*operands)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *operands, index, alpha = ctx.saved_tensors
        found = None
        if not torch.is_grad_enabled() and index is not None and unwatched((grad, *operands)):
            found = _backward(ctx.settled, grad, tuple(operands), index, alpha)
        if found is None:
            found = _again(ctx.again, grad, operands, ctx.needs_input_grad[3:])
        return None, None, None, *found


def _again(again: Callable[..., Tensor], grad: Tensor, operands: list[Any], wanted: tuple[bool, ...]) -> list[Any]:
    """The gradients by the operators that torch knows, which are differentiable again."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        each = [t if t is None or differentiated else t.detach().requires_grad_(t.requires_grad) for t in operands]
        asked = [t for t, want in zip(each, wanted, strict=True) if want]
        slopes = iter(torch.autograd.grad(again(*each), asked, grad, create_graph=differentiated, allow_unused=True))
    return [next(slopes) if want else None for want in wanted]


def _backward(
    settled: Neighbors, grad: Tensor, operands: Operands, index: Tensor, alpha: Tensor | None
) -> list[Tensor | None] | None:
    """Gradients at the operands; None where the strides do not fit."""
    query, key, value, weight, bias = operands
    scored = settled.scale is not None
    B, C, N = value.shape[0], value.shape[1], value.numel() // (value.shape[0] * value.shape[1])
    first = value if query is None else query
    d_value = value.new_empty(B, N, C)
    d_query = first.new_empty(B, index.shape[2], first.shape[1]) if scored else None
    d_key = first.new_empty(B, N, first.shape[1]) if scored else None
    whole = _contiguous(weight)
    d_weight = None if whole is None else torch.empty_like(whole)
    d_bias = None if bias is None else torch.empty_like(bias)
    ran = engine.run(
        "neighbors_backward",
        grad,
        query if scored else None,
        key if scored else None,
        value,
        whole,
        settled.heads,
        settled.groups or C,
        METRICS[settled.metric],
        settled.squared,
        settled.temperature(first),
        index,
        alpha,
        d_query,
        d_key,
        d_value,
        d_weight,
        d_bias,
        engine.threads(),
    )
    if not ran:
        return None
    at_value = _map(d_value, value)
    at_query = at_key = None
    if d_query is not None and d_key is not None:
        if query is None:
            at_value = at_value + _map(d_query, first) + _map(d_key, first)
        elif key is None:
            at_query = _map(d_query, first) + _map(d_key, first)
        else:
            at_query, at_key = _map(d_query, first), _map(d_key, key)
    elif query is not None:
        at_query, at_key = torch.zeros_like(query), None if key is None else torch.zeros_like(key)
    return [at_query, at_key, at_value, d_weight, d_bias]


def _map(rows_BNC: Tensor, like: Tensor) -> Tensor:
    """A view (B, C, *grid)."""
    return rows_BNC.transpose(1, 2).unflatten(2, like.shape[2:])
