"""What reads between positions, and multiplies by no kernel: deformable attention, DCNv3, DAT.

The peers read by F.grid_sample, as public code without kernels of its own does.

Shape legend: B batch, M queries, H heads, d channels of a head, L maps, P points of a head on each.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.build import Shape, _with_path
from benchmarks.case import Case, Forward, Peer
from nearfold.nn import DCNv3, deform_attn
from nearfold.nn.mixer import Mixer

Shapes = tuple[tuple[int, int], ...]


def grid_sample_attention(value: Tensor, where: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Deformable attention by one F.grid_sample for each map, and a sum over the points of all of them."""
    B, _, H, d = value.shape
    read, grid = [], 2 * where - 1
    for level, own in enumerate(value.split([height * width for height, width in shapes], 1)):
        maps = own.permute(0, 2, 3, 1).reshape(B * H, d, *shapes[level])
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        read.append(F.grid_sample(maps, at, padding_mode="zeros", align_corners=False))
    share = weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]
    return (torch.cat(read, -1) * share).sum(-1).unflatten(0, (B, H)).flatten(1, 2).mT


def deformable_attention(shape: Shape, heads: int, points: int, levels: int) -> Case:
    """`deform_attn`: a query for each position of all maps, its points a few positions around it on every map.

    The first map has ``shape`` (B, C, height, width), the others half of the sizes before.
    """
    (batch, C, height, width), middles = shape, []
    shapes = tuple((max(1, height >> level), max(1, width >> level)) for level in range(levels))
    for height, width in shapes:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        middles.append(torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], -1).flatten(0, 1))
    reference = torch.cat(middles)
    M, L = len(reference), levels
    # at whole numbers there is no gradient to compare: they are kept away from
    place = reference[:, None, None, None] * torch.tensor([shape[::-1] for shape in shapes])[:, None]
    place = place - 0.5 + 2 * torch.randn(batch, M, heads, L, points, 2)
    place = place.floor() + 0.05 + 0.9 * (place - place.floor())
    where = (place + 0.5) / torch.tensor([shape[::-1] for shape in shapes])[:, None]
    weights = torch.randn(batch, M, heads, L * points).softmax(-1).unflatten(3, (L, points))
    inputs = (torch.randn(batch, M, heads, C // heads), where, weights)

    def ours(value: Tensor, where: Tensor, weights: Tensor) -> Tensor:
        return deform_attn(value, shapes, where, weights)

    def peer(value: Tensor, where: Tensor, weights: Tensor) -> Tensor:
        return grid_sample_attention(value, where, weights, shapes)

    return Case(inputs, ours, _with_path(ours, {"grid_sample": Peer(peer)}))


def dcn_v3(shape: Shape, groups: int) -> Case:
    """A layer of DCNv3, its nets and projections included."""
    layer = DCNv3(shape[1], groups=groups)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("offset", "mask")):
                p.normal_(std=shape[1] ** -0.5)
    found = _with_path(layer, {"grid_sample": Peer(_dcn_v3(layer, groups))})
    return Case((torch.randn(shape),), layer, found, module=layer)


def _dcn_v3(layer: Mixer, groups: int) -> Forward:
    def mapped(x: Tensor, name: str) -> Tensor:
        p = layer.tensors()
        return F.conv2d(x, p[f"{name}_weight"][..., None, None], p[f"{name}_bias"])

    def forward(x: Tensor) -> Tensor:
        p, (B, C, height, width) = layer.tensors(), x.shape
        made = F.conv2d(x, p["feature_weight"], p["feature_bias"], padding=1, groups=C).movedim(1, -1)
        made = F.gelu(F.layer_norm(made, (C,), p["norm_weight"], p["norm_bias"], 1e-6)).movedim(-1, 1)
        share = mapped(made, "mask").reshape(B * groups, 9, height, width).softmax(1)
        offset = mapped(made, "offset").reshape(B * groups, 9, 2, height, width)
        value = mapped(x, "value").reshape(B * groups, -1, height, width)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        y = torch.zeros_like(value)
        for slot, (down, right) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
            row, column = offset[:, slot, 0] + rows + down, offset[:, slot, 1] + columns + right
            grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], -1)
            y = y + F.grid_sample(value, grid, align_corners=False) * share[:, slot, None]
        return mapped(y.view(x.shape), "out")

    return forward
