"""The images that a network is examined on: from a folder, a data set, or the two photographs that come along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold._images import SUFFIXES
from nearfold.look.picture import load_image
from nearfold.train.data import load_data

SAMPLES = ("china", "flower")
USUAL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's images, which a network expects that says nothing else."""


def images_of(source: str | None, count: int, size: tuple[int, int, int]) -> Tensor:
    """So many images (count, C, H, W) from 0 to 1, cropped to the shape of H x W and resized.

    Args:
        source: a folder with image files, anywhere below it, of which evenly spaced ones are taken by name; a data set
            that `nearfold.train.load_data` takes (its test images); None: crops of two photographs of scikit-learn.
        count: how many; fewer where there are fewer.
        size: channels, height and width.

    Raises:
        ValueError: there are none, or they have other channels.

    >>> images_of(None, 4, (3, 32, 32)).shape
    torch.Size([4, 3, 32, 32])
    """
    channels, *grid = size
    if source is None:
        pixels = _crops(count)
    elif files := _files(source):
        step = max(1, len(files) // count)
        pixels = [load_image(path) for path in files[::step][:count]]
    else:
        found = load_data(source, limit=max(count, 50), test_limit=max(count, 50)).test.images[:count]
        pixels = list(found.float() / 255 if not found.is_floating_point() else found)
    if pixels[0].shape[0] != channels and channels != 1:
        has = f"--data {source} has images" if source else "the two photographs are images"
        raise ValueError(
            f"{has} of {pixels[0].shape[0]} channels, and the model takes {channels}: name others by --data, or call "
            "nearfold.xray(model, images)"
        )
    if len(pixels) < 2:
        raise ValueError(f"--data {source} has {len(pixels)} image: two at least are compared")
    if pixels[0].shape[0] != channels:
        pixels = [one.mean(0, keepdim=True) for one in pixels]
    return torch.stack([_fitted(one, (grid[0], grid[1])) for one in pixels])


def _files(source: str) -> list[Path]:
    """Image files below a folder, where it is none of a data set with splits."""
    folder = Path(source)
    if not folder.is_dir() or any((folder / split).exists() for split in ("train", "test")):
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _crops(count: int) -> list[Tensor]:
    """Squares of the two photographs, in turn, each 240 pixels a side, in a grid over it."""
    found = []
    for i in range(count):
        photograph = load_image(f"sample:{SAMPLES[i % 2]}.jpg")
        places = [(y, x) for y in (0, 90, 187) for x in (0, 133, 266, 400)]
        y, x = places[(i // 2 * 5) % len(places)]
        found.append(photograph[:, y : y + 240, x : x + 240])
    return found


def _fitted(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The middle of an image in the shape of the grid, resized to it."""
    height, width = pixels.shape[1:]
    scale = min(height / grid[0], width / grid[1])
    h, w = max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))
    top, left = (height - h) // 2, (width - w) // 2
    part = pixels[None, :, top : top + h, left : left + w]
    return F.interpolate(part, grid, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def normalised(model: nn.Module, pixels: Tensor) -> tuple[Tensor, str]:
    """Images from 0 to 1 as a model expects them, and what is assumed of it where it does not say so itself.

    >>> normalised(nn.Identity(), torch.zeros(1, 3, 2, 2))[0][0, :, 0, 0].tolist()
    [-2.1179..., -2.0357..., -1.8044...]
    """
    stated = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    mean, std = (_channels(stated.get(key), pixels.shape[1]) for key in ("mean", "std"))
    note = ""
    if mean is None or std is None:
        mean, std = (_channels(usual, pixels.shape[1]) for usual in USUAL)
        note = "the model does not say how its images are normalised: as ImageNet's"
    if mean is None or std is None:
        return pixels, "the model does not say how its images are normalised: they are not"
    return (pixels - mean) / std, note


def _channels(values: Sequence[float] | None, channels: int) -> Tensor | None:
    if values is None or len(values) != channels:
        return None
    return torch.tensor(list(values))[:, None, None]
