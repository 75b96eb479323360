"""`nearfold::slot_softmax`: scores of the chosen slots -> weights, zero where a slot reads nothing.

One operator, three implementations: one pass of the compiled engine on the CPU, one of a Triton kernel on CUDA devices,
and PyTorch everywhere else.

Shape legend: any leading axes, k slots last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels import cuda, engine, second
from nearfold.kernels.names import LOST, require_tensors
from nearfold.kernels.operator import operator

MAX_AXES = 8  # of an index that the engine reads where it lies, expanded or not


@operator("nearfold::slot_softmax")
def slot_softmax(score: Tensor, index: Tensor, scale: float) -> Tensor:
    """Softmax of scale * score (.., k) over the slots with index >= 0: (.., k), contiguous. An index may be expanded.

    A slot with index -1 weighs zero, whatever its score; rows without any slot are zero, rows with index -2 NaN.
    """
    require_tensors(score=score, index=index)
    if score.shape != index.shape or index.dtype != torch.long or score.dim() < 1:
        raise ValueError(f"index must be {tuple(score.shape)} int64 as score, got {tuple(index.shape)} {index.dtype}")
    kernels = cuda.kernels("softmax", score, index)
    if kernels is not None and score.numel() and not kernels.refusal(score):
        made: Tensor = kernels.slot_softmax(score, index, scale)
        return made
    if score.numel() and engine.serves(score) and index.device == score.device:
        alpha = torch.empty_like(score, memory_format=torch.contiguous_format)
        k = score.shape[-1]
        at = index if index.dim() <= MAX_AXES else index.reshape(-1, k)
        engine.run("softmax", score.contiguous().view(-1, k), at, scale, alpha.view(-1, k), engine.threads())
        return alpha
    return formula(score, index, scale)


def formula(score: Tensor, index: Tensor, scale: float) -> Tensor:
    """`slot_softmax` in PyTorch."""
    valid = index >= 0
    # finite in invalid slots: -inf * a negative scale, or a row without any valid slot, would give NaN
    masked = (score.masked_fill(~valid, 0) * scale).masked_fill(~valid, torch.finfo(score.dtype).min)
    alpha = torch.softmax(masked, -1).masked_fill(~valid, 0)
    return alpha.masked_fill((index == LOST).any(-1, keepdim=True), float("nan")).contiguous()


@slot_softmax.register_fake
def _(score: Tensor, index: Tensor, scale: float) -> Tensor:
    return torch.empty_like(score, memory_format=torch.contiguous_format)


@operator("nearfold::slot_softmax_backward")
def slot_softmax_backward(grad: Tensor, alpha: Tensor, scale: float) -> Tensor:
    """Gradient at the scores."""
    require_tensors(grad=grad, alpha=alpha)
    if grad.shape != alpha.shape or grad.dtype != alpha.dtype or alpha.dim() < 1:
        raise ValueError(
            f"grad must be {tuple(alpha.shape)} {alpha.dtype} as alpha, got {tuple(grad.shape)} {grad.dtype}"
        )
    kernels = cuda.kernels("softmax", grad, alpha)
    if kernels is not None and grad.numel() and not kernels.refusal(alpha):
        made: Tensor = kernels.slot_softmax_backward(grad, alpha, scale)
        return made
    if grad.numel() and engine.serves(grad, alpha):
        d_score, k = torch.empty_like(alpha), alpha.shape[-1]
        rows = grad.contiguous().view(-1, k), alpha.view(-1, k)
        engine.run("softmax_backward", *rows, scale, d_score.view(-1, k), engine.threads())
        return d_score
    return scale * alpha * (grad - (grad * alpha).sum(-1, keepdim=True))


@slot_softmax_backward.register_fake
def _(grad: Tensor, alpha: Tensor, scale: float) -> Tensor:
    return torch.empty_like(alpha)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output)
    ctx.scale = inputs[2]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (alpha,) = ctx.saved_tensors
    return slot_softmax_backward(grad, alpha, ctx.scale), None, None


slot_softmax.register_autograd(_backward, setup_context=_setup)
second.register(slot_softmax_backward, second.slot_softmax_gradient)


@register_flop_formula(torch.ops.nearfold.slot_softmax)
def _flops(score_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0  # as torch counts its own softmax


@register_flop_formula(torch.ops.nearfold.slot_softmax_backward)
def _backward_flops(grad_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0


def softmax_of_few(score: Tensor) -> Tensor:
    """Softmax over the last axis, where it is short: torch's takes three times as long over nine numbers.

    >>> softmax_of_few(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    everywhere = torch.zeros(1, dtype=torch.long, device=score.device).expand(score.shape)
    return slot_softmax(score.contiguous(), everywhere, 1.0)
