"""Windows that bend and points that the input chooses, weighed by the input: DCNv3, DCNv4, DAT, Deformable DETR.

Shape legend: B batch, M queries, N positions of all maps together, D channels, H heads, L maps, P points of a head on
each of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nearfold._numbers import integer
from nearfold.grammar import Basic, Weight
from nearfold.grammar.words import Box, Deformable, Modulated, Row, Sampled, Size, Softmax
from nearfold.kernels.names import require_tensors
from nearfold.kernels.weigh import softmax_of_few
from nearfold.nn.functional import Shapes, deform_attn
from nearfold.nn.mixer import Mixer


class DCNv3(Mixer):
    """Deformable convolution, version 3: groups of channels sum a softmaxed window that bends (InternImage).

    Offsets and weights are made by pointwise maps of features from a depthwise convolution, a norm over the channels
    and a GELU. There is no kernel: what is summed is the projected value, and a projection follows.

    Args:
        channels: of input and output (B, channels, H, W).
        kernel_size: int or (rows, columns), of the window and of the depthwise convolution.
        stride: outputs on a strided grid.
        dilation: of both windows.
        groups: of channels, each with offsets and weights of its own.
        bias: biases on all maps.
        backend: "auto", or a backend's name.

    In the beginning every slot lies in its place and counts alike: a mean of the projected window. The public layer's
    ``offset_scale`` is a factor of ``offset_weight`` and ``offset_bias``; its ``remove_center`` and
    ``center_feature_scale`` are left out. Source: arXiv 2211.05778, eq. 2.

    >>> import torch
    >>> DCNv3(32, groups=4)(torch.randn(1, 32, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    _net, _activation = "depthwise", "softmax"

    def __init__(
        self,
        channels: int,
        kernel_size: Size = 3,
        *,
        stride: Size = 1,
        dilation: Size = 1,
        groups: int = 4,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        path = Deformable(kernel_size, stride=stride, dilation=dilation, groups=groups, net=self._net)
        weight = Weight(Modulated(activation=self._activation, project="vo"))
        super().__init__(Basic(path, Box(), weight), channels, bias=bias, backend=backend)


class DCNv4(DCNv3):
    """Deformable convolution, version 4: as version 3 with weights of any size, made by the position's own features.

    Args:
        channels: of input and output (B, channels, H, W).
        kernel_size: int or (rows, columns).
        stride: outputs on a strided grid.
        dilation: of the window.
        groups: of channels, each with offsets and weights of its own.
        bias: biases on all maps.
        backend: "auto", or a backend's name.

    As in the public layer all weights are zero at first, and so is what they sum up. Source: arXiv 2401.06197, 3.1.

    >>> import torch
    >>> DCNv4(32, groups=4)(torch.randn(1, 32, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    _net, _activation = "pointwise", "none"


class DeformableAttention2d(Mixer):
    """Attention of every position to the points of a coarse grid that the input moves (DAT, arXiv 2201.00520).

    Args:
        channels: of input and output (B, channels, H, W).
        num_heads: heads.
        stride: positions between the points of the grid: N / stride^2 keys.
        groups: of heads, whose points move on their own; default half of the heads, at least one.
        kernel_size: of the depthwise convolution that moves the points; odd.
        reach: how far a point may move, in steps of the grid.
        relative_bias: positions on an axis of the maps for which scores have a table of biases by offset, interpolated
            at the points and on maps of other sizes; 0: no table.
        bias: biases on all maps but the last one of the offsets, which has none.
        backend: "auto", or a backend's name.

    At first the points are a uniform grid. A point beyond the map reads its border. Keys and values are projected
    before they are read between positions, which is the same in exact arithmetic, for shares add up to one. The norm
    that public code has in the net of the offsets is left out, as in the paper.

    >>> import torch
    >>> DeformableAttention2d(32, 4, stride=2)(torch.randn(1, 32, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        stride: Size = 4,
        groups: int | None = None,
        kernel_size: int = 5,
        reach: float = 1.0,
        relative_bias: int = 0,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        groups = max(1, integer("num_heads", num_heads) // 2) if groups is None else groups
        path = Sampled(stride, groups=groups, size=kernel_size, reach=reach, bias=relative_bias)
        super().__init__(Basic(path, Row(), Weight(Softmax(heads=num_heads))), channels, bias=bias, backend=backend)


class MultiScaleDeformableAttention(nn.Module):
    """Every query reads ``points`` places around its reference point, on each of several maps, for each head.

    Where they lie and what they count is made by the query, by two pointwise maps; the counts of all points of all maps
    are one softmax. With one map it is the single-scale layer. On images; Deformable DETR's layer by its numbers and by
    the names of its parameters: their state dicts load each other's.

    Args:
        embed_dim: D, of queries, maps and output.
        num_heads: H.
        levels: L.
        points: P.

    Points start around the reference point, head by head in another direction, point by point further away, and count
    alike (the paper's A.1). Source: arXiv 2010.04159, eq. 2 and 3.

    >>> layer = MultiScaleDeformableAttention(32, 4, levels=2)
    >>> query, reference = torch.randn(1, 7, 32), torch.rand(1, 7, 1, 2)
    >>> layer(query, reference, torch.randn(1, 8 * 8 + 4 * 4, 32), [(8, 8), (4, 4)]).shape
    torch.Size([1, 7, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int = 8, *, levels: int = 4, points: int = 4) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = integer("embed_dim", embed_dim), integer("num_heads", num_heads)
        self.levels, self.points = integer("levels", levels), integer("points", points)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}")
        each = self.num_heads * self.levels * self.points
        self.sampling_offsets = nn.Linear(self.embed_dim, 2 * each)
        self.attention_weights = nn.Linear(self.embed_dim, each)
        self.value_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.output_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        ray_H2 = torch.stack([angle.cos(), angle.sin()], -1)
        ray_H2 = ray_H2 / ray_H2.abs().amax(-1, keepdim=True)
        ray_HLP2 = ray_H2[:, None, None] * torch.arange(1.0, self.points + 1)[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(ray_HLP2.expand(-1, self.levels, -1, -1).flatten())
        for net in (self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(net)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Shapes,
        mask: Tensor | None = None,
    ) -> Tensor:
        """query (B, M, D) -> (B, M, D).

        Args:
            query: (B, M, D), with its positional encoding added.
            reference_points: (B, M, L or 1, 2): (x, y) from 0, a map's left or upper edge, to 1; or boxes
                (B, M, L or 1, 4), (x, y, width, height): offsets are then shares of half a box.
            value: (B, N, D): the positions of all maps, one map after another, each in raster order.
            spatial_shapes: (height, width) of every map, L of them: pairs, or a tensor (L, 2).
            mask: (B, N) bool, True where there is a position; others read zero.

        ValueError where shapes do not fit.
        """
        self._require(query, reference_points, value, mask)
        heads, levels, points = self.num_heads, self.levels, self.points
        value_BND = self.value_proj(value)
        if mask is not None:
            value_BND = value_BND.masked_fill(~mask[..., None], 0)
        wide = torch.promote_types(value_BND.dtype, torch.float32)
        offset = self.sampling_offsets(query).to(wide).unflatten(2, (heads, levels, points, 2))
        weights = self.attention_weights(query).to(wide).unflatten(2, (heads, levels * points))
        weights = softmax_of_few(weights).unflatten(3, (levels, points))
        rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
        middle = reference_points.to(wide)[:, :, None, :, None]
        if reference_points.shape[-1] == 4:
            place = middle[..., :2] + offset / points * middle[..., 2:] * 0.5
        else:
            if len(rows) != levels or any(len(row) != 2 for row in rows):
                raise ValueError(f"spatial_shapes must be (height, width) of {levels} maps, got {rows}")
            sizes = torch.tensor([row[::-1] for row in rows], dtype=wide, device=query.device)
            place = middle + offset / sizes[:, None]
        y: Tensor = self.output_proj(deform_attn(value_BND.unflatten(2, (heads, -1)), rows, place, weights))
        return y

    def _require(self, query: Tensor, reference: Tensor, value: Tensor, mask: Tensor | None) -> None:
        require_tensors(query=query, reference_points=reference, value=value)
        for name, x in (("query", query), ("value", value)):
            if x.dim() != 3 or x.shape[2] != self.embed_dim:
                raise ValueError(f"{name} must be (B, N, {self.embed_dim}) for this layer, got {tuple(x.shape)}")
        (B, M), shape = query.shape[:2], tuple(reference.shape)
        if len(shape) != 4 or shape[:2] != (B, M) or shape[2] not in (1, self.levels) or shape[3] not in (2, 4):
            raise ValueError(
                f"reference_points must be ({B}, {M}, {self.levels} or 1, 2 or 4) for query {tuple(query.shape)}, got "
                f"{shape}"
            )
        if mask is not None and (mask.shape != value.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be bool {tuple(value.shape[:2])}, True where there is a position, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.embed_dim}, {self.num_heads}, levels={self.levels}, points={self.points}"
