"""VGG around any mixing layer, in the layout of the public ConvNN code (arXiv 2511.14137)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.models.network import Network
from nearfold.models.parts import LAYERS, classifier, layer_of, mixing, require_size
from nearfold.models.registry import Entry, Published, register

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
GROWTH = (1, 2, 4, 8, 8)
POOLED = 7


class VGG(Network):
    """[layer, BatchNorm, ReLU] in five groups with max pooling after each, then a classifier of three linear layers.

    Maps (B, in_chans, H, W) to (B, num_classes), at any H and W of 32 or more. Modules go by torchvision's names, so
    that the network with ``layer="conv"`` loads the state dict of its vgg11_bn.

    Args:
        depth: 11, 13, 16 or 19 layers that have a kernel, the classifier's three included.
        layer: what stands for every 3x3 convolution: conv, convnn, hybrid, or any notation.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size fits.
        width: channels of the first group; the others have 2, 4, 8 and 8 times as many.
        hidden: features of the classifier's two inner layers.
        drop_rate: share of them that dropout zeroes.

    Source: arXiv 1409.1556.

    >>> import torch
    >>> VGG(11, "hybrid", num_classes=10, width=4, hidden=16)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    head_name = "classifier.6"

    def __init__(
        self,
        depth: int = 11,
        layer: str | Operation = "conv",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: Any = None,
        width: int = 64,
        hidden: int = 4096,
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth!r}")
        operation = layer_of(layer)
        modules: list[nn.Module] = []
        self.feature_info = []
        channels = in_chans
        for stage, (count, growth) in enumerate(zip(DEPTHS[depth], GROWTH, strict=True)):
            for _ in range(count):
                modules += [mixing(operation, channels, width * growth), nn.BatchNorm2d(width * growth), nn.ReLU()]
                channels = width * growth
            name = f"features.{len(modules) - 1}"
            self.feature_info.append({"num_chs": channels, "reduction": 2**stage, "module": name})
            modules.append(nn.MaxPool2d(2))
        self.feature_info.append({"num_chs": channels, "reduction": 32, "module": f"features.{len(modules) - 1}"})
        self.features = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool2d(POOLED)
        self.num_features, self.num_classes = hidden, num_classes
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * POOLED**2, hidden), nn.ReLU(), nn.Dropout(drop_rate)),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(drop_rate)),
            classifier(hidden, num_classes),
        )

    def stages(self, x: Tensor) -> list[Tensor]:
        """Five maps before a pooling, and the last one after it."""
        require_size(x, 32)
        maps, start = [], 0
        for entry in self.feature_info:
            end = int(entry["module"].partition(".")[2]) + 1
            x = self.run(self.features[start:end], x)
            maps.append(x)
            start = end
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, hidden) with ``pre_logits``."""
        x = self.avgpool(x).flatten(1)
        out: Tensor = (self.classifier[:-1] if pre_logits else self.classifier)(x)
        return out

    def remove_head(self) -> None:
        """Without the classifier, which has most of the parameters."""
        self.reset_classifier(0)
        self.classifier = nn.Sequential()


TINY = {"width": 8, "hidden": 16}
HYBRID_READING = "the layer ends in a 1x1 map with bias, so that the number is the same for every ratio of the branches"
COUNTS = {  # torchvision's vgg*_bn with 10 classes; the ConvNN code's logs for the hybrid
    (11, "conv"): Published("128,812,810", "", "arXiv 2511.14137, training logs", classes=10),
    (11, "hybrid"): Published("130,015,690", "", "arXiv 2511.14137, training logs", HYBRID_READING, 10),
}

for _depth in DEPTHS:
    for _name in LAYERS:
        register(
            f"vgg{_depth}_{_name}",
            Entry(
                VGG,
                {"depth": _depth, "layer": _name},
                f"VGG-{_depth}, every 3x3 convolution a layer `{_name}`",
                input_size=(3, 32, 32),
                num_classes=10,
                tiny=TINY,
                published=COUNTS.get((_depth, _name), Published()),
            ),
        )
