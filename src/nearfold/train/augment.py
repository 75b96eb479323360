"""Augmentation of a batch of training images, reproducible from one seed.

Letters in shapes: B images of the global batch, b of them here, C channels, H x W pixels.

Every function draws for the whole global batch and transforms only this process's share of it, so that
the images of all processes together are those that one process would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold import _torchvision
from nearfold.kernels.local import reflect
from nearfold.train.seeds import derive, generator


def unchanged(images: Tensor, seed: int, batch: int, share: slice) -> Tensor:
    """Return the images as they are."""
    return images


def crop_flip(images: Tensor, seed: int, batch: int, share: slice) -> Tensor:
    """Shift every image at random, and mirror every other one left to right.

    The shift is a crop, at a random place, of the image with a black border of an eighth of its size
    (4 pixels at 32 x 32). Mirroring is wrong where left and right matter: digits and letters.

    Args:
        images: uint8 (b, C, H, W), the process's share of the batch.
        seed: Decides every draw.
        batch: B, images in the global batch.
        share: Which of the B images these are.

    Returns:
        uint8 (b, C, H, W), on the device of `images`.

    Example:
        >>> images = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
        >>> crop_flip(images, seed=2, batch=1, share=slice(0, 1)).shape
        torch.Size([1, 1, 4, 4])
    """
    border = border_y, border_x = max(1, images.shape[2] // 8), max(1, images.shape[3] // 8)
    rows_bH, columns_bW = _drawn(images, seed, batch, share, border)
    padded = F.pad(images, (border_x, border_x, border_y, border_y))
    return _picked(padded, rows_bH + border_y, columns_bW + border_x)


def shift_flip(images: Tensor, seed: int, batch: int, share: slice) -> Tensor:
    """Shift every image by up to a sixteenth of its size, reflected at its border, and mirror every other one.

    2 pixels at 32 x 32: what short trainings want, where `crop_flip` takes more from an image than they can learn
    (docs/decisions/0043-trained-networks.md). Arguments and result as in :func:`crop_flip`.

    Example:
        >>> images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
        >>> shift_flip(images, seed=2, batch=1, share=slice(0, 1)).shape
        torch.Size([1, 1, 8, 8])
    """
    height, width = images.shape[2:]
    border = max(1, height // 16), max(1, width // 16)
    rows_bH, columns_bW = _drawn(images, seed, batch, share, border)
    return _picked(images, reflect(rows_bH, height), reflect(columns_bW, width))


def _drawn(images: Tensor, seed: int, batch: int, share: slice, border: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows (b, H) and columns (b, W) that shifted and mirrored images show; beyond the border, too."""
    height, width = images.shape[2:]
    draws = generator(seed)
    top, left = (torch.randint(-n, n + 1, (batch,), generator=draws)[share] for n in border)
    mirrored = torch.randint(2, (batch,), generator=draws)[share].bool()
    rows_bH = top[:, None] + torch.arange(height)
    columns_bW = left[:, None] + torch.arange(width)
    return rows_bH, torch.where(mirrored[:, None], columns_bW.flip(1), columns_bW)


def _picked(images: Tensor, rows_bH: Tensor, columns_bW: Tensor) -> Tensor:
    picked_bHWC = images.movedim(1, -1)[
        torch.arange(len(images), device=images.device)[:, None, None],
        rows_bH.to(images.device)[:, :, None],
        columns_bW.to(images.device)[:, None, :],
    ]
    return picked_bHWC.movedim(-1, 1).contiguous()


def randaugment(images: Tensor, seed: int, batch: int, share: slice) -> Tensor:
    """Apply :func:`crop_flip`, then torchvision's RandAugment (2 operations, magnitude 9) to each image.

    RandAugment works image by image on the CPU, wherever the images are: at 32 x 32 it costs about a
    millisecond an image, more than many small networks. Arguments and result as in :func:`crop_flip`.

    Raises:
        ImportError: torchvision is not installed.
    """
    transform = _torchvision.transforms().RandAugment()
    moved = crop_flip(images, seed, batch, share).cpu()
    results = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's global generator
        for position, image in zip(range(batch)[share], moved, strict=True):
            torch.default_generator.manual_seed(derive(seed, "randaugment", position))
            results.append(transform(image))
    return torch.stack(results).to(images.device)


Augmentation = Callable[[Tensor, int, int, slice], Tensor]
"""(images (b, C, H, W) uint8, seed, global batch B, share of it) -> images, same shape and type."""

AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {"none": unchanged, "crop_flip": crop_flip, "shift_flip": shift_flip, "randaugment": randaugment}
)
"""Every augmentation by the name a recipe gives it."""
