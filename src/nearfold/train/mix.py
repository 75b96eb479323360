"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): images of a batch, and their labels, mixed in pairs.

One draw decides a step: its kind, its share and its place hold for every image of the global batch. Image 2i and image
2i + 1 of a batch are a pair, each of which gets some of the other: the order of the images is random as it is, and
neighbours stay together however the batch is divided, as long as every part has an even number of images. So one
process, several, and several parts after each other mix the same, and send each other nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from nearfold.train.recipe import Recipe
from nearfold.train.seeds import derive


@dataclass(frozen=True)
class Mix:
    """What is done to the images of one step.

    Attributes:
        share: Of an image's own label, 0..1; its partner's has the rest.
        box: (top, bottom, left, right) of the rectangle that comes from the partner; None: whole images are added.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(recipe: Recipe, step: int, height: int, width: int) -> Mix | None:
    """Return what is done to the images of a step; it depends on the seed and the step only.

    Args:
        recipe: With both mixup and cutmix, either is done in about half of the steps.
        step: Steps done before this one, over all epochs.
        height: Of an image, in pixels.
        width: Likewise.

    Example:
        >>> draw_mix(Recipe(), 0, 32, 32) is None
        True
        >>> 0 <= draw_mix(Recipe(mixup=0.2), 0, 32, 32).share <= 1
        True
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(recipe, name)]
    if not kinds:
        return None
    draws = random.Random(derive(recipe.seed, "mix", step))
    kind = draws.choice(kinds)
    alpha = getattr(recipe, kind)
    share = draws.betavariate(alpha, alpha)
    if kind == "mixup":
        return Mix(share)
    side = (1 - share) ** 0.5
    middle_y, middle_x = draws.random() * height, draws.random() * width
    top, bottom = (min(max(round(middle_y + sign * side * height / 2), 0), height) for sign in (-1, 1))
    left, right = (min(max(round(middle_x + sign * side * width / 2), 0), width) for sign in (-1, 1))
    pasted = (bottom - top) * (right - left) / (height * width)  # the rectangle may reach over the edge
    return Mix(1 - pasted, (top, bottom, left, right))


def mixed(mix: Mix, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mix the images of every pair, and their labels.

    Args:
        mix: What to do.
        images: float (b, C, H, W), b even.
        labels: int64 (b,).
        classes: Number of classes.

    Returns:
        Images of the same shape, and targets (b, classes), whose rows add up to 1.

    Example:
        >>> import torch
        >>> images, labels = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), torch.tensor([0, 2])
        >>> images, targets = mixed(Mix(0.75), images, labels, 3)
        >>> images.flatten(), targets
        (tensor([0.2500, 0.7500]), tensor([[0.7500, 0.0000, 0.2500],
                [0.2500, 0.0000, 0.7500]]))
    """
    own = F.one_hot(labels, classes).to(images.dtype)
    targets = mix.share * own + (1 - mix.share) * _partners(own)
    others = _partners(images)
    if mix.box is None:
        return mix.share * images + (1 - mix.share) * others, targets
    top, bottom, left, right = mix.box
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return pasted, targets


def _partners(rows: Tensor) -> Tensor:
    """The other of every pair, (b, ...) for (b, ...)."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
