"""Where positions are: coordinates of a grid, and features made of them.

Shape legend: B batch, H heads, N positions, d features of one head, a grid axes, p features of a position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._kept import kept
from nearfold.grammar.word import check


@dataclass(frozen=True)
class Place:
    """The grid that queries and keys live on, as coordinates."""

    grid: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def index(self) -> Tensor:
        """Integer coordinates (N, a), raster order."""
        return _index(self.grid, self.device)

    def exact(self) -> Tensor:
        """Centred coordinates (N, a) in steps of one position: whole and half numbers, whose ties are exact."""
        return _exact(self.grid, self.device, self.dtype)

    @property
    def step(self) -> float:
        """How far neighbouring positions are apart where the longest axis runs from -1 to 1."""
        return 2 / max(max(self.grid) - 1, 1)

    def unit(self) -> Tensor:
        """Coordinates (N, a), each axis from -1 to 1, last axis first (x before y), as ConvNN and ACmix do."""
        return _from_minus_one_to_one(self.grid, self.device, self.dtype)


@kept
def _index(grid: tuple[int, ...], device: torch.device) -> Tensor:
    axes = [torch.arange(n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


@kept
def _exact(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    axes = [torch.arange(n, device=device, dtype=dtype) - (n - 1) / 2 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


@kept
def _from_minus_one_to_one(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():  # torch.linspace would make every size of the grid a graph of its own
        axes = [torch.arange(n, device=device, dtype=dtype) * (2 / max(n - 1, 1)) - 1 for n in grid]
    else:
        axes = [torch.linspace(-1, 1, n, device=device, dtype=dtype) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).reshape(-1, len(grid))


BANDS = 4  # frequencies of the positional encodings, per axis
LEARNED = 8  # features of the learned one


def _raw(place: Place, weight: Tensor | None) -> Tensor:
    return place.unit()


def _waves(angle_Na: Tensor, frequency_b: Tensor) -> Tensor:
    """Sines, then cosines, of every axis at every frequency: (N, 2 * bands * a)."""
    turns = (angle_Na[..., None] * frequency_b).flatten(1)
    return torch.cat([turns.sin(), turns.cos()], -1)


def _sinusoidal(place: Place, weight: Tensor | None) -> Tensor:
    frequency_b = 10000.0 ** (-torch.arange(BANDS, device=place.device, dtype=place.dtype) / BANDS)
    return _waves(place.index().to(place.dtype), frequency_b)


def _fourier(place: Place, weight: Tensor | None) -> Tensor:
    frequency_b = math.pi * 2.0 ** torch.arange(BANDS, device=place.device, dtype=place.dtype)
    return _waves(place.unit(), frequency_b)


def _learned(place: Place, weight: Tensor | None) -> Tensor:
    assert weight is not None
    return F.linear(_fourier(place, None).to(weight.dtype), weight)


ENCODINGS = {"raw": _raw, "sinusoidal": _sinusoidal, "fourier": _fourier, "learned": _learned}


def encoding_name(coordinates: bool | str) -> str:
    """Name of a positional encoding: the flag alone means the raw coordinates."""
    return "raw" if coordinates is True else str(coordinates)


def check_coordinates(word: Any) -> None:
    """ValueError unless the word's ``coordinates`` is a flag or names an encoding."""
    given = word.coordinates
    check(isinstance(given, bool) or given in ENCODINGS, word, "coordinates", given, f"one of {', '.join(ENCODINGS)}")
    if given == "raw":
        object.__setattr__(word, "coordinates", True)


def encode(coordinates: bool | str, place: Place, weight: Tensor | None) -> Tensor:
    """Every position of the grid as features (N, p).

    raw: each axis from -1 to 1 (a features). sinusoidal: sine and cosine of the index times 10000^(-j/4), j = 0..3
    (arXiv 1706.03762). fourier: of the raw coordinate times pi 2^j (arXiv 2006.10739), 8 a features each. learned: a
    learned pointwise map ``weight`` (8, 8 a) of the fourier features. All of them fit any grid.
    """
    return ENCODINGS[encoding_name(coordinates)](place, weight)


def encoded_features(coordinates: bool | str, ndim: int) -> int:
    """Number p of features that `encode` makes; 0 without coordinates."""
    if coordinates is False:
        return 0
    return {"raw": ndim, "learned": LEARNED}.get(encoding_name(coordinates), 2 * BANDS * ndim)


def angles(place: Place, pairs: int, rotary: bool | float) -> Tensor:
    """By how much each pair of features is turned at each position (N, a, pairs); see `rotated`."""
    axes = len(place.grid)
    base = float(rotary) if rotary is not True else 10000.0 if axes == 1 else 100.0
    frequency_p = base ** (-torch.arange(pairs, device=place.device, dtype=place.dtype) / pairs)
    return place.index().to(place.dtype)[..., None] * frequency_p


def rotated(x_BHNd: Tensor, place: Place, rotary: bool | float = True) -> Tensor:
    """Pairs of features turned by angles that grow with the position, the axes taking turns (arXiv 2104.09864).

    d / (2 a) pairs for each of the a axes, at frequencies base^(-j / pairs). The base is what ``rotary`` says; unless
    that is a number, 100 as in arXiv 2403.13298 for images, and 10000 on one axis, as in language models. Features
    (j, j + half) of an axis' share make a pair.
    """
    axes = len(place.grid)
    pairs = x_BHNd.shape[-1] // (2 * axes)
    angle_Nap = angles(place, pairs, rotary)
    cos, sin = angle_Nap.cos().to(x_BHNd.dtype), angle_Nap.sin().to(x_BHNd.dtype)
    first, second = x_BHNd.unflatten(-1, (axes, 2, pairs)).unbind(-2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -2).flatten(-3)
