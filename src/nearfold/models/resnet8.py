"""ResNet-8: a residual network for 32 px that two cores train in minutes, around any mixing layer.

A stem that whitens 2 x 2 patches, then three groups: a 3x3 convolution that pools to half the side, and a residual
layer, which is the operation. Eight layers have weights. The pieces are those of the published speed records on
CIFAR-10 (K. Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498; D. Page's ResNet-9), in the
language's words; no code is theirs.

Shape legend: B images, C channels, H x W pixels, P patches, D values of a patch (4 C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import CATALOGUE, Operation
from nearfold.models.network import MAPS, Network
from nearfold.models.parts import CONV, classifier, layer_of, mixing, require_size
from nearfold.models.registry import Entry, register

PATCH = 2
SMALLEST = 8  # pixels a side: one position is left behind the last pooling
SCALE = 1 / 9
"""Of pooled features: classes start about equal, and the classifier learns slowly."""
MOMENTUM = 0.4
"""Of the running statistics: the last few steps decide them, as there are few."""
SMOOTHED = 5e-4
"""Added to the variances of patches: directions in which images hardly differ are noise."""


class Group(nn.Module):
    """Convolution, pooling to half the side, then x + layer(x); norm and GELU behind both.

    (B, in_channels, H, W) to (B, width, H // 2, W // 2).
    """

    def __init__(self, in_channels: int, width: int, layer: Operation) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width, momentum=MOMENTUM)
        self.layer = mixing(layer, width, width, bias=False)
        self.norm2 = nn.BatchNorm2d(width, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv(x), 2)))
        return x + F.gelu(self.norm2(self.layer(x)))


class ResNet8(Network):
    """Whitening stem, three groups, pooling, linear classifier: (B, in_chans, H, W) to (B, num_classes).

    The stem's filters do not train. `fit` sets them by the first training images (`start`); until then they are
    random.

    Args:
        layer: the residual layer of each group: conv, convnn, hybrid, any operation or its notation.
        widths: channels of the three groups.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size of at least 8 pixels fits.

    >>> net = ResNet8("branch(0.5, convnn, conv)", widths=(8, 8, 8), num_classes=10)
    >>> net(torch.zeros(1, 3, 32, 41)).shape
    torch.Size([1, 10])
    """

    pools, global_pool = MAPS, "max"

    def __init__(
        self,
        layer: str | Operation = "conv",
        *,
        widths: Sequence[int] = (64, 192, 224),
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Any = None,
    ) -> None:
        super().__init__()
        if len(widths) != 3 or any(type(n) is not int or n < 1 for n in widths):
            raise ValueError(f"widths must be three positive integers, got {widths!r}")
        operation = layer_of(layer)
        made = 2 * PATCH**2 * in_chans
        self.stem = nn.Conv2d(in_chans, made, PATCH)
        self.stem.weight.requires_grad_(False)
        self.groups = nn.ModuleList()
        for width in widths:
            self.groups.append(Group(made, width, operation))
            made = width
        self.num_features, self.num_classes = made, num_classes
        self.head = classifier(made, num_classes)
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (i + 1), "module": f"groups.{i}"} for i, width in enumerate(widths)
        ]

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Set the stem's filters so that what they make of these images is white: unit variance, uncorrelated.

        Half of them are the principal directions of 2 x 2 patches over the root of their variance, the other half the
        same with the sign changed.

        Args:
            images: float (B, in_chans, H, W), as the network is trained on them.
        """
        patches_PD = F.unfold(images.float(), PATCH).movedim(1, -1).flatten(0, 1)
        patches_PD = patches_PD - patches_PD.mean(0)
        variance_D, direction_DD = torch.linalg.eigh(patches_PD.T @ patches_PD / len(patches_PD))
        filters = (direction_DD / (variance_D + SMOOTHED).sqrt()).T.unflatten(1, self.stem.weight.shape[1:])
        self.stem.weight.copy_(torch.cat([filters, -filters]))
        assert self.stem.bias is not None
        self.stem.bias.zero_()

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps behind the groups."""
        require_size(x, SMALLEST)
        x = F.gelu(self.stem(F.pad(x, (0, PATCH - 1, 0, PATCH - 1))))
        maps = []
        for group in self.groups:
            x = self.run(group, x)
            maps.append(x)
        return maps

    def pooled(self, x: Tensor) -> Tensor:
        """The last map (B, C, H, W) by ``global_pool``, scaled so that logits start small: (B, C)."""
        return super().pooled(x) * (SCALE if self.global_pool else 1)


@dataclass(frozen=True)
class Layer:
    """A residual layer that has a name.

    Attributes:
        title: in tables and plots.
        notation: of the operation.
    """

    title: str
    notation: str


LAYERS: Mapping[str, Layer] = MappingProxyType(
    {
        "conv": Layer("convolution", CONV),
        "neighborhood": Layer("neighbourhood attention", "window(7, mode=inside) | box | softmax(heads=4)"),
        "deformable": Layer("deformable convolution", "deformable(3) | box | modulated*kernel"),
        "hybrid": Layer("hybrid, all", f"branch(0.5, nearest(9, cosine, self) | ranked | kernel, {CONV}, mix)"),
        "hybrid_random": Layer(
            "hybrid, random 32", f"branch(0.5, nearest(9, cosine, random(32), self) | ranked | kernel, {CONV}, mix)"
        ),
        "acmix": Layer("ACmix", CATALOGUE["acmix"].notation),
        "convnn": Layer("ConvNN", "nearest(9, cosine, self) | ranked | kernel"),
        "convnn_attention": Layer("ConvNN attention", "nearest(9, scaled) | ranked | softmax(heads=4)*depthwise"),
        "kvt": Layer("KVT", "nearest(9, scaled) | ranked | softmax(heads=4)"),
        "attention": Layer("self-attention", "all | row | softmax(heads=4)"),
        "scan": Layer(
            "selective scan, cross",
            " + ".join(
                f"(scan(state=16{order}) | causal | selective(project=o))"
                for order in ("", ", order=columns", ", reverse", ", order=columns, reverse")
            ),
        ),
    }
)
"""The layers of the named networks, from space to features; last, a recurrence. Random candidates are drawn in training
only."""

WIDTHS = {"resnet8": (64, 192, 224), "resnet8s": (32, 128, 128)}

for _name, _widths in WIDTHS.items():
    for _layer, _entry in LAYERS.items():
        register(
            f"{_name}_{_layer}",
            Entry(
                ResNet8,
                {"layer": _entry.notation, "widths": _widths},
                f"ResNet-8 for 32 px, widths {'/'.join(map(str, _widths))}, the residual layers: {_entry.title}",
                input_size=(3, 32, 32),
                num_classes=10,
                tiny={"widths": (8, 8, 8)},
            ),
        )
