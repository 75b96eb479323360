"""Swin transformers, and with ACmix in place of their attention (arXiv 2103.14030; 2111.14556).

Shape legend: B images, H and W the grid, C channels. Between the layers channels come last, as norms and MLPs want
them; the mixing layers take them first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.models.network import MAPS, Network
from nearfold.models.parts import classifier, require_size
from nearfold.models.registry import Entry, Published, register
from nearfold.models.vit import TransformerBlock, init_linear
from nearfold.nn import Mixer

BLOCK = "block({window}, scaled(bias=table), shift={shift}, padded) | box | softmax(heads={heads})"
LAYERS = {"attention": BLOCK, "acmix": f"a*({BLOCK}) + b*(window(3) | box | shift({{heads}}, bias))"}
"""The layers that have a name, as notation; ``{heads}``, ``{window}`` and ``{shift}`` differ from block to block."""


class SwinBlock(TransformerBlock):
    """x + layer(norm(x)), then x + MLP(norm(x)); (B, H, W, C) to the same shape."""

    def __init__(self, operation: str, channels: int) -> None:
        super().__init__(Mixer(operation, channels), channels)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x = x + self.attention(self.norm1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """2 x 2 positions, zeros beyond an odd grid, become one: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        out: Tensor = self.reduction(self.norm(x))
        return out


class SwinTransformer(Network):
    """Four stages of blocks, merged 2 x 2 between them: (B, in_chans, H, W) to (B, num_classes).

    Args:
        layer: "attention", "acmix", an operation for maps or its notation, in which ``{heads}``, ``{window}`` and
            ``{shift}`` become those of the block.
        width: channels of the first stage; they double from stage to stage.
        depths: blocks of every stage.
        heads: heads of every stage.
        window: side of a block of attention; every second layer shifts it by half, unless the map is no larger. Maps
            that it does not divide are padded with zeros, as in the public code, torchvision and timm: `block(padded)`.
        patch: pixels of a position of the first stage, along one axis.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size of at least one patch fits.

    >>> net = SwinTransformer("acmix", width=8, depths=(1, 1), heads=(1, 2), num_classes=5)
    >>> net(torch.zeros(1, 3, 33, 47)).shape
    torch.Size([1, 5])
    """

    pools = MAPS

    def __init__(
        self,
        layer: str | Operation = "attention",
        *,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        patch: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: tuple[int, int] = (224, 224),
    ) -> None:
        super().__init__()
        if len(depths) != len(heads):
            raise ValueError(f"depths and heads must be one number for every stage each, got {depths=} and {heads=}")
        self.patch, self.num_classes = patch, num_classes
        self.num_features = width * 2 ** (len(depths) - 1)
        self.embed = nn.Conv2d(in_chans, width, patch, patch)
        self.embed_norm = nn.LayerNorm(width)
        self.merges, self.layers = nn.ModuleList(), nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        text = LAYERS.get(str(layer), str(layer)).replace("{window}", str(window))
        for i, (depth, many) in enumerate(zip(depths, heads, strict=True)):
            channels = width * 2**i
            self.merges.append(PatchMerging(channels // 2) if i else nn.Identity())
            here = text.replace("{heads}", str(many))
            operations = [here.replace("{shift}", str(window // 2 if j % 2 else 0)) for j in range(depth)]
            self.layers.append(nn.ModuleList(SwinBlock(operation, channels) for operation in operations))
            self.feature_info.append({"num_chs": channels, "reduction": patch * 2**i, "module": f"layers.{i}"})
        self.norm = nn.LayerNorm(self.num_features)
        self.head = classifier(self.num_features, num_classes)
        init_linear(self)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps behind the stages, as they are handed on: without the last norm."""
        require_size(x, self.patch)
        x = self.embed_norm(self.embed(x).permute(0, 2, 3, 1))
        maps = []
        for merge, blocks in zip(self.merges, self.layers, strict=True):
            x = merge(x)
            for block in blocks:  # type: ignore[attr-defined]
                x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), pre_logits)


TINY = {"width": 8, "depths": (2, 2), "heads": (1, 2), "window": 4}
READING = (
    "the public code's layer, with the convolution on the map as it lies (there on the rolled one). It has 28.65M and "
    "50.35M parameters, 0.36M and 0.74M more than Swin; no count per channel gives the printed 30M and 51M. They look "
    "as if these were added to the 29M and 50M that Swin's paper prints, and rounded up"
)
for _size, _depths, _plain, _mixed in (
    ("tiny", (2, 2, 6, 2), ("28,288,354", "4.5G"), ("30M", "4.6G")),
    ("small", (2, 2, 18, 2), ("49,606,258", "8.7G"), ("51M", "9.0G")),
):
    for _name, _layer, _text, _published in (
        (
            "swin", "attention", ": attention in shifted windows",
            Published(*_plain, "arXiv 2103.14030; parameters: torchvision"),
        ),
        (
            "acmix_swin", "acmix", " with ACmix: attention in shifted windows and convolution, one projection",
            Published(*_mixed, "arXiv 2111.14556; the list of its public code", READING, reached=False),
        ),
    ):  # fmt: skip
        _arguments, _text = {"layer": _layer, "depths": _depths}, f"Swin-{_size.capitalize()}{_text}"
        register(f"{_name}_{_size}", Entry(SwinTransformer, _arguments, _text, tiny=TINY, published=_published))
