"""Tasks on maps whose answer is in what stands beside each other: textures, and glyphs.

Shape legend: N images, S pixels a side, K pixels a side of a filter or glyph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.structures.structure import Structure, below, labels, noisy

SIDE = 8
CONTRAST = 0.2
"""Standard deviation of a texture around grey."""

GLYPHS = (
    ("####", "#...", "#...", "#..."),
    ("#...", "#...", "#...", "####"),
    ("#..#", "#..#", "#..#", "####"),
    ("####", ".#..", ".#..", ".#.."),
    ("#..#", "####", "#..#", "#..#"),
    ("##..", "#...", "##..", "#..."),
    ("#..#", ".##.", ".##.", "#..#"),
    ("####", "#..#", "#..#", "####"),
)
"""Eight shapes of 4 x 4 pixels. None is another one moved; some are when turned, and `rotated` leaves those out."""
TURNED = (0, 2, 3, 5, 6, 7)


def glyphs() -> Tensor:
    """The shapes, float32 (8, 4, 4)."""
    return torch.tensor([[[float(c == "#") for c in row] for row in glyph] for glyph in GLYPHS])


def cosines(size: int) -> Tensor:
    """The cosine basis of `size` values, (size, size), each of unit norm; the first is constant."""
    n = torch.arange(size, dtype=torch.float32)
    basis = torch.cos(math.pi / size * (n + 0.5) * n[:, None])
    return basis / basis.norm(dim=1, keepdim=True)


def filtered(filters_TKL: Tensor, chosen_N: Tensor, rng: torch.Generator) -> Tensor:
    """White noise, filtered by the chosen filter of each image: (N, 1, S, S), with noise."""
    k, w = filters_TKL.shape[1:]
    white = torch.randn(1, len(chosen_N), SIDE + k - 1, SIDE + w - 1, generator=rng)
    made = F.conv2d(white, filters_TKL[chosen_N][:, None], groups=len(chosen_N))[0]
    return noisy(0.5 + CONTRAST * made[:, None], rng)


def texture(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise filtered by one of eight filters of 3 x 3: the products of two cosines."""
    basis = cosines(3)
    filters = torch.einsum("ik,jl->ijkl", basis, basis).flatten(0, 1)[1:]
    drawn = labels(count, 8, rng)
    return filtered(filters, drawn, rng), drawn


def stripes(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise filtered along the rows by one of four cosines of 7 pixels; down the columns nothing hangs together."""
    drawn = labels(count, 4, rng)
    return filtered(cosines(7)[1:5, None], drawn, rng), drawn


def put(shapes_NKK: Tensor, rng: torch.Generator) -> Tensor:
    """Each shape at a random place of a map of its own, (N, 1, S, S), with noise."""
    count, k = shapes_NKK.shape[:2]
    top, left = (below(SIDE - k + 1, count, rng) for _ in range(2))
    maps = torch.zeros(count, SIDE, SIDE)
    rows = (top[:, None] + torch.arange(k))[:, :, None]
    columns = (left[:, None] + torch.arange(k))[:, None]
    maps[torch.arange(count)[:, None, None], rows, columns] = shapes_NKK
    return noisy(0.2 + 0.6 * maps[:, None], rng)


def translated(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of eight shapes of 4 x 4 pixels, anywhere."""
    drawn = labels(count, len(GLYPHS), rng)
    return put(glyphs()[drawn], rng), drawn


def scaled(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of four shapes, 4, 6 or 8 pixels large, anywhere it fits."""
    kinds = (0, 3, 4, 7)
    drawn = labels(count, len(kinds), rng)
    shapes = glyphs()[torch.tensor(kinds)][drawn][:, None]
    images = torch.zeros(count, 1, SIDE, SIDE)
    size_of = below(3, count, rng)
    for index, size in enumerate((4, 6, 8)):
        rows = (size_of == index).nonzero()[:, 0]
        images[rows] = put(F.interpolate(shapes[rows], size=(size, size), mode="nearest")[:, 0], rng)
    return images, drawn


def rotated(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of six shapes in the middle, turned by any angle."""
    drawn = labels(count, len(TURNED), rng)
    shapes = F.interpolate(glyphs()[torch.tensor(TURNED)][drawn][:, None], size=(6, 6), mode="bilinear")
    angle = 2 * math.pi * torch.rand(count, generator=rng)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1) * (SIDE / 6)
    grid = F.affine_grid(turn, [count, 1, SIDE, SIDE], align_corners=False)
    return noisy(0.2 + 0.6 * F.grid_sample(shapes, grid, align_corners=False), rng), drawn


def _named(count: int) -> tuple[str, ...]:
    return tuple(str(index) for index in range(count))


STRUCTURES = {
    "texture": Structure(
        "local texture", "window(3)", "box", "kernel",
        "correlates every neighbourhood with the eight filters, and takes the mean of the squares",
        "window(3) | box | kernel", _named(8), (1, SIDE, SIDE), texture,
    ),
    "stripes": Structure(
        "stripes along rows", "window of one row", "box, anisotropic", "kernel",
        "correlates seven pixels of a row with the four filters, and takes the mean of the squares",
        "window((1, 7)) | box | kernel", _named(4), (1, SIDE, SIDE), stripes,
    ),
    "scales": Structure(
        "shapes of three sizes", "windows of several sizes", "box", "kernel",
        "finds every shape at every size, and takes the largest response", "window(7) | box | kernel", _named(4),
        (1, SIDE, SIDE), scaled,
    ),
    "translated": Structure(
        "shapes anywhere", "window(4)", "box, the same everywhere", "kernel",
        "correlates every neighbourhood with the shapes, and takes the largest response",
        "window(5) | box | kernel", _named(8), (1, SIDE, SIDE), translated,
    ),
    "rotated": Structure(
        "shapes at any angle", "window(5), turned", "no direction is special", "kernel",
        "finds the angle, then the shape", "deformable(3) | box | kernel", _named(6), (1, SIDE, SIDE), rotated,
    ),
}  # fmt: skip
