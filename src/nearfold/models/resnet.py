"""ResNet around any mixing layer: torchvision's layout, ConvNN's and ACmix's networks, GWO's ResNet-18."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nearfold.grammar import Branch, Operation
from nearfold.models.network import MAPS, Network
from nearfold.models.parts import LAYERS, classifier, layer_of, mixing, with_stride
from nearfold.models.registry import Entry, Published, register

BIASES = ("none", "layers", "all")
_SHIFTED = "window(3) | box | shift(4)"
_ATTENTION = "window(7, scaled(relative), mode=reflect) | box | softmax(heads=4, project=qkv)"
ACMIX = f"a*({_ATTENTION}) + b*({_SHIFTED})"
"""The layer of the public ACmix code (arXiv 2111.14556)."""
ACMIX_TWICE = f"{ACMIX} + c*({_SHIFTED})"
"""The same with two convolution halves, which gives the numbers of parameters that the paper prints."""


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a network share: the layer, whether it also takes strides, and which biases there are."""

    layer: Operation
    strided: bool
    bias: str

    def three(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """What stands for a 3x3 convolution."""
        bias = self.bias != "none"
        if stride > 1 and not self.strided:
            return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        operation = self.layer if stride == 1 else with_stride(self.layer, stride)
        if isinstance(operation, Branch) and operation.mix:
            # its 1x1 is one of the network's 1x1 convolutions, which have no bias of their own but with "all"
            split = mixing(dataclasses.replace(operation, mix=False), in_channels, out_channels, bias=bias)
            return nn.Sequential(split, self.one(out_channels, out_channels))
        return mixing(operation, in_channels, out_channels, bias=bias)

    def one(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
        """A 1x1 convolution."""
        return nn.Conv2d(in_channels, out_channels, 1, stride, bias=self.bias == "all")


class _Block(nn.Module):
    """What both blocks share: x -> relu(path(x) + shortcut(x))."""

    expansion: int

    def __init__(self, in_channels: int, width: int, stride: int, style: Style) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        made = width * self.expansion
        shortcut = [style.one(in_channels, made, stride), nn.BatchNorm2d(made)]
        self.downsample = nn.Sequential(*shortcut) if stride > 1 or in_channels != made else None

    def path(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, width * expansion, H / stride, W / stride)."""
        out: Tensor = self.relu(self.path(x) + (x if self.downsample is None else self.downsample(x)))
        return out


class BasicBlock(_Block):
    """Two 3x3 layers, as in ResNet-18 and -34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, style: Style) -> None:
        super().__init__(in_channels, width, stride, style)
        self.conv1, self.bn1 = style.three(in_channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = style.three(width, width, 1), nn.BatchNorm2d(width)

    def path(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out


class Bottleneck(_Block):
    """A 3x3 layer between two 1x1 convolutions, as in ResNet-26, -38 and -50; the stride is the 3x3's."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, style: Style) -> None:
        super().__init__(in_channels, width, stride, style)
        self.conv1, self.bn1 = style.one(in_channels, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = style.three(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = style.one(width, width * 4), nn.BatchNorm2d(width * 4)

    def path(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(Network):
    """Stem, four groups of residual blocks, average pooling, linear classifier.

    Maps (B, in_chans, H, W) to (B, num_classes) at any H and W. Modules go by torchvision's names: with
    ``layer="conv"`` and ``bias="none"`` the network loads the state dict of its resnet18, 34 and 50.

    Args:
        depths: blocks of the four groups.
        block: basic or bottleneck.
        layer: what stands for the 3x3 convolutions: conv, convnn, hybrid, or any notation.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size fits.
        width: channels of the stem.
        bias: which convolutions have biases: "none", "layers" (all that stand for a 3x3) or "all".
        strided: also replace the 3x3 convolutions with a stride; without it, they stay convolutions.

    Source: arXiv 1512.03385, with the stride on the 3x3 as torchvision has it.

    >>> import torch
    >>> ResNet((1, 1, 1, 1), "basic", "hybrid", num_classes=10, width=8)(torch.zeros(1, 3, 33, 47)).shape
    torch.Size([1, 10])
    """

    head_name, pools = "fc", MAPS

    def __init__(
        self,
        depths: Sequence[int],
        block: str = "bottleneck",
        layer: str | Operation = "conv",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: Any = None,
        width: int = 64,
        bias: str = "none",
        strided: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("block", block, BLOCKS), ("bias", bias, BIASES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if len(depths) != 4 or any(type(n) is not int or n < 1 for n in depths):
            raise ValueError(f"depths must be four positive integers, got {depths!r}")
        style, kind = Style(layer_of(layer), strided, bias), BLOCKS[block]
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=bias == "all")
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "relu"}]
        channels = width
        for group, depth in enumerate(depths):
            inner = width * 2**group
            blocks = []
            for i in range(depth):
                blocks.append(kind(channels, inner, 2 if group and not i else 1, style))
                channels = inner * kind.expansion
            name = f"layer{group + 1}"
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 2 ** (group + 2), "module": name})
        self.num_features, self.num_classes = channels, num_classes
        self.fc = classifier(channels, num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The stem's map, and that of every group."""
        maps = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(maps[0])
        for entry in self.feature_info[1:]:
            for block in self.get_submodule(entry["module"]).children():
                x = self.run(block, x)
            maps.append(x)
        return maps


TINY = {"depths": (1, 1, 1, 1), "width": 8}
TORCHVISION = "torchvision 0.28"
PAGE = "page of arXiv 2511.14137's first author"
COUNTS = {
    "resnet18_conv": Published("11,689,512", "", TORCHVISION),
    "resnet34_conv": Published("21,797,672", "", TORCHVISION),
    "resnet50_conv": Published(
        "25.583M",
        "4.089G",
        PAGE,
        "every convolution has a bias: 25,583,592, cut off after the third digit; torchvision's has none (25,557,032, "
        'bias="none"). Printed: 8.178 GFLOPs, two for every multiply-add',
    ),
    "resnet50_hybrid": Published(
        "26.474M",
        "",
        PAGE,
        "every 3x3 layer has a bias, the 1x1 after it has none; 13 of the 16 are hybrid, the three with a stride stay "
        "convolutions. With every bias of resnet50_conv it would be 26.500M: no one rule gives both printed numbers. "
        "Printed: 10.655 GFLOPs, which leave out the branches' own multiply-adds by their kernels",
    ),
}
TWICE = (
    "two convolution halves over the shared projections, 81 shift weights a channel each: the one reading found that "
    "gives the printed parameters of all three rows, with multiply-adds within 2.1 %. The public code has one half: "
    "10.49M, 14.41M and 18.33M parameters, 2.20G, 2.85G and 3.49G (layer=nearfold.models.resnet.ACMIX)"
)

for _name, _depths, _block in (
    ("resnet18", (2, 2, 2, 2), "basic"),
    ("resnet34", (3, 4, 6, 3), "basic"),
    ("resnet50", (3, 4, 6, 3), "bottleneck"),
):
    for _layer in LAYERS:
        _bias = "all" if (_name, _layer) == ("resnet50", "conv") else "none" if _layer == "conv" else "layers"
        register(
            f"{_name}_{_layer}",
            Entry(
                ResNet,
                {"depths": _depths, "block": _block, "layer": _layer, "bias": _bias},
                f"ResNet-{_name[6:]}, every 3x3 convolution of stride 1 a layer `{_layer}`",
                tiny=TINY,
                published=COUNTS.get(f"{_name}_{_layer}", Published()),
            ),
        )

for _name, _depths, _params, _macs in (
    ("26", (1, 2, 4, 1), "10.6M", "2.3G"),
    ("38", (2, 3, 5, 2), "14.6M", "2.9G"),
    ("50", (3, 4, 6, 3), "18.6M", "3.6G"),
):
    register(
        f"acmix_resnet{_name}",
        Entry(
            ResNet,
            {"depths": _depths, "layer": ACMIX_TWICE, "bias": "layers", "strided": True},
            f"ResNet-{_name} in which every 3x3 convolution is ACmix",
            tiny=TINY,
            published=Published(_params, _macs, "arXiv 2111.14556, table 1", TWICE),
        ),
    )

register(
    "gwo_resnet18",
    Entry(
        ResNet,
        {"depths": (2, 2, 2, 2), "block": "basic"},
        "ResNet-18 as GWO's benchmark has it: torchvision's, for 10 classes",
        input_size=(3, 32, 32),
        num_classes=10,
        tiny=TINY,
        published=Published(
            source="doi 10.5281/zenodo.17103133",
            reading="Omega is 60 as printed: 20 convolutions of C_D 3, its shortcuts' among them",
        ),
    ),
)
