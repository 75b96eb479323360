"""`nearfold::sampled`: every query sums values read between the positions of one map, or of several.

One operator, two implementations: the compiled engine on the CPU, which keeps nothing of size points x channels; and
PyTorch (`sampled_torch`) everywhere else, where the sum over corners is `nearfold::aggregate` (Triton on CUDA devices).

Shape legend: B batch, N positions of all maps together, C channels, M queries, H heads, S points of a query and head,
a grid axes, L maps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import engine, sampled_torch, second
from nearfold.kernels.aggregate import aggregate, aggregate_backward, as_rows, widened
from nearfold.kernels.names import LOW, require_tensors
from nearfold.kernels.operator import operator

MOST = 2**27 - 1  # positions of all maps: the engine counts them in 32 bits


def _require(value: Tensor, place: Tensor, share: Tensor, grid: list[int]) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(value=value, place=place, share=share)
    if value.dim() != 3 or place.dim() != 5 or value.shape[0] != place.shape[0] or not value.is_floating_point():
        raise ValueError(
            "value must be (B, N, C), floating point, and place (B, M, H, S, axes), got "
            f"{tuple(value.shape)} {value.dtype} and {tuple(place.shape)}"
        )
    wide = torch.promote_types(value.dtype, torch.float32)
    if share.shape != place.shape[:4] or not place.dtype == share.dtype == wide:
        raise ValueError(
            f"place (B, M, H, S, axes) and share (B, M, H, S) must fit one another and be {wide}, got "
            f"{tuple(place.shape)} {place.dtype} and {tuple(share.shape)} {share.dtype}"
        )
    C, (H, S, axes) = value.shape[2], place.shape[2:]
    if not 1 <= axes <= 3 or min(C, H, S) < 1 or C % H:
        raise ValueError(
            f"place must have one to three axes, heads that divide the {C} channels, and points, got "
            f"{tuple(place.shape)}"
        )
    levels = len(grid) // axes
    if not grid or len(grid) % axes or min(grid) < 1 or max(grid) > MOST or S % levels:
        raise ValueError(
            f"grid must hold positive numbers, {axes} for each map, and the {S} points be as many on each, got {grid}"
        )
    if (positions := sum(map(math.prod, sampled_torch.maps(grid, axes)))) != value.shape[1] or positions > MOST:
        raise ValueError(
            f"value must have the {positions} positions of all maps, at most {MOST}, got {tuple(value.shape)} for "
            f"grid={grid}"
        )


def _served(value: Tensor, place: Tensor, share: Tensor, grad: Tensor | None = None) -> bool:
    """Whether the engine computes this; values in bfloat16 and float16 are widened for it."""
    if value.numel() * place.numel() == 0 or any(t is not None and not t.is_cpu for t in (value, grad)):
        return False
    plain = () if value.dtype in LOW else (value, *(() if grad is None else (grad,)))
    return engine.serves(place, share, *plain)


@operator("nearfold::sampled")
def sampled(value: Tensor, place: Tensor, share: Tensor, grid: list[int]) -> Tensor:
    """y (B, M, C): head h of query m sums, over its points s, share[m, h, s] * value at place[m, h, s].

    Args:
        value: (B, N, C): the positions of the maps, one map after another; head h reads C / H consecutive channels.
        place: (B, M, H, S, a) in positions of the point's map, 0 being its first; float32 at least.
        share: (B, M, H, S), in place's dtype.
        grid: positions of every map, a numbers for each. The first S / L points of a head lie on the first map, the
            next ones on the second, and so on.

    Between positions values are (bi, tri)linearly interpolated, outside a map they are zero. A place that is NaN makes
    its query's head NaN; it has no gradient, and that of the first position is NaN. ValueError where operands do not
    fit.
    """
    _require(value, place, share, grid)
    if not _served(value, place, share):
        with torch.autocast(value.device.type, enabled=False):
            index, part = sampled_torch.entries(place, share, grid)
            return aggregate(value, index.contiguous(), part.to(value.dtype).contiguous(), None, 1)
    (wide,) = widened(value)
    assert wide is not None
    out = place.new_empty(value.shape[0], place.shape[1], value.shape[2])
    threads = engine.threads(share.numel() * value.shape[2] // place.shape[2] * 2 ** place.shape[4])
    engine.run("sampled", as_rows(wide), place.contiguous(), share.contiguous(), grid, out, threads)
    return out.to(value.dtype)


@sampled.register_fake
def _(value: Tensor, place: Tensor, share: Tensor, grid: list[int]) -> Tensor:
    return value.new_empty(value.shape[0], place.shape[1], value.shape[2])


@operator("nearfold::sampled_backward")
def sampled_backward(
    grad: Tensor, value: Tensor, place: Tensor, share: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at value, place and share."""
    _require(value, place, share, grid)
    require_tensors(grad=grad)
    made = (value.shape[0], place.shape[1], value.shape[2])
    if grad.shape != made or grad.dtype != value.dtype:
        raise ValueError(f"grad must be {made} {value.dtype} as the output, got {tuple(grad.shape)} {grad.dtype}")
    if not _served(value, place, share, grad):
        with torch.autocast(value.device.type, enabled=False):
            index, part = sampled_torch.entries(place, share, grid)
            part = part.to(value.dtype).contiguous()
            d_value, d_entry, _ = aggregate_backward(grad, value, index.contiguous(), part, None, 1)
            d_place, d_share = sampled_torch.backward(d_entry.to(place.dtype), place, share, grid)
        return d_value.contiguous(), d_place.contiguous(), d_share.contiguous()
    wide_grad, wide = widened(grad, value)
    assert wide_grad is not None and wide is not None
    d_value = wide.new_empty(wide.shape)
    d_place, d_share = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (place, share))
    given = wide_grad.contiguous(), as_rows(wide), place.contiguous(), share.contiguous()
    threads = engine.threads(2 * share.numel() * value.shape[2] // place.shape[2] * 2 ** place.shape[4])
    engine.run("sampled_backward", *given, grid, d_value, d_place, d_share, threads)
    return d_value.to(value.dtype), d_place, d_share


@sampled_backward.register_fake
def _(grad: Tensor, value: Tensor, place: Tensor, share: Tensor, grid: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), place.new_empty(place.shape), share.new_empty(share.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *operands, ctx.grid = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    value, place, share = ctx.saved_tensors
    return *sampled_backward(grad, value, place, share, ctx.grid), None


sampled.register_autograd(_backward, setup_context=_setup)


def _formula(value: Tensor, place: Tensor, share: Tensor, grid: list[int]) -> Tensor:
    index, part = sampled_torch.entries(place, share, grid)
    return second.aggregate(value, index, part.to(value.dtype), None, 1)


def _again(grad, value, place, share, grid):  # type: ignore[no-untyped-def]
    return second.gradients(_formula)(grad, value, place, share, grid)[:3]


second.register(sampled_backward, _again)


@register_flop_formula(torch.ops.nearfold.sampled)
def _flops(value_shape, place_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    B, M, _, S, axes = place_shape
    return int(2 * B * M * S * 2**axes * value_shape[2])


@register_flop_formula(torch.ops.nearfold.sampled_backward)
def _backward_flops(grad_shape, value_shape, place_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _flops(value_shape, place_shape)
