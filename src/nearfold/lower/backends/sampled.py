"""`sampled`: keys and values are read at the moved points, then F.scaled_dot_product_attention to them.

Shape legend: B batch, H heads, G groups of them, M queries, S points, e features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Sampled, Softmax
from nearfold.kernels.attention import attention
from nearfold.kernels.sampled import sampled
from nearfold.lower.call import Call, autocast_dtype, refuse_derivatives, split_heads
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.sampled import offsets, points

NAME = "sampled"


def supports(facts: Facts) -> Verdict:
    """Path sampled."""
    if not isinstance(facts.op.path, Sampled):
        return Verdict.no(f"{facts.op.path.word} reads positions, not points that all queries share")
    return Verdict.yes("values between positions, then F.scaled_dot_product_attention", "roundoff")


def _at(rows_BNC: Tensor, place: Tensor, grid: tuple[int, ...], heads: int) -> Tensor:
    """What rows hold at the points: (B, H, S, e)."""
    read = sampled(rows_BNC, place, torch.ones_like(place[..., 0]), list(grid))
    return split_heads(read.transpose(1, 2), heads)


def _bias(call: Call, place: Tensor) -> Tensor:
    """What the table adds to the scores (B, H, M, S): it is read between its entries, as a map is."""
    table = call.params["relative_bias"].to(place.dtype)
    at = offsets(call, place)
    rows = table.flatten(1).mT.expand(place.shape[0], -1, -1).contiguous()
    read = sampled(
        rows, at.flatten(1, 2)[..., None, :], torch.ones_like(at.flatten(1, 2)[..., :1]), list(table.shape[1:])
    )
    return read.unflatten(1, (-1, at.shape[2])).movedim(3, 1)


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    refuse_derivatives(call)
    path, rho, H = call.op.path, call.op.weight.rho, call.heads
    assert isinstance(path, Sampled) and isinstance(rho, Softmax)
    assert call.query is not None and call.key is not None
    dtype = autocast_dtype(call.value) or call.value.dtype
    place = points(call)
    key, value = (
        _at(t.flatten(2).transpose(1, 2).to(dtype).contiguous(), place, call.grid, H) for t in (call.key, call.value)
    )
    query, _, scale = call.embedded_differences()
    query = query.to(value.dtype).expand(value.shape[0], H, -1, -1)
    bias = None
    if "relative_bias" in call.params:
        bias = (rho.scale * _bias(call, place)).to(value.dtype)
    y = attention(query, key, value, bias, scale=scale * rho.scale)
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)
