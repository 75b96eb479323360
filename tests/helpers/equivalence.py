"""Two layers are one: outputs and gradients in float64, within 1e-12 (absolute)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BOUND = 1e-12


def close(mine: Tensor, truth: Tensor, what: str) -> None:
    assert mine.shape == truth.shape, f"{what}: {tuple(mine.shape)} instead of {tuple(truth.shape)}"
    assert mine.dtype == truth.dtype == torch.float64
    off = (mine - truth).abs().max().item() if mine.numel() else 0.0
    assert off <= BOUND, f"{what} is off by {off:.1e}"


def agree(layer, reference, x: Tensor, pairs=()) -> Tensor:
    """Outputs, gradients at x, and the gradients of (our parameter, theirs as a function of its gradient)."""
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, truth = layer(x1), reference(x2)
    close(y, truth, "output")
    gy = torch.randn_like(truth)
    y.backward(gy)
    truth.backward(gy)
    close(x1.grad, x2.grad, "gradient at x")
    assert x1.grad.abs().max() > 0
    for mine, theirs in pairs:
        close(mine.grad, theirs(), f"gradient of a parameter {tuple(mine.shape)}")
    return y


def set_(parameter: Tensor, value: Tensor) -> None:
    assert parameter.shape == value.shape
    with torch.no_grad():
        parameter.copy_(value)


BACKENDS = ["auto", "oracle"]

LETTERS = ("query", "key", "value")


def attention_pair(ours, dim: int, heads: int, bias: bool) -> tuple[nn.MultiheadAttention, list]:
    """nn.MultiheadAttention with our weights, and the pairs of gradients."""
    theirs = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True)
    pairs = []
    parts = zip(LETTERS, theirs.in_proj_weight.chunk(3), strict=True)
    for i, (letter, weight) in enumerate(parts):
        set_(getattr(ours, f"{letter}_weight"), weight)
        pairs.append((getattr(ours, f"{letter}_weight"), lambda i=i: theirs.in_proj_weight.grad.chunk(3)[i]))
    set_(ours.out_weight, theirs.out_proj.weight)
    pairs.append((ours.out_weight, lambda: theirs.out_proj.weight.grad))
    if bias:
        with torch.no_grad():  # they start at zero
            theirs.in_proj_bias.normal_()
            theirs.out_proj.bias.normal_()
        for i, (letter, part) in enumerate(zip(LETTERS, theirs.in_proj_bias.chunk(3), strict=True)):
            set_(getattr(ours, f"{letter}_bias"), part)
            pairs.append((getattr(ours, f"{letter}_bias"), lambda i=i: theirs.in_proj_bias.grad.chunk(3)[i]))
        set_(ours.out_bias, theirs.out_proj.bias)
        pairs.append((ours.out_bias, lambda: theirs.out_proj.bias.grad))
    return theirs, pairs
