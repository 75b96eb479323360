"""Self-attention networks with patchwise attention, and with ACmix in its place (arXiv 2004.13621; 2111.14556).

Patchwise attention makes the weights of a whole patch at once: a small MLP reads the centre's query and all keys of the
patch, and gives every group of channels one number for every position of the patch. They are not a softmax.

Shape legend: B images, C channels, H and W the grid, S positions of a patch, G groups that share weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.kernels.local import local_sum, pad
from nearfold.models.network import MAPS, Network
from nearfold.models.parts import classifier, require_size
from nearfold.models.registry import Entry, Published, register
from nearfold.models.shift import ShiftConv, rates

SHARED = 8  # channels of a group
KERNELS = (3, 7, 7, 7, 7)
LAYERS = ("attention", "acmix")


def weighted_patches(value: Tensor, weight: Tensor, size: int) -> Tensor:
    """Sum over a patch, mirrored at the border: value (B, C, H, W) and weight (B, G, S, H, W) to (B, C, H, W).

    >>> weighted_patches(torch.ones(1, 4, 5, 6), torch.ones(1, 2, 9, 5, 6), 3)[0, 0, 0, 0]
    tensor(9.)
    """
    reach = (size // 2,) * 2
    value = pad(value, reach, reach, True)
    problems = value.reshape(-1, value.shape[1] // weight.shape[1], *value.shape[2:])
    offsets = [n for row in range(size) for column in range(size) for n in (row, column)]
    y: Tensor = local_sum(weight.flatten(0, 1), problems, offsets, [1, 1])
    return y.reshape(value.shape[0], value.shape[1], *y.shape[2:])


class PatchwiseAttention(nn.Module):
    """arXiv 2004.13621, 3.2, in the form "concatenation": (B, channels, H, W) to (B, channels / 4, H, W).

    Args:
        channels: of the input; query and key have a 16th of them, the value a quarter.
        size: side of the patch.
        acmix: adds a convolution over the same query, key and value, whose value is mapped to the width of the others.

    >>> PatchwiseAttention(64, 3)(torch.zeros(2, 64, 5, 6)).shape
    torch.Size([2, 16, 5, 6])
    """

    def __init__(self, channels: int, size: int, acmix: bool = False) -> None:
        super().__init__()
        self.size = size
        compared, values = channels // 16, channels // 4
        groups, read = values // SHARED, compared * (size * size + 1)
        self.query, self.key = nn.Conv2d(channels, compared, 1), nn.Conv2d(channels, compared, 1)
        self.value = nn.Conv2d(channels, values, 1)
        self.weigh = nn.Sequential(
            nn.BatchNorm2d(read),
            nn.ReLU(),
            nn.Conv2d(read, groups, 1, bias=False),
            nn.BatchNorm2d(groups),
            nn.ReLU(),
            nn.Conv2d(groups, groups * size * size, 1),
        )
        self.acmix = acmix
        if acmix:
            self.narrow = nn.Conv2d(values, compared, 1)
            self.shift = ShiftConv(compared, values, compared // 4)
            self.rates = rates()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        reach = (self.size // 2,) * 2
        patch = F.unfold(pad(key, reach, reach, True), self.size).unflatten(2, tuple(x.shape[2:]))
        weight = self.weigh(torch.cat([query, patch], 1)).unflatten(1, (-1, self.size**2))
        y = weighted_patches(value, weight, self.size)
        if not self.acmix:
            return y
        return self.rates[0] * y + self.rates[1] * self.shift(query, key, self.narrow(value))


class SelfAttentionBlock(nn.Module):
    """x + conv(layer(x)), norm and ReLU before both; (B, channels, H, W) to the same shape."""

    def __init__(self, channels: int, size: int, acmix: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attention = PatchwiseAttention(channels, size, acmix)
        self.norm2 = nn.BatchNorm2d(channels // 4)
        self.conv = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(F.relu(self.norm1(x)))
        out: Tensor = x + self.conv(F.relu(self.norm2(y)))
        return out


class SelfAttentionNetwork(Network):
    """Five stages at half the size each: (B, in_chans, H, W) to (B, num_classes).

    Args:
        layer: "attention" or "acmix".
        width: channels of the first stage; the second has 4 times as many, the others twice as many as the one before.
        depths: blocks of every stage.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size fits.

    >>> net = SelfAttentionNetwork("acmix", depths=(1, 1), num_classes=5)
    >>> net(torch.zeros(1, 3, 9, 13)).shape
    torch.Size([1, 5])
    """

    pools = MAPS

    def __init__(
        self,
        layer: str = "attention",
        *,
        width: int = 64,
        depths: tuple[int, ...] = (2, 1, 2, 4, 1),
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: tuple[int, int] = (224, 224),
    ) -> None:
        super().__init__()
        if layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
        if width % 64:
            raise ValueError(f"width must be a multiple of 64 (a 16th of it makes heads of 4 channels), got {width}")
        if len(depths) > len(KERNELS):
            raise ValueError(f"depths must be at most {len(KERNELS)} numbers, one for every stage, got {depths}")
        self.num_classes = num_classes
        self.stem, self.stem_norm = nn.Conv2d(in_chans, width, 1, bias=False), nn.BatchNorm2d(width)
        self.widen, self.layers, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        before = width
        for i, (depth, size) in enumerate(zip(depths, KERNELS, strict=False)):
            channels = before * (1, 4, 2, 2, 2)[i]
            self.widen.append(nn.Conv2d(before, channels, 1, bias=False))
            self.layers.append(
                nn.ModuleList(SelfAttentionBlock(channels, size, layer == "acmix") for _ in range(depth))
            )
            self.norms.append(nn.BatchNorm2d(channels))
            self.feature_info.append({"num_chs": channels, "reduction": 2 ** (i + 1), "module": f"norms.{i}"})
            before = channels
        self.num_features = before
        self.head = classifier(before, num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps behind the stages, after their norms and ReLUs."""
        require_size(x, 1)
        x = F.relu(self.stem_norm(self.stem(x)))
        maps = []
        for widen, blocks, norm in zip(self.widen, self.layers, self.norms, strict=True):
            x = widen(F.max_pool2d(x, 2, ceil_mode=True))
            for block in blocks:  # type: ignore[attr-defined]
                x = self.run(block, x)
            x = F.relu(norm(x))
            maps.append(x)
        return maps


