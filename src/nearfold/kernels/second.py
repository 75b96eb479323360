"""Second derivatives (gradient penalties, Hessians, MAML): each backward operator again, in PyTorch's own operators.

A first derivative never comes here. The second holds what the kernels avoid, every slot's values: O(M S C) numbers.

Shape legend: B batch, N positions, C channels, H heads, M outputs, S slots, E entries of a slot, e embedded features,
P problems, `out` the output grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nearfold.kernels.names import DOT_LIKE
from nearfold.kernels.operator import Operator, lengths, nested, opened

Formula = Callable[..., Tensor]
Tensors = Sequence[Tensor | None]


def _vary(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def gradients(formula: Formula) -> Callable[..., list[Tensor | None]]:
    """(grad, *operands) -> the gradients of a formula at its floating operands, differentiable; None at the others."""

    def found(grad: Tensor, *operands: Any) -> list[Tensor | None]:
        flat = opened(operands)
        y = formula(*operands)
        made = iter(torch.autograd.grad(y, [x for x in flat if _vary(x)], grad, create_graph=True, allow_unused=True))
        return [next(made) if _vary(x) else None for x in flat]

    return found


def register(backward: Operator[..., Any], again: Callable[..., Tensors]) -> None:
    """Give a backward operator a backward of its own.

    ``again`` takes its arguments and returns its results by differentiable operators; None where a result is empty.
    """

    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        flat = opened(inputs)
        ctx.save_for_backward(*(x for x in flat if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in flat]
        ctx.counts = lengths(inputs)

    def run(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        saved, further = iter(ctx.saved_tensors), torch.is_grad_enabled()
        flat = [next(saved) if other is None else other[0] for other in ctx.others]
        with torch.enable_grad():  # one operand may be given twice: each is a tensor of its own here
            flat = [_alias(x, further) if _vary(x) else x for x in flat]
            results = again(*nested(ctx.counts, flat))
            pairs = zip(results, opened(upstream), strict=True)
            known = [(y, g) for y, g in pairs if y is not None and g is not None and y.requires_grad]
            ends, starts = [x for x in flat if _vary(x)], [y for y, _ in known]
            made: Sequence[Tensor | None] = [None] * len(ends)
            if known:
                made = torch.autograd.grad(starts, ends, [g for _, g in known], create_graph=further, allow_unused=True)
        given = iter(made)
        return nested(ctx.counts, [next(given) if _vary(x) else None for x in flat])

    backward.register_autograd(run, setup_context=setup)


def _alias(x: Tensor, further: bool) -> Tensor:
    return x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_()


def near(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, N, C) that slots read: index (B, M, S, H) -> (B, M, S, H, C / H), zero where it is negative."""
    B, _, C = rows.shape
    H = index.shape[3]
    at = index.clamp(min=0).flatten(1, 2)
    head = torch.arange(H, device=rows.device)
    batch = torch.arange(B, device=rows.device)[:, None, None]
    found = rows.unflatten(2, (H, C // H))[batch, at, head].unflatten(1, index.shape[1:3])
    return found.masked_fill((index < 0)[..., None], 0)


def aggregate(
    value: Tensor, index: Tensor, alpha: Tensor | None, weight: Tensor | None, groups: int, entries: int = 1
) -> Tensor:
    """As `nearfold::aggregate`."""
    read = near(value, index)
    read = (read if alpha is None else read * alpha[..., None]).flatten(3)
    if weight is None:
        return read.sum(2)
    read = read.unflatten(2, (-1, entries)).sum(3)
    return torch.einsum("bmsgc,gocs->bmgo", read.unflatten(3, (groups, -1)), weight.unflatten(0, (groups, -1))).flatten(
        2
    )


def slot_scores(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    """As `nearfold::slot_scores`."""
    return (near(key, index) * query.unflatten(2, (index.shape[3], -1))[:, :, None]).sum(-1)


def distance(square: Tensor) -> Tensor:
    """Minus the root; at zero its derivatives are zero."""
    zero = square == 0
    return -square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _metric(query: Tensor, key: Tensor, metric: str, squared: bool, axis: int) -> Tensor:
    if metric in DOT_LIKE:
        return (query * key).sum(axis)
    if metric == "chebyshev":
        return -(query - key).abs().amax(axis)
    square = (query - key).square().sum(axis)
    return -square if squared else distance(square)


def chosen_scores(query: Tensor, key: Tensor, index: Tensor, metric: str, squared: bool) -> Tensor:
    """Scores (B, H, M, k) of the keys that `nearfold::select` chose; the choice has no gradient."""
    flat = key.flatten(0, 1)
    rows = near(flat, index.flatten(0, 1)[..., None])[..., 0, :].unflatten(0, index.shape[:2])
    wide = torch.promote_types(query.dtype, torch.float32)
    score = _metric(query.to(wide)[..., None, :], rows.to(wide), metric, squared, -1)
    return score.masked_fill(index < 0, 0)


def _views(x: Tensor, offsets: Sequence[int], stride: Sequence[int], out: Sequence[int]) -> list[Tensor]:
    """What every slot reads of a padded map (P, c, *grid): S tensors (P, c, *out)."""
    axes, found = len(stride), []
    for s in range(0, len(offsets), axes):
        first = zip(offsets[s : s + axes], stride, out, strict=True)
        where: list[Any] = [slice(f, f + (n - 1) * t + 1, t) for f, t, n in first]
        found.append(x[(..., *where)])
    return found


def local_scores(
    query: Tensor, key: Tensor, offsets: Sequence[int], stride: Sequence[int], metric: str, squared: bool
) -> Tensor:
    """As `nearfold::local_scores`."""
    views = _views(key, offsets, stride, query.shape[2:])
    return torch.stack([_metric(query, one, metric, squared, 1) for one in views], 1)


def local_sum(alpha: Tensor, value: Tensor, offsets: Sequence[int], stride: Sequence[int]) -> Tensor:
    """As `nearfold::local_sum`."""
    views = _views(value, offsets, stride, alpha.shape[2:])
    return (alpha[:, :, None] * torch.stack(views, 1)).sum(1)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """As `nearfold.kernels.attention`, the mask in numbers; a query that may read nothing reads zero."""
    wide = torch.promote_types(query.dtype, torch.float32)
    score = scale * query.to(wide) @ key.to(wide).mT
    if causal:
        later = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
        score = score.masked_fill(later, float("-inf"))
    if mask is not None:
        score = score + mask
    lost = (score == float("-inf")).all(-1, keepdim=True)
    alpha = torch.softmax(score.masked_fill(lost, 0), -1).masked_fill(lost, 0)
    return (alpha @ value.to(wide)).to(value.dtype)


def slot_softmax_gradient(grad: Tensor, alpha: Tensor, scale: float) -> list[Tensor]:
    """As `nearfold::slot_softmax_backward`."""
    return [scale * alpha * (grad - (grad * alpha).sum(-1, keepdim=True))]


def masked_softmax(score: Tensor, inside: Tensor | None) -> Tensor:
    """Over axis 1; rows without any slot inside are zero."""
    if inside is None:
        return torch.softmax(score, 1)
    lowest = torch.finfo(score.dtype).min
    return torch.softmax(score.masked_fill(~inside, lowest), 1).masked_fill(~inside, 0)
