"""The small networks of GWO's benchmark (doi 10.5281/zenodo.17103133): two operators, three linear layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.models.network import Network
from nearfold.models.parts import classifier, layer_of, mixing
from nearfold.models.registry import Entry, Published, register

LAYERS = {
    "conv": "window(3) | box | kernel",
    "deformable": "deformable(3) | box | kernel",
    "depthwise": "window(3) | box | separable",
    "attention": "all | row | softmax(heads=4)",
    "convnn": "nearest(9, cosine, self) | ranked | kernel",
}
SOURCE = "doi 10.5281/zenodo.17103133"
GRID = 8
"""Side of the map that the linear layers read: that of a 32 px image behind two poolings."""


class BaselineNet(Network):
    """[layer, ReLU, max pooling] twice, then three linear layers.

    Maps (B, in_chans, H, W) to (B, num_classes). Every layer keeps the size of its map, so that the linear layers are
    the same for all of them (in the public code the plain convolution is unpadded and has fewer); images of another
    size than 32 px are pooled to 8 x 8 before them.

    Args:
        layer: conv, deformable, depthwise, attention, convnn, or any notation.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size fits.
        width: channels of the first layer; the second has twice as many.
        side: of the map that the linear layers read.
        embed: a 1x1 convolution before either layer makes its channels, so that every layer keeps their number.

    >>> import torch
    >>> BaselineNet("deformable")(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    head_name = "fc3"

    def __init__(
        self,
        layer: str | Operation = "conv",
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Any = None,
        width: int = 16,
        side: int = GRID,
        embed: bool = False,
    ) -> None:
        super().__init__()
        operation = layer_of(LAYERS.get(layer, layer) if isinstance(layer, str) else layer)
        self.side = side
        self.embed1: nn.Module = nn.Conv2d(in_chans, width, 1) if embed else nn.Identity()
        self.embed2: nn.Module = nn.Conv2d(width, 2 * width, 1) if embed else nn.Identity()
        self.conv1 = mixing(operation, width if embed else in_chans, width)
        self.conv2 = mixing(operation, 2 * width if embed else width, 2 * width)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.feature_info = [
            {"num_chs": width, "reduction": 2, "module": "conv1"},
            {"num_chs": 2 * width, "reduction": 4, "module": "conv2"},
        ]
        self.fc1, self.fc2 = nn.Linear(2 * width * side**2, 120), nn.Linear(120, 84)
        self.fc3 = classifier(84, num_classes)
        self.num_features, self.num_classes = 84, num_classes

    def stages(self, x: Tensor) -> list[Tensor]:
        """The two pooled maps."""
        first = self.pool(self.relu(self.run(self.conv1, self.embed1(x))))
        return [first, self.pool(self.relu(self.run(self.conv2, self.embed2(first))))]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, 84) with ``pre_logits``."""
        x = self.relu(self.fc2(self.relu(self.fc1(F.adaptive_avg_pool2d(x, self.side).flatten(1)))))
        out: Tensor = x if pre_logits else self.fc3(x)
        return out

    def remove_head(self) -> None:
        """Without the three linear layers."""
        self.reset_classifier(0)
        self.fc1 = self.fc2 = nn.Identity()  # type: ignore[assignment]


COUNTS = {
    "conv": Published(reading="Omega as printed, 6: two convolutions of C_D 3"),
    "deformable": Published(
        reading="Omega as printed, 8.003: two deformable layers of C_D 4, and C_P the 3,114 parameters of their offsets"
    ),
    "depthwise": Published(reading="Omega as printed, 8: two separable convolutions of C_D 4"),
}
TEXTS = {
    "conv": "3x3 convolutions",
    "deformable": "deformable 3x3 convolutions",
    "depthwise": "depthwise separable 3x3 convolutions",
    "attention": "self-attention with 4 heads",
    "convnn": "ConvNN, k = 9",
}

for _layer, _text in TEXTS.items():
    register(
        f"gwo_{_layer}",
        Entry(
            BaselineNet,
            {"layer": _layer},
            f"GWO's baseline net around two {_text}",
            input_size=(3, 32, 32),
            num_classes=10,
            tiny={"width": 8},
            published=dataclasses.replace(COUNTS[_layer], source=SOURCE, classes=10)
            if _layer in COUNTS
            else Published(),
        ),
    )