READING = (
    "query and key have a quarter of the value's channels, but the convolution half wants three maps of one width: "
    "here a 1x1 map brings the value to the others' width, heads have 4 channels, and the grouped convolution makes "
    "the attention's channels. Cutting the value into pieces of that width instead gives 12.0M, 16.4M and 20.8M"
)
PLAIN = (
    "arXiv 2004.13621; the list of its public code, patchwise",
    ("the printed multiply-adds count norms and ReLUs too; without: 1.79G, 2.48G and 3.13G"),
)
MIXED = "arXiv 2111.14556; the list of its public code", READING
for _size, _depths, _plain, _params, _macs in (
    ("10", (2, 1, 2, 4, 1), "11.8M", "12.1M", "1.9G"),
    ("15", (3, 2, 3, 5, 2), "16.2M", "16.6M", "2.7G"),
    ("19", (3, 3, 4, 6, 3), "20.5M", "21.2M", "3.4G"),
):
    for _name, _layer, _text, _published in (
        ("san", "attention", ": patchwise self-attention", Published(_plain, "", *PLAIN)),
        (
            "acmix_san", "acmix", " with ACmix: patchwise attention and convolution over the same projections",
            Published(_params, _macs, *MIXED),
        ),
    ):  # fmt: skip
        _arguments = {"layer": _layer, "depths": _depths}
        _entry = Entry(
            SelfAttentionNetwork, _arguments, f"SAN-{_size}{_text}", tiny={"depths": (1, 1)}, published=_published
        )
        register(f"{_name}{_size}", _entry)
