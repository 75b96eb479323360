"""`nearfold::local_scores` and `nearfold::local_sum`: windows by shifted views, no unfold.

Every slot of a window reads the padded map through a strided view, so nothing of size slots x channels x
positions exists, forward or backward: the backward adds each slot's gradient into the view it came from.

Shape legend: P problems (batch x heads), e embedded features, d value features, S slots, `*grid` the padded map,
`*out` the output grid. ``offsets`` holds the slots' first positions, one after the other, ``stride`` one per axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import second
from nearfold.kernels.names import require_tensors
from nearfold.kernels.operator import operator


def reflect(index: Tensor, n: int) -> Tensor:
    """Mirror positions outside 0..n-1 back inside, as often as it takes."""
    period = max(2 * (n - 1), 1)
    index = index.remainder(period)
    return torch.where(index >= n, period - index, index) if n > 1 else torch.zeros_like(index)


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], mirrored: bool) -> Tensor:
    """Pad the grid axes (all but the first two) with zeros, or by reflection at any size; a negative number crops."""
    if not any(before) and not any(after):
        return x
    if not mirrored:
        amounts = [v for b, a in zip(before, after, strict=True) for v in (a, b)]
        return F.pad(x, amounts[::-1])
    for axis, (b, a) in enumerate(zip(before, after, strict=True)):
        n = x.shape[2 + axis]
        x = x.index_select(2 + axis, reflect(torch.arange(-b, n + a, device=x.device), n))
    return x


def unpad(grad: Tensor, grid: Sequence[int], before: Sequence[int], after: Sequence[int], mirrored: bool) -> Tensor:
    """Gradient of `pad` at its input, whose grid axes have the sizes ``grid``."""
    if not any(before) and not any(after):
        return grad
    if not mirrored:
        return F.pad(grad, [-v for b, a in zip(before, after, strict=True) for v in (a, b)][::-1])
    for axis, (n, b, a) in enumerate(zip(grid, before, after, strict=True)):
        shape = list(grad.shape)
        shape[2 + axis] = n
        index = reflect(torch.arange(-b, n + a, device=grad.device), n)
        grad = grad.new_zeros(shape).index_add_(2 + axis, index, grad)
    return grad


def shifted(x: Tensor, offset: tuple[int, ...], stride: list[int], out: tuple[int, ...]) -> Tensor:
    """The view (P, c, *out) of a padded map (P, c, *grid) that one slot reads."""
    index: list[slice] = [slice(None), slice(None)]
    for start, step, n in zip(offset, stride, out, strict=True):
        index.append(slice(start, start + (n - 1) * step + 1, step))
    return x[tuple(index)]


def _slots(offsets: list[int], axes: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    for s in range(len(offsets) // axes):
        yield s, tuple(offsets[s * axes : (s + 1) * axes])


def _require(names: str, over: Tensor, near: Tensor, offsets: list[int], stride: list[int]) -> None:
    """ValueError unless windows of maps (P, c, *grid) fit outputs (P, c', *out)."""
    require_tensors(**dict(zip(names.split(), (over, near), strict=True)))
    axes = len(stride)
    if axes < 1 or over.dim() != axes + 2 or near.dim() != axes + 2 or over.shape[0] != near.shape[0]:
        raise ValueError(
            f"maps must be (P, channels, *grid) of one P, with a stride for each grid axis, got {tuple(over.shape)}, "
            f"{tuple(near.shape)} and stride={stride}"
        )
    if over.dtype != near.dtype or over.device != near.device or not near.is_floating_point():
        raise ValueError(f"maps must have one floating dtype and device, got {over.dtype} and {near.dtype}")
    if min(stride) < 1 or not offsets or len(offsets) % axes:
        raise ValueError(
            f"stride must be positive and offsets {axes} numbers for each slot, got {stride} and {offsets}"
        )
    for axis, (step, n, most) in enumerate(zip(stride, over.shape[2:], near.shape[2:], strict=True)):
        starts = offsets[axis::axes]
        if n < 1 or min(starts) < 0 or max(starts) + (n - 1) * step >= most:
            raise ValueError(
                f"windows must lie inside the padded map {tuple(near.shape[2:])}: on axis {axis} {n} outputs, {step} "
                f"apart, read from {min(starts)} to {max(starts) + (n - 1) * step}"
            )


def _same(name: str, given: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """ValueError unless a tensor has this shape, and the dtype and device of another."""
    require_tensors(**{name: given})
    if tuple(given.shape) != tuple(shape) or given.dtype != like.dtype or given.device != like.device:
        raise ValueError(f"{name} must be {tuple(shape)} {like.dtype}, got {tuple(given.shape)} {given.dtype}")


def _require_scores(query: Tensor, key: Tensor, offsets: list[int], stride: list[int], metric: str) -> None:
    _require("query key", query, key, offsets, stride)
    if query.shape[1] != key.shape[1] or metric not in ("dot", "euclidean"):
        raise ValueError(
            f"query and key must have equal features and metric be dot or euclidean, got {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {metric!r}"
        )


def _require_sum(alpha: Tensor, value: Tensor, offsets: list[int], stride: list[int]) -> None:
    _require("alpha value", alpha, value, offsets, stride)
    if alpha.shape[1] * len(stride) != len(offsets):
        raise ValueError(
            f"alpha {tuple(alpha.shape)} must have one row for each of {len(offsets) // len(stride)} slots"
        )


@operator("nearfold::local_scores")
def local_scores(
    query: Tensor, key: Tensor, offsets: list[int], stride: list[int], metric: str, squared: bool
) -> Tensor:
    """Scores (P, S, *out) of queries (P, e, *out) with the keys their window reads in (P, e, *grid).

    ``metric`` is "dot", or "euclidean" for minus the distance (its square with ``squared``).
    """
    _require_scores(query, key, offsets, stride, metric)
    out = tuple(query.shape[2:])
    score = query.new_empty(query.shape[0], len(offsets) // len(stride), *out)
    with torch.autocast(query.device.type, enabled=False):
        for s, offset in _slots(offsets, len(stride)):
            near = shifted(key, offset, stride, out)
            if metric == "dot":
                score[:, s] = (query * near).sum(1)
            else:
                square = (query - near).square_().sum(1)
                score[:, s] = -square if squared else -square.sqrt()
    return score


@local_scores.register_fake
def _(query: Tensor, key: Tensor, offsets: list[int], stride: list[int], metric: str, squared: bool) -> Tensor:
    return query.new_empty(query.shape[0], len(offsets) // len(stride), *query.shape[2:])


@operator("nearfold::local_scores_backward")
def local_scores_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    score: Tensor,
    offsets: list[int],
    stride: list[int],
    metric: str,
    squared: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients at query and key; at distance zero the distance's gradient is zero."""
    _require_scores(query, key, offsets, stride, metric)
    out = tuple(query.shape[2:])
    shape = (query.shape[0], len(offsets) // len(stride), *out)
    _same("grad", grad, shape, query)
    _same("score", score, shape, query)
    d_query, d_key = torch.zeros_like(query), torch.zeros_like(key)
    with torch.autocast(query.device.type, enabled=False):
        for s, offset in _slots(offsets, len(stride)):
            near, g = shifted(key, offset, stride, out), grad[:, s]
            d_near = shifted(d_key, offset, stride, out)
            if metric == "dot":
                d_query.addcmul_(g.unsqueeze(1), near)
                d_near.addcmul_(g.unsqueeze(1), query)
                continue
            # where it is not squared, the score is minus the length
            g = -2 * g if squared else torch.where(score[:, s] < 0, g / score[:, s], 0)
            apart = (query - near).mul_(g.unsqueeze(1))
            d_query += apart
            d_near -= apart
    return d_query, d_key


@local_scores_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    score: Tensor,
    offsets: list[int],
    stride: list[int],
    metric: str,
    squared: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


@operator("nearfold::local_sum")
def local_sum(alpha: Tensor, value: Tensor, offsets: list[int], stride: list[int]) -> Tensor:
    """Sum over slots of alpha (P, S, *out) times the values its window reads in (P, d, *grid): (P, d, *out)."""
    _require_sum(alpha, value, offsets, stride)
    out = tuple(alpha.shape[2:])
    total = value.new_zeros(value.shape[0], value.shape[1], *out)
    with torch.autocast(value.device.type, enabled=False):
        for s, offset in _slots(offsets, len(stride)):
            total.addcmul_(alpha[:, s].unsqueeze(1), shifted(value, offset, stride, out))
    return total


@local_sum.register_fake
def _(alpha: Tensor, value: Tensor, offsets: list[int], stride: list[int]) -> Tensor:
    return value.new_empty(value.shape[0], value.shape[1], *alpha.shape[2:])


@operator("nearfold::local_sum_backward")
def local_sum_backward(
    grad: Tensor, alpha: Tensor, value: Tensor, offsets: list[int], stride: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients at alpha and value."""
    _require_sum(alpha, value, offsets, stride)
    out = tuple(alpha.shape[2:])
    _same("grad", grad, (value.shape[0], value.shape[1], *out), value)
    d_alpha, d_value = torch.empty_like(alpha), torch.zeros_like(value)
    with torch.autocast(value.device.type, enabled=False):
        for s, offset in _slots(offsets, len(stride)):
            d_alpha[:, s] = (grad * shifted(value, offset, stride, out)).sum(1)
            shifted(d_value, offset, stride, out).addcmul_(alpha[:, s].unsqueeze(1), grad)
    return d_alpha, d_value


@local_sum_backward.register_fake
def _(grad: Tensor, alpha: Tensor, value: Tensor, offsets: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(alpha), torch.empty_like(value)


def _setup_scores(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, *ctx.rest = inputs
    ctx.save_for_backward(query, key, output)


def _backward_scores(ctx, grad):  # type: ignore[no-untyped-def]
    return *local_scores_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


def _setup_sum(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    alpha, value, *ctx.rest = inputs
    ctx.save_for_backward(alpha, value)


def _backward_sum(ctx, grad):  # type: ignore[no-untyped-def]
    return *local_sum_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None


local_scores.register_autograd(_backward_scores, setup_context=_setup_scores)
local_sum.register_autograd(_backward_sum, setup_context=_setup_sum)


def _scores_again(grad, query, key, score, *rest):  # type: ignore[no-untyped-def]
    return second.gradients(second.local_scores)(grad, query, key, *rest)[:2]


second.register(local_scores_backward, _scores_again)
second.register(local_sum_backward, lambda *operands: second.gradients(second.local_sum)(*operands)[:2])


def _count(shape: tuple[int, ...], slots: int) -> int:
    total = 2 * slots
    for n in shape:
        total *= n
    return int(total)


@register_flop_formula(torch.ops.nearfold.local_scores)
def _score_flops(query, key, offsets, stride, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _count(query, len(offsets) // len(stride))


@register_flop_formula(torch.ops.nearfold.local_scores_backward)
def _score_backward_flops(grad, query, key, score, offsets, stride, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _count(query, len(offsets) // len(stride))


@register_flop_formula(torch.ops.nearfold.local_sum)
def _sum_flops(alpha, value, offsets, stride, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _count((value[0], value[1], *alpha[2:]), len(offsets) // len(stride))


@register_flop_formula(torch.ops.nearfold.local_sum_backward)
def _sum_backward_flops(grad, alpha, value, offsets, stride, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _count(grad, len(offsets) // len(stride))
