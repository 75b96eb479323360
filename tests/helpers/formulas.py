"""Attention and positions written out, and layers with no parameter at a special value."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def scrambled(layer):
    """The layer with no parameter left at a special value."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return layer


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def project(layer, x, letters="query key value"):
    """Projections by hand: (B, H, N, d) of every one asked for."""
    heads = layer.operation.parts[0].heads
    flat = x.flatten(2).transpose(1, 2)
    made = []
    for name in letters.split():
        y = F.linear(flat, layer.get_parameter(f"{name}_weight"), layer.get_parameter(f"{name}_bias"))
        made.append(y.unflatten(2, (heads, -1)).transpose(1, 2))
    return made


def masked_attention(layer, x, mask, bias=0.0):
    """Attention with a mask (N, N) over all positions, the plain way."""
    q, k, v = project(layer, x)
    score = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    y = torch.softmax(score.masked_fill(~mask, -math.inf), -1) @ v
    y = y.transpose(1, 2).flatten(2)
    y = F.linear(y, layer.out_weight, layer.out_bias)
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def positions(grid):
    return list(itertools.product(*(range(n) for n in grid)))


def mask_of(grid, reads):
    """mask[i, j]: whether reads(i, j) says that position i reads position j."""
    at = positions(grid)
    return torch.tensor([[reads(i, j) for j in at] for i in at])


def agree(layer, x, truth, parameters=None):
    """Output and every gradient (of all parameters, or of these), on the fast path and on the oracle."""
    own = list(layer.parameters()) if parameters is None else parameters
    probe = torch.randn(layer(x).shape)
    wanted = torch.autograd.grad((truth(x) * probe).sum(), [x, *own])
    for backend in ("auto", "oracle"):
        layer.backend = backend
        y = layer(x)
        close(y, truth(x))
        for one, other in zip(torch.autograd.grad((y * probe).sum(), [x, *own]), wanted, strict=True):
            close(one, other)
    layer.backend = "auto"
