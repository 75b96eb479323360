"""From an encoded image to the pixels that a network sees: what worker processes do to every image.

All draws of an image come from one generator that is seeded with the run's seed, the epoch and the image's row, so
that they are the same in whichever process and order the images are read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nearfold import _torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_AUGMENTATIONS = ("resized_crop", "resized_randaugment", "resized_erasing")
"""Names of the augmentations that need the whole image, and so data that are read from files."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue of ImageNet's training images, in 0..1."""

CROP_SHARE = 0.875
"""Of the shorter side: the centre that is evaluated."""

_ATTEMPTS = 10
_ERASING = 0.25  # share of the images
_Box = tuple[float, float, float, float]  # left, upper, right, lower


def evaluation_view(image: Image, size: int) -> Tensor:
    """Return the centre of an image, 87.5 % of its shorter side, at `size` pixels a side.

    Args:
        image: Any size, RGB.
        size: Height and width of the result.

    Returns:
        uint8 (3, size, size).

    Example:
        >>> from PIL import Image
        >>> evaluation_view(Image.new("RGB", (50, 37), (9, 8, 7)), 8)[:, 0, 0]
        tensor([9, 8, 7], dtype=torch.uint8)
    """
    return pixels(_resized(image, _centre(image, CROP_SHARE), size))


def training_view(image: Image, size: int, augment: str, draws: torch.Generator) -> Tensor:
    """Return a random view of an image at `size` pixels a side.

    Args:
        image: Any size, RGB.
        size: Height and width of the result.
        augment: ``"none"``: :func:`evaluation_view`. ``"resized_crop"``: a random 8 to 100 % of the area, 3:4 to 4:3
            wide, mirrored left to right every other time. ``"resized_randaugment"``: then torchvision's RandAugment,
            2 operations of magnitude 9. ``"resized_erasing"``: then, in one of four images, a rectangle of 2 to 33 %
            of the area takes ImageNet's mean colour.
        draws: Decides.

    Returns:
        uint8 (3, size, size).

    Raises:
        ImportError: RandAugment is asked for, and torchvision is not installed.

    Example:
        >>> from PIL import Image
        >>> image = Image.linear_gradient("L").convert("RGB")
        >>> views = [training_view(image, 8, "resized_crop", torch.Generator().manual_seed(s)) for s in (1, 2, 1)]
        >>> torch.equal(views[0], views[1]), torch.equal(views[0], views[2])
        (False, True)
    """
    if augment == "none":
        return evaluation_view(image, size)
    view = _resized(image, _random_box(image, draws), size)
    if torch.rand((), generator=draws) < 0.5:
        from PIL.Image import Transpose

        view = view.transpose(Transpose.FLIP_LEFT_RIGHT)
    if augment == "resized_crop":
        return pixels(view)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's global generator
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=draws)))
        made = pixels(_torchvision.transforms().RandAugment()(view))
    if augment == "resized_erasing":
        _erase(made, draws)
    return made


def _centre(image: Image, share: float) -> _Box:
    side = share * min(image.size)
    left, upper = (image.width - side) / 2, (image.height - side) / 2
    return left, upper, left + side, upper + side


def _random_box(image: Image, draws: torch.Generator) -> _Box:
    """Draw a box of 8 to 100 % of the image's area; where none of ten fits, the largest of the nearest shape."""
    for area, shape, across, down in torch.rand(_ATTEMPTS, 4, generator=draws).tolist():
        height, width = _rectangle(image.width * image.height * (0.08 + 0.92 * area), shape, 4 / 3)
        if 1 <= width <= image.width and 1 <= height <= image.height:
            left, upper = int(across * (image.width - width + 1)), int(down * (image.height - height + 1))
            return left, upper, left + width, upper + height
    width = min(image.width, round(image.height * 4 / 3))
    height = min(image.height, round(image.width * 4 / 3))
    left, upper = (image.width - width) // 2, (image.height - height) // 2
    return left, upper, left + width, upper + height


def _erase(pixels: Tensor, draws: torch.Generator) -> None:
    """Fill, in some images, a rectangle of 2 to 33 % of the area with the mean colour, in place."""
    size = pixels.shape[-1]
    wanted, *numbers = torch.rand(1 + 4 * _ATTEMPTS, generator=draws).tolist()
    if wanted >= _ERASING:
        return
    for area, shape, across, down in zip(*[iter(numbers)] * 4, strict=True):
        height, width = _rectangle(size * size * (0.02 + 0.31 * area), shape, 10 / 3)
        if height < size and width < size:
            upper, left = int(down * (size - height + 1)), int(across * (size - width + 1))
            mean = torch.tensor(IMAGENET_MEAN).mul(255).round().to(torch.uint8)
            pixels[:, upper : upper + height, left : left + width] = mean[:, None, None]
            return


def _rectangle(area: float, shape: float, widest: float) -> tuple[int, int]:
    """Return the height and width of a rectangle whose shape, from 0 to 1, goes from 1 : widest to widest : 1."""
    ratio = widest ** (2 * shape - 1)
    return round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))


def _resized(image: Image, box: _Box, size: int) -> Image:
    from PIL.Image import Resampling

    return image.resize((size, size), Resampling.BICUBIC, box)


def pixels(image: Image) -> Tensor:
    """Return an image of 8 bits a channel as uint8 (C, H, W)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, -1).movedim(-1, 0).contiguous()
