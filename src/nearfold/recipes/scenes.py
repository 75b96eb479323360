"""Generated images with boxes, classes and masks: rectangles, ellipses and diamonds on a textured ground.

Shape legend: B images, H, W pixels, n objects of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("rectangle", "ellipse", "diamond")
"""Label 1, 2 and 3; 0 is the ground. A class is a shape, and rather red, green or blue: little training then shows."""
INSIDE = {  # of the object's box, whose sides are at -1 and 1
    "rectangle": lambda x, y: torch.maximum(x.abs(), y.abs()) <= 1,
    "ellipse": lambda x, y: x * x + y * y <= 1,
    "diamond": lambda x, y: x.abs() + y.abs() <= 1,
}


@dataclass
class Scene:
    """An image and what is in it.

    Attributes:
        image: (3, H, W), from 0 to 1.
        boxes: (n, 4), corners x0, y0, x1, y1 in pixels, tight around the mask.
        labels: (n,), from 1.
        mask: (H, W), the label of every pixel, 0 for the ground.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    mask: Tensor

    @property
    def target(self) -> dict[str, Tensor]:
        """As torchvision's detectors want it."""
        return {"boxes": self.boxes, "labels": self.labels}


def scene(size: int, generator: torch.Generator, most: int = 3) -> Scene:
    """One image of `size` pixels a side with 1 to `most` objects, none before another.

    >>> made = scene(64, torch.Generator().manual_seed(0))
    >>> made.image.shape, made.boxes.shape[1], bool(made.labels.min() >= 1)
    (torch.Size([3, 64, 64]), 4, True)
    """

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    coarse = F.interpolate(between(0, 1, 1, 3, 6, 6), size=(size, size), mode="bicubic")[0]
    image = 0.25 + 0.5 * coarse + between(-0.1, 0.1, 3, size, size)
    mask = torch.zeros(size, size, dtype=torch.long)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    boxes, labels = [], []
    for _ in range(int(torch.randint(1, most + 1, (), generator=generator))):
        half_w, half_h = (size * between(0.1, 0.22, 2)).tolist()
        centre_x, centre_y = between(0.24 * size, 0.76 * size, 2).tolist()
        label = int(torch.randint(1, len(CLASSES) + 1, (), generator=generator))
        here = INSIDE[CLASSES[label - 1]]((x - centre_x) / half_w, (y - centre_y) / half_h)
        rows, columns = here.any(1).nonzero(), here.any(0).nonzero()
        box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).flatten()
        if mask[box[1] : box[3], box[0] : box[2]].any():
            continue  # another object is there
        colour = between(0, 0.5, 3, 1) + 0.5 * (torch.arange(3) == label - 1)[:, None]
        image[:, here] = colour + between(-0.1, 0.1, 3, int(here.sum()))
        mask[here] = label
        boxes.append(box.float())
        labels.append(label)
    return Scene(image.clamp(0, 1), torch.stack(boxes), torch.tensor(labels), mask)


def scenes(count: int, size: int, seed: int) -> list[Scene]:
    """`count` images, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [scene(size, generator) for _ in range(count)]
