"""Kernels by their spectrum, on a grid that closes around its border.

Of a real map half the spectrum is enough: along the last axis the negative frequencies are the mirrored ones.

Shape legend: C channels, O output channels, K frequencies of an axis, n positions of an axis, a axes.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import GlobalFilter, Spectral
from nearfold.lower.call import Call, count_positions
from nearfold.lower.geometry import surely
from nearfold.lower.meaning import Sizes, means
from nearfold.lower.parameters import Parameter
from nearfold.lower.weighting import wide_dtype
from nearfold.lower.words.long import LongMeaning


class SpectralMeaning(LongMeaning):
    """`response` says the spectrum, and `numbers` adds its waves up."""

    def frequencies(self, call: Call) -> list[Tensor]:
        """The frequencies (K,) of every axis that the spectrum has numbers for."""
        raise NotImplementedError

    def spectrum(self, call: Call) -> Tensor:
        """The spectrum (O, C / groups, *K, 2), real and imaginary parts."""
        raise NotImplementedError

    def response(self, call: Call) -> Tensor:
        """The spectrum (O, C / groups, *K), complex."""
        return torch.view_as_complex(self.spectrum(call).contiguous())

    def numbers(self, call: Call) -> Tensor:
        made = self.response(call)
        for waves_nK in waves(self.frequencies(call), call.grid, made.dtype):
            made = torch.tensordot(made, waves_nK, dims=([2], [1]))  # the axis made joins the end
        return made.real / count_positions(call.grid)


def waves(frequencies: list[Tensor], grid: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """exp(2 pi i k s / n) of every axis (n, K).

    The last axis counts those frequencies twice whose negative is another one.
    """
    found = []
    for axis, (k, n) in enumerate(zip(frequencies, grid, strict=True)):
        turn = (torch.arange(n, device=k.device)[:, None] * k) % n
        wave = torch.polar(torch.ones_like(turn, dtype=torch.float64), turn.double() * (2 * math.pi / n))
        if axis == len(grid) - 1:
            wave = wave * torch.where((2 * k) % n == 0, 1, 2)
        found.append(wave.to(dtype))
    return found


@means(Spectral)
class LowestMeaning(SpectralMeaning):
    """Weights (O, C, *modes, 2) of the lowest frequencies, first the ones from 0 up, then the negative ones."""

    maps_channels = True

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        *others, last = as_tuple(cast(Spectral, op.weight.kernel).modes, sizes.ndim, "modes")
        kept = (*(2 * m for m in others), last, 2)
        return {"weight": Parameter((sizes.out_channels, sizes.inner, *kept), "uniform", sizes.inner)}

    def parts(self, kernel: Spectral, out: int) -> int:
        return 1

    def _kept(self, call: Call) -> list[tuple[int, int]]:
        """How many frequencies from 0 up, and how many below 0, an axis has and has weights for."""
        modes = as_tuple(cast(Spectral, call.op.weight.kernel).modes, call.ndim, "modes")
        both = [(min(m, (n + 1) // 2), min(m, n // 2)) for m, n in zip(modes, call.grid, strict=True)]
        return [*both[:-1], (min(modes[-1], call.grid[-1] // 2 + 1), 0)]

    def frequencies(self, call: Call) -> list[Tensor]:
        lines = ((torch.arange(up), torch.arange(-down, 0)) for up, down in self._kept(call))
        return [torch.cat(line).to(call.value.device) for line in lines]

    def spectrum(self, call: Call) -> Tensor:
        weight = call.params["weight"].to(wide_dtype(call))
        for axis, (up, down) in enumerate(self._kept(call), 2):
            count = weight.shape[axis]
            if up + down < count:
                weight = torch.cat([weight.narrow(axis, 0, up), weight.narrow(axis, count - down, down)], axis)
        return weight


@means(GlobalFilter)
class GlobalFilterMeaning(SpectralMeaning):
    """A spectrum (C, *half, 2) of all frequencies of a map of ``size``."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        *others, last = as_tuple(cast(GlobalFilter, op.weight.kernel).size, sizes.ndim, "size")
        return {"weight": Parameter((sizes.inner, *others, last // 2 + 1, 2), "normal:0.02")}

    def frequencies(self, call: Call) -> list[Tensor]:
        counts = (*call.grid[:-1], call.grid[-1] // 2 + 1)
        return [torch.arange(n, device=call.value.device) for n in counts]

    def spectrum(self, call: Call) -> Tensor:
        weight = call.params["weight"].to(wide_dtype(call))
        size = as_tuple(cast(GlobalFilter, call.op.weight.kernel).size, call.ndim, "size")
        if not all(surely(n == m) for n, m in zip(size, call.grid, strict=True)):
            for axis, n in enumerate((*call.grid[:-1], call.grid[-1] // 2 + 1), 1):
                weight = _resized(weight, axis, n)
        return weight[:, None]


def _resized(x: Tensor, axis: int, n: int) -> Tensor:
    """One axis at n points instead, the ends kept: cubic interpolation (bicubic is one axis after the other)."""
    lines = x.movedim(axis, -1)
    made = F.interpolate(
        lines.reshape(1, 1, -1, x.shape[axis]), (lines[..., 0].numel(), n), mode="bicubic", align_corners=True
    )
    return made.view(*lines.shape[:-1], n).movedim(-1, axis)
