"""Tasks of pictures that come with the packages nearfold needs: characters of their fonts, photographs, and digits.

Shape legend: N images, S pixels a side.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.structures.structure import Structure, below, labels, noisy

SIDE = 16
LETTERS = "ABCDEFGHKLMNPRST"
SIZES = (9, 14)
"""Of a font, in pixels: from, and to but not with."""


@functools.cache
def _fonts() -> tuple[str, ...]:
    """The faces of Matplotlib that have letters."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    wanted = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
    faces = ("", "-Bold", "-Oblique", "-Italic", "Bol", "Italic")
    found = [path for name in wanted for face in faces if (path := folder / f"{name}{face}.ttf").is_file()]
    assert len(found) >= 8, found
    return tuple(map(str, found))


def characters(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A capital letter in one of Matplotlib's faces, somewhere near the middle, light on dark or dark on light."""
    from PIL import Image, ImageDraw

    drawn = labels(count, len(LETTERS), rng)
    faces, sizes = below(len(_fonts()), count, rng), SIZES[0] + below(SIZES[1] - SIZES[0], count, rng)
    moved = 3 * torch.rand(count, 2, generator=rng) - 1.5
    images = np.zeros((count, SIDE, SIDE), dtype=np.uint8)
    for row in range(count):
        picture = Image.new("L", (SIDE, SIDE))
        font = _font(_fonts()[int(faces[row])], int(sizes[row]))
        place = (SIDE / 2 + float(moved[row, 0]), SIDE / 2 + float(moved[row, 1]))
        ImageDraw.Draw(picture).text(place, LETTERS[int(drawn[row])], fill=255, font=font, anchor="mm")
        images[row] = np.asarray(picture)
    shown = torch.from_numpy(images).float()[:, None] / 255
    dark = below(2, count, rng).bool()[:, None, None, None]
    return noisy(torch.where(dark, 0.8 - 0.6 * shown, 0.2 + 0.6 * shown), rng), drawn


@functools.lru_cache(maxsize=256)
def _font(path: str, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(path, size)


@functools.cache
def _photographs() -> tuple[Tensor, ...]:
    """The two photographs of scikit-learn in grey, at half their size: (H, W) each."""
    from sklearn.datasets import load_sample_images

    grey = torch.tensor([0.299, 0.587, 0.114])
    images = [torch.from_numpy(np.array(image)).float() / 255 @ grey for image in load_sample_images().images]
    return tuple(F.avg_pool2d(image[None], 2)[0] for image in images)


def _turned(half: int, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares of 16 pixels from the left (0) or right (1) half of the photographs, turned by so many quarters."""
    drawn = labels(count, 4, rng)
    which, place = below(2, count, rng), torch.rand(count, 2, generator=rng)
    images = torch.empty(count, 1, SIDE, SIDE)
    for row in range(count):
        photograph = _photographs()[int(which[row])]
        part = photograph.chunk(2, dim=1)[half]
        top, left = (int(place[row, axis] * (part.shape[axis] - SIDE + 1)) for axis in range(2))
        images[row, 0] = part[top : top + SIDE, left : left + SIDE].rot90(int(drawn[row]))
    return noisy(images, rng), drawn


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits (1797, 1, 8, 8), 0..1, their pixels in an order that is the same for all; their labels."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()  # its type depends on an argument
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(raw.images).float().flatten(1)[:, order] / 16
    return images.unflatten(1, (1, 8, 8)), torch.from_numpy(raw.target).long()


def _permuted(held_out: bool, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every fifth digit, or the four others, in random order: at most as many as there are."""
    images, drawn = _digits()
    rows = ((torch.arange(len(drawn)) % 5 == 0) == held_out).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=rng)[:count]]
    return images[rows], drawn[rows]


STRUCTURES = {
    "permuted": Structure(
        "digits whose pixels changed places", "all, by position", "row", "table",
        "knows which pixels belong together, since nothing else says it", "all | row | table(64)",
        tuple("0123456789"), (1, 8, 8), functools.partial(_permuted, False),
        held_out=functools.partial(_permuted, True), real=True,
    ),
    "characters": Structure(
        "printed letters", "window(5)", "box, the same everywhere", "kernel",
        "finds strokes and how they meet, in any face", "window(5) | box | kernel", tuple(LETTERS),
        (1, SIDE, SIDE), characters,
        real=True,
    ),
    "photographs": Structure(
        "which way up is a photograph", "windows of several sizes", "box: up is not down", "kernel",
        "knows that light comes from above", "window(5) | box | kernel", ("0", "90", "180", "270"),
        (1, SIDE, SIDE),
        functools.partial(_turned, 0), held_out=functools.partial(_turned, 1), real=True,
    ),
}  # fmt: skip
