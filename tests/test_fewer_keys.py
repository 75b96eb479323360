"""Grids of positions far apart, pooled keys, channels as slots: against timm, torch and sums written by hand.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, mask_of, masked_attention, project, scrambled

from nearfold._torchvision import load
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")
BACKENDS = ("auto", "oracle")


def agree(layer, x, truth):
    """Output and every gradient, on the fast path and on the oracle."""
    probe = torch.randn(layer(x).shape)
    wanted = torch.autograd.grad((truth(x) * probe).sum(), [x, *layer.parameters()])
    for backend in BACKENDS:
        layer.backend = backend
        close(layer(x), truth(x))
        found = torch.autograd.grad((layer(x) * probe).sum(), [x, *layer.parameters()])
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    layer.backend = "auto"


def timm(name):
    """A module of timm, or a visible skip."""
    pytest.importorskip("torch")
    try:
        load("torchvision")
        return load(f"timm.{name}")
    except ModuleNotFoundError:
        pytest.skip("timm is not installed")


def out(layer, x, y):
    """The output projection, and (B, N, C) to a map."""
    y = F.linear(y, layer.out_weight, layer.out_bias)
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("bias", [False, True])
def test_grid_attention_is_maxvits(bias):
    """Cut and put together by timm's own functions; a bias counts steps of the grid, as its table does."""
    maxxvit, size, heads = timm("models.maxxvit"), (3, 2), 2
    layer = scrambled(Mixer(f"block((3, 2){', scaled(bias=table)' if bias else ''}, spread) | box | softmax(heads=2)", 6))
    x = torch.randn(2, 6, 6, 8, requires_grad=True)

    def truth(x):
        rows = [t.transpose(1, 2).flatten(2).unflatten(1, x.shape[2:]) for t in project(layer, x)]  # (B, H, W, C)
        q, k, v = (
            maxxvit.grid_partition(t, size).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2) for t in rows
        )
        score = q @ k.mT / math.sqrt(q.shape[-1])
        if bias:
            at = [(a, b) for a in range(3) for b in range(2)]
            table = layer.get_parameter("relative_bias")
            score = score + torch.stack(
                [torch.stack([table[:, p[0] - r[0] + 2, p[1] - r[1] + 1] for r in at], -1) for p in at], 1
            )
        y = (torch.softmax(score, -1) @ v).transpose(1, 2).flatten(2).unflatten(1, size)
        return out(layer, x, maxxvit.grid_reverse(y, size, x.shape[2:]).flatten(1, 2))

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", [(7,), (5, 4), (2, 3, 5)])
def test_grids_that_do_not_divide_are_spread_as_far(grid):
    layer = scrambled(Mixer("block(3, spread) | box | softmax(heads=2)", 4, ndim=len(grid)))
    mask = mask_of(grid, lambda i, j: all((p - q) % -(-n // 3) == 0 for p, q, n in zip(i, j, grid, strict=True)))
    x = torch.randn(2, 4, *grid, requires_grad=True)
    agree(layer, x, lambda x: masked_attention(layer, x, mask))


def test_spread_does_not_go_with_a_shift():
    with pytest.raises(ValueError, match="left out next to spread"):
        Mixer("block(4, shift=2, spread) | box | softmax", 4)
