"""`sampled`: keys and values at points of a grid that the input moves, the same for all queries.

Shape legend: B batch, H heads, G groups of them, N positions, M queries, S points, E = 2^a corners, a grid axes,
c channels of a group, e embedded features.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Sampled
from nearfold.kernels import sampled_torch
from nearfold.lower.call import Call, count_positions
from nearfold.lower.geometry import row
from nearfold.lower.meaning import PathMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.selection import Selection, metric_scores

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@means(Sampled)
class SampledMeaning(PathMeaning):
    """A slot for every point, which reads the corners around it."""

    everywhere = True
    generating = ("feature", "offset")

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        path, a = cast(Sampled, op.path), sizes.ndim
        if a not in _CONV:
            raise ValueError(f"{op}: sampled goes with one to three grid axes, got ndim={a}")
        c = sizes.inner // path.groups
        feature = linear("feature", c, 1, sizes.bias, (path.size,) * a)
        feature = {name: Parameter(p.shape, p.init, path.size**a) for name, p in feature.items()}
        found = feature | {"offset_weight": Parameter((a, c), "constant:0")}
        if path.bias:
            found["relative_bias"] = Parameter((op.heads, *(2 * path.bias - 1,) * a), "normal:0.02", decays=False)
        return found

    def select(self, call: Call) -> Selection:
        q_BHMe, k_BHNe = call.embedded()
        place = points(call)
        index_BSEG, part_BSEG = sampled_torch.entries(place, torch.ones_like(place[..., 0]), list(call.grid))
        E, H = 2**call.ndim, call.heads
        index, part = (_by_head(t, H) for t in (index_BSEG, part_BSEG))
        read = k_BHNe.expand(index.shape[0], H, -1, -1).gather(
            2, index.clamp(min=0)[..., None].expand(-1, -1, -1, k_BHNe.shape[-1])
        )
        key = (read * part[..., None]).unflatten(2, (-1, E)).sum(3)
        score = metric_scores("dot", False, q_BHMe, key)
        if "relative_bias" in call.params:
            score = score + _bias(call, place)
        M = count_positions(call.grid)
        index, part = (t[:, :, None].expand(-1, -1, M, -1) for t in (index, part))
        return Selection(index.clamp(min=0), index >= 0, score, M, part, E)


def _by_head(entries_BSEG: Tensor, heads: int) -> Tensor:
    """(B, S, E, G) to (B, H, S * E): the heads of a group share its points."""
    each = entries_BSEG.flatten(1, 2).transpose(1, 2)
    return each.repeat_interleave(heads // each.shape[1], 1)


def offsets(call: Call, place: Tensor) -> Tensor:
    """Where on the table of a bias every query and point lies: (B, M, S, G, a), in its entries."""
    bias, last_a = cast(Sampled, call.op.path).bias, row([n - 1 for n in call.grid], place).clamp(min=1)
    axes = [torch.arange(n, device=place.device, dtype=place.dtype) for n in call.grid]
    query_Ma = torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, -2)
    apart = query_Ma[:, None, None] - place[:, None, :, :, 0]
    return apart * ((bias - 1) / last_a) + (bias - 1)


def _bias(call: Call, place: Tensor) -> Tensor:
    """What the table adds to the scores (B, H, M, S): every entry by how near it is."""
    table = call.params["relative_bias"]
    H, a = call.heads, call.ndim
    at = offsets(call, place).transpose(1, 3).repeat_interleave(H // cast(Sampled, call.op.path).groups, 1)
    near = torch.ones_like(at[..., :1])  # (B, H, S, M, entries so far)
    for axis in range(a):
        entry = torch.arange(table.shape[1 + axis], device=at.device, dtype=at.dtype)
        near_axis = (1 - (at[..., axis, None] - entry).abs()).clamp(min=0)
        near = (near[..., :, None] * near_axis[..., None, :]).flatten(-2)
    return (near * table.to(at.dtype).flatten(1)[:, None, None]).sum(-1).mT


def points(call: Call) -> Tensor:
    """Where the points lie (B, S, G, 1, a), in positions, float32 at least."""
    path = cast(Sampled, call.op.path)
    query, params = call.query, call.params
    assert query is not None
    wide = torch.promote_types(query.dtype, torch.float32)
    step, G = as_tuple(path.step, call.ndim, "step"), path.groups
    x = query.reshape(query.shape[0] * G, query.shape[1] // G, *query.shape[2:]).to(wide)
    bias = params.get("feature_bias")
    feature = params["feature_weight"].to(wide)
    made = _CONV[call.ndim](
        x, feature, None if bias is None else bias.to(wide), step, path.size // 2, 1, feature.shape[0]
    )
    moved = torch.tanh(F.linear(F.gelu(made).flatten(2).transpose(1, 2), params["offset_weight"].to(wide)).to(wide))
    axes, apart = [], []
    for n, m in zip(call.grid, made.shape[2:], strict=True):
        axes.append((torch.arange(m, device=x.device, dtype=wide) + 0.5) * (n / m) - 0.5)
        apart.append(path.reach * n / m)
    base_Sa = torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, -2)
    place = base_Sa + moved * row(apart, moved)
    last = row([n - 1 for n in call.grid], moved)
    place = torch.minimum(place.clamp(min=0), last)
    return place.unflatten(0, (-1, G)).transpose(1, 2)[..., None, :]
