"""Segmentation: a registered backbone under torchvision's FCN head, trained on generated images with real masks.

`python -m nearfold.recipes.segmentation` trains for a minute and prints the loss, and the mean IoU of the classes on
images that were not trained on, before and after. The head (arXiv 1411.4038) reads the finest map of a feature pyramid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold._torchvision import load
from nearfold.recipes.backbone import Pyramid, Settings, settings_of, study
from nearfold.recipes.scenes import CLASSES, Scene


class Segmenter(nn.Module):
    """(B, 3, H, W) -> (B, classes, H, W)."""

    def __init__(self, backbone: Pyramid, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = load("torchvision.models.segmentation.fcn").FCNHead(backbone.out_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of every pixel."""
        return F.interpolate(self.head(self.backbone(x)["0"]), size=x.shape[2:], mode="bilinear")


def build(settings: Settings) -> Segmenter:
    """The network, with fresh weights."""
    torch.manual_seed(settings.seed)
    return Segmenter(Pyramid(settings.backbone, **settings.arguments), len(CLASSES) + 1)


def tensors(batch: list[Scene]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), about centred at 0, and masks (B, H, W)."""
    return torch.stack([s.image for s in batch]) - 0.5, torch.stack([s.mask for s in batch])


def loss_of(model: nn.Module, batch: list[Scene]) -> Tensor:
    """Cross-entropy of the pixels."""
    images, masks = tensors(batch)
    return F.cross_entropy(model(images), masks)


@torch.no_grad()
def mean_iou(model: nn.Module, batch: list[Scene]) -> float:
    """Intersection over union of the pixels of all images, mean over the classes that are there, with the ground."""
    model.eval()
    images, masks = tensors(batch)
    found = model(images).argmax(1)
    shares = []
    for label in range(len(CLASSES) + 1):
        here, said = masks == label, found == label
        shares.append((here & said).sum() / (here | said).sum())
    return float(torch.stack(shares).nanmean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """The command line."""
    settings = settings_of("python -m nearfold.recipes.segmentation", __doc__, argv)
    return study(settings, build(settings), loss_of, mean_iou)


if __name__ == "__main__":
    main()
