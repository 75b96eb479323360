"""`nearfold::long_conv`: convolution with a kernel as long as the map, by spectra.

A spectrum of all channels is three times the map, and made of fresh memory, which costs more than the transforms
themselves: channels are taken a few at a time, and the backward makes the spectra anew. PyTorch's own transforms, on
every device.

Shape legend: B batch, C channels, O output channels, G groups, n positions of an axis, s slots of it, L its length with
zeros, K frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nearfold._kept import once
from nearfold.kernels import second
from nearfold.kernels.names import require_tensors
from nearfold.kernels.operator import operator

CHUNK = {"cpu": 1 << 24, "other": 1 << 28}
"""Bytes of a spectrum that is held at once: memory that the allocator keeps and a cache holds, in so few parts that
threads seldom wait for each other; on a GPU what keeps it busy."""


@once
def fast_length(least: int) -> int:
    """The first even length from ``least`` on without a prime above 7.

    >>> fast_length(111), fast_length(1), fast_length(1022)
    (112, 2, 1024)
    """
    n = least + least % 2
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


class _Transform:
    """Spectra of maps (.., *n) and of kernels (.., *s), with as many zeros as keep both ends of an axis apart.

    In a spectrum of a kernel the offset 0 comes first, and outputs begin where inputs do.
    """

    def __init__(self, grid: Sequence[int], slots: Sequence[int], length: Sequence[int]) -> None:
        self.grid, self.slots, self.length = list(grid), list(slots), list(length)
        self.axes = list(range(-len(self.grid), 0))
        self.first = [s - n for s, n in zip(slots, grid, strict=True)]

    def map(self, x: Tensor) -> Tensor:
        """(.., *n) -> (.., *K)."""
        spectrum = torch.fft.rfft(x, self.length[-1])
        for axis, n in zip(self.axes[:-1], self.length[:-1], strict=True):
            spectrum = torch.fft.fft(spectrum, n, axis)
        return spectrum

    def kernel(self, w: Tensor) -> Tensor:
        """(.., *s) -> (.., *K)."""
        room = [n for s, L in list(zip(self.slots, self.length, strict=True))[::-1] for n in (0, L - s)]
        rolled = torch.nn.functional.pad(w, room).roll([-f for f in self.first], self.axes)
        return torch.fft.rfftn(rolled, dim=self.axes)

    def back(self, spectrum: Tensor) -> Tensor:
        """(.., *K) -> (.., *n)."""
        for axis, n in zip(self.axes[:-1], self.grid[:-1], strict=True):
            spectrum = torch.fft.ifft(spectrum, dim=axis).narrow(axis, 0, n)
        return torch.fft.irfft(spectrum, self.length[-1])[..., : self.grid[-1]]

    def back_to_kernel(self, spectrum: Tensor) -> Tensor:
        """(.., *K) -> (.., *s)."""
        w = torch.fft.irfftn(spectrum, self.length, self.axes).roll(self.first, self.axes)
        return w[(..., *(slice(s) for s in self.slots))]

    @property
    def bytes(self) -> int:
        """Of one map's spectrum in complex64."""
        return math.prod(self.length[:-1]) * (self.length[-1] // 2 + 1) * 8


def _transform(value: Tensor, kernel: Tensor) -> _Transform:
    grid, slots = value.shape[2:], kernel.shape[2:]
    return _Transform(grid, slots, [fast_length(2 * n - 1) for n in grid])


def _require(value: Tensor, kernel: Tensor, groups: int) -> None:
    """ValueError where the operands do not fit one another."""
    require_tensors(value=value, kernel=kernel)
    same = value.dtype == kernel.dtype and value.dtype in (torch.float32, torch.float64)
    if value.dim() < 3 or kernel.dim() != value.dim() or not same:
        raise ValueError(
            "value must be (B, C, *grid) and kernel (O, C / groups, *slots), both float32 or float64, got "
            f"{tuple(value.shape)} {value.dtype} and {tuple(kernel.shape)} {kernel.dtype}"
        )
    channels, made = value.shape[1], kernel.shape[0]
    if groups < 1 or made % groups or kernel.shape[1] * groups != channels:
        raise ValueError(
            f"groups={groups} must divide O={made} and C={channels}, and kernel have C / groups channels, got "
            f"{tuple(kernel.shape)}"
        )
    if any(not n <= s < 2 * n for n, s in zip(value.shape[2:], kernel.shape[2:], strict=True)):
        raise ValueError(
            f"an axis of n positions takes a kernel of n to 2 n - 1 slots, got {tuple(kernel.shape[2:])} on "
            f"{tuple(value.shape[2:])}"
        )


def _chunks(count: int, each: int, like: Tensor) -> Iterator[slice]:
    """Parts of so many channels, of ``each`` bytes, that fit."""
    step = max(1, CHUNK["cpu" if like.is_cpu else "other"] // (each * like.element_size() // 4))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _alone(kernel: Tensor, groups: int) -> bool:
    """Whether every channel is convolved with a kernel of its own."""
    return kernel.shape[1] == 1 and kernel.shape[0] == groups


@operator("nearfold::long_conv")
def long_conv(value: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """y_i = sum over j of kernel[i - j] value_j, positions beyond the border reading nothing: (B, O, *grid).

    Args:
        value: (B, C, *grid), float32 or float64.
        kernel: (O, C / groups, *slots). On an axis of n positions with s slots, from n to 2 n - 1, slot p is for the
            offset i - j = p - (s - n): of n slots all are from 0 up, 2 n - 1 are all that there are.
        groups: of channels, as a convolution has them.
    """
    _require(value, kernel, groups)
    y = value.new_empty(value.shape[0], kernel.shape[0], *value.shape[2:])
    if not y.numel():
        return y
    way = _transform(value, kernel)
    if _alone(kernel, groups):
        for part in _chunks(len(kernel), len(value) * way.bytes, value):
            y[:, part] = way.back(way.map(value[:, part]).mul_(way.kernel(kernel[part, 0])))
        return y
    for _, ins, outs in _groups(value, kernel, groups):
        spectrum_BC = way.map(value[:, ins])
        for part in _chunks(outs.stop - outs.start, kernel.shape[1] * way.bytes, value):
            made = slice(outs.start + part.start, outs.start + part.stop)
            y[:, made] = way.back(torch.einsum("bc...,oc...->bo...", spectrum_BC, way.kernel(kernel[made])))
    return y


def _groups(value: Tensor, kernel: Tensor, groups: int) -> Iterator[tuple[int, slice, slice]]:
    """The channels that a group reads, and those that it makes."""
    read, made = kernel.shape[1], len(kernel) // groups
    for g in range(groups):
        yield g, slice(g * read, (g + 1) * read), slice(g * made, (g + 1) * made)


@long_conv.register_fake
def _(value: Tensor, kernel: Tensor, groups: int) -> Tensor:
    return value.new_empty(value.shape[0], kernel.shape[0], *value.shape[2:])


@operator("nearfold::long_conv_backward")
def long_conv_backward(grad: Tensor, value: Tensor, kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients at value and kernel."""
    _require(value, kernel, groups)
    require_tensors(grad=grad)
    wanted = (value.shape[0], kernel.shape[0], *value.shape[2:])
    if grad.shape != wanted or grad.dtype != value.dtype:
        raise ValueError(f"grad must be {wanted} {value.dtype}, got {tuple(grad.shape)} {grad.dtype}")
    d_value, d_kernel = value.new_empty(value.shape), kernel.new_empty(kernel.shape)
    if not grad.numel():
        return d_value, d_kernel.zero_()
    way = _transform(value, kernel)
    if _alone(kernel, groups):
        for part in _chunks(len(kernel), len(value) * way.bytes, value):
            spectrum = way.map(grad[:, part])
            d_value[:, part] = way.back(spectrum * way.kernel(kernel[part, 0]).conj())
            d_kernel[part, 0] = way.back_to_kernel(spectrum.mul_(way.map(value[:, part]).conj()).sum(0))
        return d_value, d_kernel
    for _, ins, outs in _groups(value, kernel, groups):
        spectrum_BC, total_BC = way.map(value[:, ins]).conj(), None
        for part in _chunks(outs.stop - outs.start, kernel.shape[1] * way.bytes, value):
            made = slice(outs.start + part.start, outs.start + part.stop)
            upstream_BO = way.map(grad[:, made])
            back_BC = torch.einsum("bo...,oc...->bc...", upstream_BO, way.kernel(kernel[made]).conj())
            total_BC = back_BC if total_BC is None else total_BC + back_BC
            d_kernel[made] = way.back_to_kernel(torch.einsum("bo...,bc...->oc...", upstream_BO, spectrum_BC))
        assert total_BC is not None
        d_value[:, ins] = way.back(total_BC)
    return d_value, d_kernel


@long_conv_backward.register_fake
def _(grad: Tensor, value: Tensor, kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), kernel.new_empty(kernel.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    value, kernel = ctx.saved_tensors
    return *long_conv_backward(grad, value, kernel, ctx.groups), None


def _formula(value: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """The same at once, by differentiable operators."""
    way = _transform(value, kernel)
    x, w = way.map(value).unflatten(1, (groups, -1)), way.kernel(kernel).unflatten(0, (groups, -1))
    return way.back(torch.einsum("bgc...,goc...->bgo...", x, w).flatten(1, 2))


long_conv.register_autograd(_backward, setup_context=_setup)
second.register(long_conv_backward, lambda *operands: second.gradients(_formula)(*operands)[:2])


def _transform_flops(length: Sequence[int]) -> int:
    """Of one real transform: 5 / 2 L log2 L."""
    count = math.prod(length)
    return int(2.5 * count * math.log2(count))


@register_flop_formula(torch.ops.nearfold.long_conv)
def _flops(value_shape, kernel_shape, groups, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    (B, C, *grid), (O, c) = value_shape, kernel_shape[:2]
    length = [fast_length(2 * n - 1) for n in grid]
    return (B * C + B * O + O * c) * _transform_flops(length) + 4 * B * O * c * math.prod(length)


@register_flop_formula(torch.ops.nearfold.long_conv_backward)
def _backward_flops(grad_shape, value_shape, kernel_shape, groups, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    (B, C, *grid), (O, c) = value_shape, kernel_shape[:2]
    length = [fast_length(2 * n - 1) for n in grid]
    return (2 * B * C + B * O + 2 * O * c) * _transform_flops(length) + 8 * B * O * c * math.prod(length)


def _real(shape: Sequence[int], axes: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    """Of torch's own real transforms, there and back: their longer side is the real one."""
    whole = max(shape, out_shape, key=math.prod)
    return math.prod(whole) // math.prod(whole[a] for a in axes) * _transform_flops([whole[a] for a in axes])


TRANSFORMS: dict[Any, Callable[..., int]] = {torch.ops.aten._fft_r2c: _real, torch.ops.aten._fft_c2r: _real}
"""What torch's counter of FLOPs does not know, for its ``custom_mapping``."""
