"""F.scaled_dot_product_attention, with second derivatives: torch's fused kernels have none.

Forward and first derivative are torch's own. Shape legend: as F.scaled_dot_product_attention, (B, H, M or N, features).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from nearfold.kernels import second


class _Twice(torch.autograd.Function):
    """y as it is, with two ways back: through y, or, where the gradient itself is recorded, through the formula."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        """The operands are those that y's kernel keeps: nothing more is held."""
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = causal, scale
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of y, or of the operands."""
        if not torch.is_grad_enabled():
            return grad, *[None] * 6
        wanted: Sequence[bool] = ctx.needs_input_grad[1:5]
        # one tensor may be query, key and value: each is a tensor of its own here
        operands = [t.view_as(t) if asked else t for t, asked in zip(ctx.saved_tensors, wanted, strict=True)]
        y = second.attention(*operands, *ctx.settings)
        at = [t for t, asked in zip(operands, wanted, strict=True) if asked]
        made = iter(torch.autograd.grad(y, at, grad, create_graph=True))
        return None, *(next(made) if asked else None for asked in wanted), None, None


def _as_autocast(t: Tensor) -> Tensor:
    """In the dtype that the kernel would receive, so that both keep one copy."""
    kind = t.device.type
    lower = t.is_floating_point() and t.dtype != torch.float64
    if not (lower and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return t
    return t.to(torch.get_autocast_dtype(kind))


def _one_derivative(operands: Sequence[Tensor]) -> bool:
    """Whether torch's function alone serves: nothing is differentiated, or what records it must see that function."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not (torch.is_grad_enabled() and any(t.requires_grad for t in operands))
        or any(_functorch.is_functorch_wrapped_tensor(t) for t in operands)
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * query key^T + mask) value, as F.scaled_dot_product_attention without dropout.

    Args:
        query: (B, H, M, e).
        key: (B, H, N, e).
        value: (B, H, N, d).
        mask: broadcasts to (B, H, M, N); boolean, True where a query reads a key, or numbers to add.
        causal: query m reads the keys up to m; then there is no mask.
        scale: of the scores; default e ** -0.5.

    Returns:
        (B, H, M, d). Under torch.compile, torch.export, torch.jit.trace and torch.func it is torch's function itself.

    >>> q = torch.randn(1, 2, 5, 4, requires_grad=True)
    >>> (slope,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    >>> slope.square().sum().backward()
    """
    operands = [query, key, value, *([] if mask is None else [mask])]
    if _one_derivative(operands):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and mask.dtype == torch.bool:  # as the kernel wants it
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    query, key, value = (_as_autocast(t) for t in (query, key, value))
    mask = None if mask is None else _as_autocast(mask)
    y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    made: Tensor = _Twice.apply(y, query, key, value, mask, causal, scale)
    return made
