"""A VGG in small: the network of the studies that a CPU can run."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.nn import Mixer

POOLED = 4


class PlainNet(nn.Module):
    """Stem, then twice [layer, BatchNorm, ReLU] x `depth` with max pooling between, then two linear layers.

    Like a VGG it has no shortcuts, keeps the place of what it found for its linear layers, and memorises a few thousand
    images within a few epochs; unlike one it trains in seconds on one core. The stem brings images to at most 16 x 16
    positions. Maps (B, in_channels, H, W) to (B, classes), at any H and W.

    Args:
        operation: what the layers compute, an Operation or its notation.
        in_channels: channels of the images.
        classes: number of classes.
        width: channels before the pooling; twice as many after it.
        depth: layers on either side of it.
        hidden: features between the linear layers.
        stride: of the stem, as `nearfold.models.stem_stride` has it for the images' size.

    Raises:
        ValueError: a width that the operation cannot work with.

    >>> import torch
    >>> PlainNet("window(3) | box | kernel", 3, 10, stride=2)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        operation: Operation | str,
        in_channels: int,
        classes: int,
        *,
        width: int = 16,
        depth: int = 2,
        hidden: int = 128,
        stride: int = 1,
    ) -> None:
        super().__init__()
        kernel = 2 * stride + 1
        modules: list[nn.Module] = [
            nn.Conv2d(in_channels, width, kernel, stride, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for group, (before, channels) in enumerate(((width, width), (width, 2 * width))):
            if group:
                modules.append(nn.MaxPool2d(2, ceil_mode=True))
            for index in range(depth):
                modules += [
                    Mixer(operation, channels if index else before, channels),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * width * POOLED**2, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), POOLED))
        return logits
