"""DenseNet-121 around any mixing layer, in torchvision's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.models.network import MAPS, Network
from nearfold.models.parts import LAYERS, classifier, layer_of, mixing, require_size
from nearfold.models.registry import Entry, Published, register

BOTTLENECK = 4  # channels of a dense layer's 1x1, in growths


class DenseLayer(nn.Module):
    """x (B, C, H, W) -> x and ``growth`` new channels, (B, C + growth, H, W)."""

    def __init__(self, operation: Operation, channels: int, growth: int) -> None:
        super().__init__()
        inner = BOTTLENECK * growth
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, inner, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), mixing(operation, inner, growth, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu(self.norm1(x)))
        return torch.cat((x, self.conv2(self.relu(self.norm2(new)))), 1)


class Transition(nn.Sequential):
    """Half the channels at half the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(Network):
    """Stem, dense blocks with transitions between them, average pooling, linear classifier.

    Maps (B, in_chans, H, W) to (B, num_classes) at any H and W of 29 or more. Modules go by torchvision's names: with
    ``layer="conv"`` the network loads the state dict of its densenet121. As there, no convolution has a bias.

    Args:
        depths: dense layers of every block.
        layer: what stands for their 3x3 convolutions: conv, convnn, hybrid, or any notation.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size fits.
        width: channels of the stem.
        growth: channels that a dense layer adds.

    Source: arXiv 1608.06993.

    >>> DenseNet((1, 1), "hybrid", num_classes=10, width=8, growth=4)(torch.zeros(1, 3, 33, 47)).shape
    torch.Size([1, 10])
    """

    head_name, pools = "classifier", MAPS

    def __init__(
        self,
        depths: Sequence[int] = (6, 12, 24, 16),
        layer: str | Operation = "conv",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: Any = None,
        width: int = 64,
        growth: int = 32,
    ) -> None:
        super().__init__()
        if not depths or any(type(n) is not int or n < 1 for n in depths):
            raise ValueError(f"depths must be positive integers, one a block, got {depths!r}")
        operation = layer_of(layer)
        self.features = nn.Sequential()
        self.features.conv0 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.features.norm0, self.features.relu0 = nn.BatchNorm2d(width), nn.ReLU()
        self.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "features.relu0"}]
        channels = width
        for i, depth in enumerate(depths, 1):
            block = nn.Sequential()
            for j in range(1, depth + 1):
                block.add_module(f"denselayer{j}", DenseLayer(operation, channels, growth))
                channels += growth
            self.features.add_module(f"denseblock{i}", block)
            last = i == len(depths)
            name = "features.relu5" if last else f"features.denseblock{i}"
            self.feature_info.append({"num_chs": channels, "reduction": 2 ** (i + 1), "module": name})
            if not last:
                self.features.add_module(f"transition{i}", Transition(channels))
                channels //= 2
        self.features.norm5, self.features.relu5 = nn.BatchNorm2d(channels), nn.ReLU()  # 5: torchvision's, of 4 blocks
        self.num_features, self.num_classes = channels, num_classes
        self.classifier = classifier(channels, num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The stem's map, that of every block but the last, and the last one's behind its norm."""
        require_size(x, 29)
        wanted = [entry["module"].partition(".")[2] for entry in self.feature_info]
        maps = []
        for name, module in self.features.named_children():
            for part in module.children() if name.startswith("denseblock") else (module,):
                x = self.run(part, x) if isinstance(part, DenseLayer) else part(x)
            if name in wanted:
                maps.append(x)
        return maps


COUNTS = {"conv": Published("7,978,856", "", "torchvision 0.28")}

for _layer in LAYERS:
    register(
        f"densenet121_{_layer}",
        Entry(
            DenseNet,
            {"layer": _layer},
            f"DenseNet-121, the 3x3 convolution of every dense layer a layer `{_layer}`",
            tiny={"depths": (1, 1, 1, 1), "width": 8, "growth": 4},
            published=COUNTS.get(_layer, Published()),
        ),
    )
