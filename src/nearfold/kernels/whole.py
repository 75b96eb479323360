"""A whole layer in one call of the compiled engine, where what lies between its operators costs more than they do.

What such a layer computes, the operators of this package compute one after another. Those torch knows; this is a
shorter way for plain CPU tensors where nobody watches. Whoever watches (a compiler, a tracer, a profiler, a counter, a
second derivative) sees the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nearfold.kernels import cuda, engine
from nearfold.kernels.operator import unwatched

Operands = tuple[Tensor | None, ...]


class Layer(Protocol):
    """All of a layer that is settled before a call."""

    @property
    def differentiable(self) -> bool:
        """Whether `backward` knows its gradient."""

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor | None, ...] | None:
        """The output, and with ``keep`` what its gradient wants; None where the engine does not take these strides."""

    def backward(self, grad: Tensor, operands: Operands, kept: Operands) -> list[Tensor | None] | None:
        """The gradient at every operand, None for those that have none; None where it does not take these strides."""


def whole(layer: Layer, operands: Operands, again: Callable[..., Tensor]) -> Tensor:
    """The layer on its operands. ``again`` computes the same from them by the operators that torch knows."""
    if not _serves(operands):
        return again(*operands)
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*operands)):
        made = layer.forward(operands, keep=False)
        return again(*operands) if made is None or made[0] is None else made[0]
    if not layer.differentiable:
        return again(*operands)
    found: Tensor = _Whole.apply(layer, again, *operands)
    return found


def _serves(operands: Operands) -> bool:
    """Whether the engine may run on these tensors, unseen."""
    if not unwatched(operands) or forward_ad._current_level >= 0 or cuda.is_interpreted() or engine.get() is None:
        return False
    if torch.is_autocast_enabled("cpu"):  # which operators of a layer it changes, and how, they know
        return False
    dtypes = {t.dtype for t in operands if t is not None and t.dtype != torch.long}
    return len(dtypes) == 1 and dtypes <= set(engine.COMPUTE) and all(t is None or t.numel() for t in operands)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, again: Callable[..., Tensor], *operands: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            made = layer.forward(operands, keep=True)
        ctx.layer, ctx.again, ctx.count, ctx.ran = layer, again, len(operands), made is not None
        ctx.save_for_backward(*operands, *(() if made is None else made[1:]))
        return again(*operands) if made is None else made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing hands each of them out one time only
        operands, kept = saved[: ctx.count], saved[ctx.count :]
        found = None
        if ctx.ran and not torch.is_grad_enabled() and unwatched((grad, *operands)):
            found = ctx.layer.backward(grad, operands, kept)
        if found is None:
            found = _again(ctx.again, grad, operands, ctx.needs_input_grad[2:])
        return None, None, *found


def _again(again: Callable[..., Tensor], grad: Tensor, operands: Operands, wanted: tuple[bool, ...]) -> list[Any]:
    """The gradients by the operators that torch knows, which are differentiable again."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        each = [t if t is None or differentiated else t.detach().requires_grad_(t.requires_grad) for t in operands]
        asked = [t for t, want in zip(each, wanted, strict=True) if want and t is not None]
        slopes = iter(torch.autograd.grad(again(*each), asked, grad, create_graph=differentiated, allow_unused=True))
    return [next(slopes) if want else None for want in wanted]


def rows_like(x: Tensor, channels: int, grid: Sequence[int]) -> Tensor:
    """An empty map (B, channels, *grid) in the dtype of x (B, ...), laid out as rows of channels."""
    positions, strides = 1, []
    for n in grid[::-1]:
        strides.append(positions * channels)
        positions *= n
    strides += [1, positions * channels]
    return torch.empty_strided((x.shape[0], channels, *grid), strides[::-1], dtype=x.dtype)


def as_map(rows_BNC: Tensor, like: Tensor) -> Tensor:
    """Rows as a view (B, C, *grid)."""
    return rows_BNC.transpose(1, 2).unflatten(2, like.shape[2:])
