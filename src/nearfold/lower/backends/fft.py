"""`fft`: a kernel as long as the map is a product of spectra; nothing of size N x N.

Kernels that end at the border are `nearfold::long_conv`. A kernel of few frequencies needs only these: they are matrix
products. All of it is PyTorch, on every device.

Shape legend: B batch, C channels, O output channels, H heads, n positions of an axis, K frequencies of it,
e embedded features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nearfold.grammar.words import Identity, Long, Spectral
from nearfold.kernels.long_conv import long_conv
from nearfold.kernels.names import DOT_LIKE
from nearfold.lower import dft
from nearfold.lower.call import Call, count_positions, refuse_derivatives
from nearfold.lower.kernel import finish
from nearfold.lower.meaning import meaning
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import wide_dtype
from nearfold.lower.words.long import LongMeaning, full_precision
from nearfold.lower.words.spectral import SpectralMeaning, waves

NAME = "fft"
Convolve = Callable[[Tensor], Tensor]
"""(B, C, *grid) -> (B, O, *grid), for one call's kernel."""


def supports(facts: Facts) -> Verdict:
    """Kernels as long as the map, alone or between gates."""
    kernel, rho = facts.op.weight.kernel, facts.op.weight.rho
    if not isinstance(kernel, Long):
        return Verdict.no("no kernel is as long as the map")
    if isinstance(rho, Identity):
        if facts.op.path.similarity.reduced not in DOT_LIKE:
            return Verdict.no(f"similarity {facts.op.path.similarity} is not a dot product")
        return Verdict.yes("query * (kernel * (key value)) is a product of spectra for every feature", "roundoff")
    if isinstance(kernel, Spectral):
        return Verdict.yes("few frequencies are matrix products", "roundoff")
    return Verdict.yes("convolution is a product of spectra", "roundoff")


def _padded(call: Call) -> Convolve:
    """A kernel that ends at the border."""
    refuse_derivatives(call)
    own = meaning(call.op.weight.kernel)
    assert isinstance(own, LongMeaning)
    kernel = own.numbers(call)
    groups = own.parts(call.op.weight.kernel, kernel.shape[0])
    lines = (count_positions(call.grid),) if call.op.shape.causal else call.grid

    def convolve(x: Tensor) -> Tensor:
        return long_conv(x.flatten(2).unflatten(2, lines), kernel, groups).flatten(2).unflatten(2, call.grid)

    return convolve


def _closed(call: Call) -> Convolve:
    """A spectrum of all frequencies on a grid that closes around its border."""
    own, axes = meaning(call.op.weight.kernel), list(range(2, 2 + call.ndim))
    assert isinstance(own, SpectralMeaning)
    spectrum = own.response(call)[:, 0]

    def convolve(x: Tensor) -> Tensor:
        return torch.fft.irfftn(torch.fft.rfftn(x, call.grid, axes) * spectrum, call.grid, axes)

    return convolve


def _lowest(call: Call) -> Convolve:
    """Few frequencies of a grid that closes around its border."""
    own = meaning(call.op.weight.kernel)
    assert isinstance(own, SpectralMeaning)
    spectrum = own.response(call)
    every = waves(own.frequencies(call), call.grid, spectrum.dtype)

    def convolve(x: Tensor) -> Tensor:
        # the last axis first, while the map is real: how often a frequency counts is then said by the way back alone
        last = torch.view_as_real(every[-1].conj().resolve_conj() / _counted(every[-1]))
        y = torch.view_as_complex((x @ last.flatten(1)).unflatten(-1, (-1, 2)))
        for axis, wave_nK in enumerate(every[:-1], 2):
            y = torch.tensordot(y, wave_nK.conj(), dims=([axis], [0])).movedim(-1, axis)
        y = torch.einsum("bc...,oc...->bo...", y, spectrum)
        for axis, wave_nK in enumerate(every[:-1], 2):
            y = torch.tensordot(y, wave_nK, dims=([axis], [1])).movedim(-1, axis)
        back = torch.view_as_real(every[-1].mT.conj().resolve_conj().contiguous()).movedim(-1, 1).flatten(0, 1)
        return torch.view_as_real(y).flatten(-2) @ back / math.prod(call.grid)

    return convolve


def _paired(call: Call) -> Convolve:
    """A kernel on a grid that closes around its border, in real numbers."""
    return functools.partial(dft.convolve, call)


def _counted(wave_nK: Tensor) -> Tensor:
    """How often each frequency counts (K,): the size of its wave."""
    return wave_nK[:1].abs()


def run(call: Call) -> Tensor:
    """(B, O, *grid)."""
    if not call.value.shape[0]:  # no transform takes an empty batch
        made = meaning(call.op.weight.kernel).made(call)
        return finish(call, call.value.new_zeros(0, made, *call.grid) + call.value.sum())
    with full_precision(call.value):
        kernel = call.op.weight.kernel
        assert isinstance(kernel, Long)
        closed = _paired if torch.compiler.is_exporting() else _lowest if isinstance(kernel, Spectral) else _closed
        make = closed if kernel.circular else _padded
        convolve, value = make(call), call.value.to(wide_dtype(call))
        y = _gated(call, convolve, value) if isinstance(call.op.weight.rho, Identity) else convolve(value)
    return finish(call, y.to(call.value.dtype))


def _gated(call: Call, convolve: Convolve, value: Tensor) -> Tensor:
    """Sum over features e of query_e * convolve(key_e * value), a head's features for all its channels."""
    heads = value.unflatten(1, (call.heads, -1))
    total: Tensor | None = None
    query, key = (t.mT.unflatten(3, call.grid) for t in call.embedded())  # (B, H, e, *grid)
    for q, k in zip(query.unbind(2), key.unbind(2), strict=True):
        made = convolve((heads * k.unsqueeze(2)).flatten(1, 2)).unflatten(1, (call.heads, -1)) * q.unsqueeze(2)
        total = made if total is None else total + made
    assert total is not None
    return total.flatten(1, 2)
