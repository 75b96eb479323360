"""Real photographs, and noise: those that scikit-learn and scikit-image (`pip install scikit-image`) bring along.

Shape legend: B images, H, W pixels. Grey values from 0 to 1; the noise's sigma is in 8-bit grey values.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

TRAIN = ("flower", "coffee", "motorcycle", "rocket", "gravel", "page", "clock", "immunohistochemistry")
VALIDATION = ("astronaut", "grass", "text")
TEST = ("camera", "china", "chelsea", "coins", "brick")
"""Whole photographs: no pixel of a test photograph is in another part."""


def photograph(name: str) -> Tensor:
    """A photograph in grey, (1, 1, H, W)."""
    if name in ("china", "flower"):
        pixels = load_sample_images().images[("china", "flower").index(name)]
    else:
        try:
            import skimage.data
        except ImportError as error:
            raise ImportError("the photographs are scikit-image's: pip install scikit-image") from error
        pixels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
    grey = torch.from_numpy(np.array(pixels)).float() / 255
    if grey.dim() == 3:
        grey = grey[..., :3] @ torch.tensor([0.299, 0.587, 0.114])
    return grey[None, None]


def centre(image: Tensor, size: int = 256) -> Tensor:
    """The middle of an image, at most `size` pixels a side."""
    top, left = (max(0, (n - size) // 2) for n in image.shape[2:])
    return image[:, :, top : top + size, left : left + size]


def noisy(image: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """The image with Gaussian noise, not clipped."""
    return image + sigma / 255 * torch.randn(image.shape, generator=rng)


def crops(photographs: list[Tensor], count: int, size: int, rng: torch.Generator) -> Tensor:
    """Crops (count, 1, size, size) at random places, turned and mirrored at random."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=rng))

    made = []
    for _ in range(count):
        image = photographs[below(len(photographs))][0]
        top, left = (below(n - size + 1) for n in image.shape[1:])
        crop = torch.rot90(image[:, top : top + size, left : left + size], below(4), (1, 2))
        made.append(crop.flip(2) if below(2) else crop)
    return torch.stack(made)


def psnr(found: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of grey values clipped to 0 and 1."""
    return float(-10 * F.mse_loss(found.clamp(0, 1), truth).log10())


def scores(found: list[Tensor], photographs: list[Tensor]) -> list[float]:
    """PSNR of every photograph."""
    return [psnr(image, truth) for image, truth in zip(found, photographs, strict=True)]
