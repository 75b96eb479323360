"""Spectra without complex numbers, for exporters: the transform of every axis is a product with cosines and sines.

O(n) products for a number where a fast transform takes O(log n); matrices, which every runtime multiplies.

Shape legend: B batch, C channels, O output channels, n positions of an axis, K frequencies of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nearfold.lower.call import Call
from nearfold.lower.meaning import meaning
from nearfold.lower.words.spectral import SpectralMeaning

Pair = tuple[Tensor, Tensor]
"""Real and imaginary part."""


def _waves(k: Tensor, n: int) -> Pair:
    """exp(2 pi i k s / n) of all positions s: (n, K)."""
    turn = ((torch.arange(n, device=k.device)[:, None] * k) % n).double() * (2 * math.pi) / n
    return turn.cos(), turn.sin()


def _along(axis: int, x: Tensor, matrix: Tensor) -> Tensor:
    """One axis of x times a matrix."""
    return (x.movedim(axis, -1) @ matrix).movedim(-1, axis)


def _turned(axis: int, x: Pair, wave: Pair, sign: int) -> Pair:
    """One axis of x times a wave, conjugated where the sign is -1."""
    (re, im), (c, s) = x, wave
    return (
        _along(axis, re, c) - sign * _along(axis, im, s),
        _along(axis, im, c) + sign * _along(axis, re, s),
    )


def convolve(call: Call, x: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, O, *grid): the call's spectral kernel, on a grid that closes around its border."""
    own = meaning(call.op.weight.kernel)
    assert isinstance(own, SpectralMeaning)
    frequencies = own.frequencies(call)
    waves = [tuple(w.to(x.dtype) for w in _waves(k, n)) for k, n in zip(frequencies, call.grid, strict=True)]
    *others, (cos, sin) = waves
    y: Pair = x @ cos, -(x @ sin)
    for axis, (c, s) in enumerate(others, 2):
        y = _turned(axis, y, (c, s), -1)
    h = own.spectrum(call).unbind(-1)
    if own.maps_channels:
        (a, b), (c, d) = y, h
        parts = [torch.einsum("bc...,oc...->bo...", one, two) for one in (a, b) for two in (c, d)]
        y = parts[0] - parts[3], parts[1] + parts[2]
    else:
        (a, b), (c, d) = y, (h[0][:, 0], h[1][:, 0])
        y = a * c - b * d, a * d + b * c
    for axis, (c, s) in enumerate(others, 2):
        y = _turned(axis, y, (c.T, s.T), 1)
    # a frequency of the last axis stands for its negative, too, where that is another one
    n, k = call.grid[-1], frequencies[-1]
    twice = torch.where((2 * k) % n == 0, 1, 2).to(x.dtype)
    back: Tensor = y[0] @ (cos * twice).T - y[1] @ (sin * twice).T
    for count in call.grid:
        back = back / count
    return back
