"""Pyramid vision transformers, and with ACmix in place of their attention (arXiv 2102.12122; 2111.14556).

Queries look at keys and values of a map that a strided convolution made smaller. Positions have a learned code, made
for ``img_size`` and resized for others.

Shape legend: B images, N positions, C channels, H and W the grid.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.kernels.attention import attention as attend
from nearfold.models.network import TOKENS, Network
from nearfold.models.parts import classifier, require_size
from nearfold.models.registry import Entry, Published, register
from nearfold.models.shift import ShiftConv, rates
from nearfold.models.vit import TransformerBlock, init_linear
from nearfold.nn import TokenMixer

EPS = 1e-6
LEAST = 32
"""Pixels along an axis that leave every stage, and every smaller map, a position."""


class Reduction(nn.Module):
    """The map that keys and values come from: (B, C, H, W) to tokens (B, H / ratio * W / ratio, C)."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, ratio, ratio)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return out


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The last H * W tokens (B, N, C) as a map (B, C, H, W): a class token before them is left out."""
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


class ReducedAttention(nn.Module):
    """Spatial-reduction attention (arXiv 2102.12122, eq. 2 and 3) in words: all(cross) | row | softmax(heads).

    With ratio 1 the tokens (B, N, C) look at themselves.
    """

    def __init__(self, channels: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.reduction = Reduction(channels, ratio) if ratio > 1 else None
        path = "all(cross)" if ratio > 1 else "all"
        self.mixer = TokenMixer(f"{path} | row | softmax(heads={heads})", channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.reduction is None:
            return self.mixer(x)
        return self.mixer(x, self.reduction(as_map(x, grid)))


class ReducedACmix(nn.Module):
    """Spatial-reduction attention and a convolution over the same query, key and value.

    The convolution reads them on the queries' grid: every position has the key and the value of the cell of the smaller
    map that it lies in. A class token has no neighbours: to the convolution it is a map of one position.
    """

    def __init__(self, channels: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = Reduction(channels, ratio) if ratio > 1 else None
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.shift = ShiftConv(channels, channels, heads)
        self.rates = rates()
        self.ratio = ratio

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        source = x if self.reduction is None else self.reduction(as_map(x, grid))
        query, key, value = self.query(x), self.key(source), self.value(source)
        heads = [t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)]
        attention = self.out(attend(*heads).transpose(1, 2).flatten(2))
        maps = [as_map(query, grid), *(self._enlarged(t, grid) for t in (key, value))]
        convolution = self.shift(*maps).flatten(2).transpose(1, 2)
        if x.shape[1] > convolution.shape[1]:
            alone = self.shift(*(t[:, 0, :, None, None] for t in (query, key, value)))
            convolution = torch.cat([alone.flatten(2).transpose(1, 2), convolution], 1)
        return self.rates[0] * attention + self.rates[1] * convolution

    def _enlarged(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of the smaller map to a map (B, C, *grid): every position's cell, the last one beyond the last."""
        small = (grid[0] // self.ratio, grid[1] // self.ratio)
        cells = as_map(x, small)
        if small == grid:
            return cells
        rows, columns = (
            (torch.arange(n, device=x.device) // self.ratio).clamp(max=k - 1) for n, k in zip(grid, small, strict=True)
        )
        return cells[:, :, rows[:, None], columns]


LAYERS = {"attention": ReducedAttention, "acmix": ReducedACmix}
PyramidBlock = functools.partial(TransformerBlock, eps=EPS)


class PyramidVisionTransformer(Network):
    """Four stages of tokens on ever smaller grids, a class token in the last: (B, in_chans, H, W) to (B, num_classes).

    Args:
        layer: "attention" or "acmix".
        widths: channels of every stage.
        depths: blocks of every stage.
        heads: heads of every stage.
        mlp_ratios: hidden features of the MLPs, in multiples of the stage's channels.
        reductions: by how much the map of keys and values is smaller, along one axis.
        num_classes, in_chans: as in `nearfold.models.create`.
        img_size: what the learned codes of the positions are made for; they are resized for other sizes.

    >>> small = {"widths": (4, 4, 8, 8), "heads": (1, 1, 2, 2), "img_size": (32, 64)}
    >>> net = PyramidVisionTransformer("acmix", num_classes=5, **small)
    >>> net(torch.zeros(1, 3, 64, 33)).shape
    torch.Size([1, 5])
    """

    pools, global_pool = TOKENS, "token"
    undecayed = ("class_token", "class_place", "places")

    def __init__(
        self,
        layer: str = "attention",
        *,
        widths: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[int, ...] = (8, 8, 4, 4),
        reductions: tuple[int, ...] = (8, 4, 2, 1),
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: tuple[int, int] = (224, 224),
    ) -> None:
        super().__init__()
        if layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
        if min(img_size) < LEAST:
            raise ValueError(f"img_size must be at least {LEAST} along both axes, got {img_size}")
        self.num_features, self.num_classes = widths[-1], num_classes
        self.embeds, self.norms = nn.ModuleList(), nn.ModuleList()
        self.places, self.layers = nn.ParameterList(), nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        per_stage = zip(widths, depths, heads, mlp_ratios, reductions, strict=True)
        grid, before, pixels = img_size, in_chans, 1
        for i, (width, depth, many, mlp_ratio, ratio) in enumerate(per_stage):
            patch = 2 if i else 4
            grid, pixels = (grid[0] // patch, grid[1] // patch), pixels * patch
            self.embeds.append(nn.Conv2d(before, width, patch, patch))
            self.norms.append(nn.LayerNorm(width))
            self.places.append(nn.Parameter(_drawn(1, width, *grid)))
            self.layers.append(
                nn.ModuleList(PyramidBlock(LAYERS[layer](width, many, ratio), width, mlp_ratio) for _ in range(depth))
            )
            self.feature_info.append({"num_chs": width, "reduction": pixels, "module": f"layers.{i}"})
            before = width
        self.class_token = nn.Parameter(_drawn(1, 1, self.num_features))
        self.class_place = nn.Parameter(_drawn(1, 1, self.num_features))
        self.norm = nn.LayerNorm(self.num_features, EPS)
        self.head = classifier(self.num_features, num_classes)
        init_linear(self)

    def _stage(self, i: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The map before stage i to the tokens behind it, in the last stage the class token first, and their grid."""
        x = self.embeds[i](x)
        grid = (x.shape[2], x.shape[3])
        place = _resized(self.places[i], grid).to(x.dtype)
        x = self.norms[i](x.flatten(2).transpose(1, 2)) + place.flatten(2).transpose(1, 2)
        if i == len(self.embeds) - 1:
            first = (self.class_token + self.class_place).to(x.dtype)
            x = torch.cat([first.expand(x.shape[0], -1, -1), x], 1)
        for block in self.layers[i].children():
            x = self.run(lambda x, block=block: block(x, grid), x)
        return x, grid

    def stages_and_last(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps behind the stages, without the last norm; the last one's tokens, the class token first."""
        require_size(x, LEAST)
        maps, tokens = [], x
        for i in range(len(self.embeds)):
            tokens, grid = self._stage(i, x)
            x = as_map(tokens, grid)
            maps.append(x)
        return maps, tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(self.norm(x), pre_logits)

    def fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the codes of the positions resampled to those of this network's ``img_size``."""
        places = {f"places.{i}": (int(p.shape[2]), int(p.shape[3])) for i, p in enumerate(self.places)}
        return {name: _resized(t, places[name]) if name in places else t for name, t in state.items()}


def _drawn(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02)


def _resized(place: Tensor, grid: tuple[int, int]) -> Tensor:
    if tuple(place.shape[2:]) == grid:
        return place
    return F.interpolate(place, grid, mode="bilinear")


TINY = {
    "widths": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2), "mlp_ratios": (2, 2, 2, 2)
}  # fmt: skip
READING = (
    "the text does not say what the convolution reads where keys and values are fewer than queries: here the "
    "attention's own, every position those of the cell of the smaller map that it lies in. Projecting the full map as "
    "well would be 2.20G (tiny) and 4.39G (small). The class token is a map of its own"
)
for _size, _depths, _plain, _mixed in (
    ("tiny", (2, 2, 2, 2), ("13.2M", "1.9G"), ("13M", "2.0G")),
    ("small", (3, 4, 6, 3), ("24.5M", "3.8G"), ("25M", "3.9G")),
):
    for _name, _layer, _text, _published in (
        (
            "pvt", "attention", ": attention to keys and values of a smaller map",
            Published(*_plain, "arXiv 2102.12122"),
        ),
        (
            "acmix_pvt", "acmix", " with ACmix: attention and convolution over the same projections",
            Published(*_mixed, "arXiv 2111.14556; the list of its public code", READING),
        ),
    ):  # fmt: skip
        _arguments, _text = {"layer": _layer, "depths": _depths}, f"PVT-{_size.capitalize()}{_text}"
        register(
            f"{_name}_{_size}", Entry(PyramidVisionTransformer, _arguments, _text, tiny=TINY, published=_published)
        )
