"""`nearfold::entmax`: scores -> the shares of sparsemax (power 1) or of entmax 1.5 (power 2), without a sort.

In PyTorch on every device: Newton's method finds the threshold. The sum of the shares is convex and falls in it, so
that from the left each step stays left of the root. A few passes over scores in cache replace a sort of them.

Shape legend: any leading axes, S slots last; R rows, G groups of slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold.kernels.names import require_tensors
from nearfold.kernels.operator import operator

BLOCK_BYTES = 4 << 20  # of scores that stay in cache over all steps
GROUP = 32  # scores of which the best alone takes part in the first steps
STEPS = 60  # fewer than 15 are taken; each divides excess times slope by 4 at least: enough for 2**30 scores in float64


def _excess(above_RS: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """How much too large the sum of the shares is, and its slope (R, 1), at a tau that leaves this above it."""
    if power == 1:
        return above_RS.sum(-1, keepdim=True) - 1, above_RS.sign().sum(-1, keepdim=True)
    return above_RS.square().sum(-1, keepdim=True) - 1, 2 * above_RS.sum(-1, keepdim=True)


def _raise(tau: Tensor, z_RS: Tensor, above_RS: Tensor, power: int) -> None:
    """Newton's steps from a tau (R, 1) that is not too large, in place, until they are nothing but rounding."""
    near = 4 * torch.finfo(z_RS.dtype).eps
    for _ in range(STEPS):
        torch.sub(z_RS, tau, out=above_RS).clamp_(min=0)
        excess, slope = _excess(above_RS, power)
        step = (excess / slope).masked_fill_(slope == 0, 0)  # below zero by rounding only, which it then makes good
        tau += step
        if not bool((step > near).any()):
            break


def _shares(score_RS: Tensor, power: int) -> Tensor:
    """Shares of rows without NaN; rows of -inf alone are zero."""
    z_RS, S = score_RS / power, score_RS.shape[-1]
    best_RG = z_RS[:, : S - S % GROUP].unflatten(-1, (-1, GROUP)).amax(-1)
    best_RG = torch.cat([best_RG, z_RS[:, S - S % GROUP :]], -1)
    top = best_RG.amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0)
    best_RG, z_RS = best_RG.sub_(top), z_RS.sub_(top)
    tau = torch.full_like(top, -1.0)
    if S > 2 * GROUP:  # what the best of every group ask for is a start from the left
        _raise(tau, best_RG, torch.empty_like(best_RG), power)
    above_RS = torch.empty_like(z_RS)
    _raise(tau, z_RS, above_RS, power)
    return torch.sub(z_RS, tau, out=above_RS).clamp_(min=0).pow_(power)


@operator("nearfold::entmax")
def entmax(score: Tensor, power: int) -> Tensor:
    """max(score / power - tau, 0) ** power over the last axis, which adds up to one: (.., S).

    A score of -inf weighs zero; rows of -inf alone are zero, rows with NaN or +inf are NaN.

    Args:
        score: (.., S), floating point; narrow dtypes are computed in float32.
        power: 1 is sparsemax (arXiv 1602.02068), 2 is entmax of order 1.5 (arXiv 1905.05702).

    >>> entmax(torch.tensor([0.5, 0.0, -1.0]), 1)
    tensor([0.7500, 0.2500, 0.0000])
    """
    require_tensors(score=score)
    if score.dim() < 1 or not score.is_floating_point() or power not in (1, 2):
        raise ValueError(
            "score must be floating point (.., S) and power 1 (sparsemax) or 2 (entmax 1.5), got "
            f"{tuple(score.shape)} {score.dtype} and power={power}"
        )
    alpha = torch.empty_like(score, memory_format=torch.contiguous_format)
    if not score.numel():
        return alpha
    S = score.shape[-1]
    rows, out = score.reshape(-1, S), alpha.view(-1, S)
    step = max(1, BLOCK_BYTES // (S * max(score.element_size(), 4)))
    for block, made in zip(rows.split(step), out.split(step), strict=True):
        wide = block.to(torch.promote_types(score.dtype, torch.float32))
        top = wide.amax(-1, keepdim=True)  # NaN where one is
        lost = top.isnan() | (top == float("inf"))
        if bool(lost.any()):
            made.copy_(_shares(wide.masked_fill(lost, 0), power).masked_fill(lost, float("nan")))
        else:
            made.copy_(_shares(wide, power))
    return alpha


@entmax.register_fake
def _(score: Tensor, power: int) -> Tensor:
    return torch.empty_like(score, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output)
    ctx.power = inputs[1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """By the Jacobian diag(s) - s s^T / sum(s), s = alpha ** (2 - order); in operators that have derivatives again."""
    (alpha,) = ctx.saved_tensors
    there = alpha > 0
    if ctx.power == 2 and not torch.is_grad_enabled():
        s = alpha.sqrt()  # whose own derivative at zero nobody asks for
    else:
        s = (alpha.masked_fill(~there, 1) ** (1 - 1 / ctx.power)).masked_fill(~there, 0)
    total = s.sum(-1, keepdim=True)
    mean = (s * grad).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
    found = s * (grad - mean)
    return found.masked_fill(alpha.isnan(), float("nan")), None


entmax.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.nearfold.entmax)
def _flops(score_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 0  # as torch counts its own softmax
