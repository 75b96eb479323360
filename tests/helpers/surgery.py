"""How far two results are apart, weights that hide no mistake, and attention in a network of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BOUND = 1e-12
NEAR = "nearest(9, cosine, self) | ranked | kernel"


def off(mine: Tensor, truth: Tensor) -> float:
    assert mine.shape == truth.shape and mine.dtype == truth.dtype
    return ((mine - truth).abs().max() / truth.abs().max()).item()


def shaken(model: nn.Module) -> nn.Module:
    """Every parameter random, so that none that starts as zero or one hides a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5)
    return model


class Tokens(nn.Module):
    """A foreign attention in a network of its own."""

    def __init__(self, attn: nn.Module, call) -> None:
        super().__init__()
        self.attn, self.call = attn, call

    def forward(self, x):
        return self.call(self.attn, x)


def multihead(bias: bool = True, batch_first: bool = True):
    layer = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first)
    if batch_first:
        return Tokens(layer, lambda attn, x: attn(x, x, x)[0])

    def call(attn, x):
        x = x.transpose(0, 1)
        return attn(x, x, x, need_weights=False)[0].transpose(0, 1)

    return Tokens(layer, call)
