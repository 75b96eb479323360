"""Detection: a registered backbone under torchvision's FCOS, trained on generated images with real boxes.

`python -m nearfold.recipes.detection` trains for a minute and prints the loss, and the mean IoU of the found boxes on
images that were not trained on, before and after. The detector is FCOS (arXiv 1904.01355) on a feature pyramid. Boxes
are decoded here, in plain PyTorch: torchvision's compiled suppression does not load beside every torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nearfold._torchvision import load
from nearfold.recipes.backbone import Pyramid, Settings, settings_of, study
from nearfold.recipes.scenes import CLASSES, Scene


def build(settings: Settings) -> nn.Module:
    """The detector, with fresh weights."""
    torch.manual_seed(settings.seed)
    detection = load("torchvision.models.detection")
    anchors = load("torchvision.models.detection.anchor_utils").AnchorGenerator
    head = load("torchvision.models.detection.fcos").FCOSHead
    backbone = Pyramid(settings.backbone, **settings.arguments)
    classes = len(CLASSES) + 1
    model: nn.Module = detection.FCOS(
        backbone,
        classes,
        min_size=settings.size,
        max_size=settings.size,
        anchor_generator=anchors(tuple((r,) for r in backbone.reductions), ((1.0,),) * len(backbone.reductions)),
        head=head(backbone.out_channels, 1, classes, num_convs=1),
    )
    return model


def loss_of(model: nn.Module, batch: list[Scene]) -> Tensor:
    """Sum of FCOS' three losses: class, box, centre."""
    found = model([s.image for s in batch], [s.target for s in batch])
    return torch.stack(list(found.values())).sum()


@torch.no_grad()
def detect(model: Any, image: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) and labels (n,) of at most `most` objects in an image (3, H, W), the surest first."""
    images, _ = model.transform([image])
    maps = list(model.backbone(images.tensors).values())
    out = model.head(maps)
    anchors = model.anchor_generator(images, maps)[0]
    boxes = model.box_coder.decode(out["bbox_regression"][0], anchors)
    scores = (out["cls_logits"][0].sigmoid() * out["bbox_ctrness"][0].sigmoid()).sqrt()
    score, label = scores[:, 1:].max(1)
    kept = suppress(boxes, score)[:most]
    return boxes[kept], label[kept] + 1


def suppress(boxes: Tensor, scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Indices of the best boxes, best first, without those that overlap a better one by more than `threshold`.

    >>> suppress(torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [6, 6, 9, 9]]), torch.tensor([0.7, 0.9, 0.3])).tolist()
    [1, 2]
    """
    order, kept = scores.argsort(descending=True), []
    overlap = load("torchvision.ops").box_iou(boxes, boxes)
    while len(order):
        kept.append(order[0])
        order = order[1:][overlap[order[0], order[1:]] <= threshold]
    return torch.stack(kept)


def mean_iou(model: nn.Module, batch: list[Scene]) -> float:
    """Mean over all objects of the IoU of the best box of the right class, among as many boxes as there are objects."""
    model.eval()
    best = []
    for s in batch:
        boxes, labels = detect(model, s.image, len(s.labels))
        overlap = load("torchvision.ops").box_iou(s.boxes, boxes)
        best.append(overlap.where(s.labels[:, None] == labels, 0).amax(1))
    return float(torch.cat(best).mean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """The command line."""
    settings = settings_of("python -m nearfold.recipes.detection", __doc__, argv)
    return study(settings, build(settings), loss_of, mean_iou)


if __name__ == "__main__":
    main()
