"""Kernels as long as the map, each as a number for every offset.

All of them are made in float32 at least, under autocast too: a frequency times a long distance needs its digits.

Shape legend: C channels, O output channels, G groups, S slots, N positions, a grid axes, n pairs of a state, w width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import S4D, Continuous, ContinuousDepthwise, Hyena
from nearfold.lower.call import Call
from nearfold.lower.meaning import KernelMeaning, Sizes, means
from nearfold.lower.offsets import offsets
from nearfold.lower.parameters import Parameter, linear, require_divides
from nearfold.lower.weighting import wide_dtype

SPAN = 64  # powers that are taken one by one; those of their last follow as a product
FAST, SLOW, FALL = 0.3, 1.5, 1e-2  # of Hyena's decays, as in the public code


@contextlib.contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Without autocast."""
    if like.is_meta or not torch.is_autocast_enabled(like.device.type):
        yield
        return
    with torch.autocast(like.device.type, enabled=False):
        yield


class LongMeaning(KernelMeaning):
    """A kernel that is made for every offset: `numbers` says how."""

    bias_of = ""

    def numbers(self, call: Call) -> Tensor:
        """The kernel (O, C / groups, *slots), slots in the order of `nearfold.lower.offsets`, in float32 at least."""
        raise NotImplementedError

    def parts(self, kernel: Any, out: int) -> int:
        """Groups of channels that it maps: each one alone."""
        return out

    def weight(self, call: Call) -> tuple[Tensor, int]:
        with full_precision(call.value):
            made = self.numbers(call).to(call.value.dtype)
        return made, self.parts(call.op.weight.kernel, made.shape[0])


def wide(call: Call) -> dict[str, Tensor]:
    """The parameters in float32 at least."""
    return {name: p.to(wide_dtype(call)) for name, p in call.params.items()}


def _with_skip(kernel_CN: Tensor, skip_C: Tensor, at: tuple[int, ...]) -> Tensor:
    """(C, 1, *slots) of (C, *slots), and a number more for the position itself, which is slot ``at``."""
    one = F.pad(skip_C.view(-1, *(1,) * len(at)), _around(at, tuple(kernel_CN.shape[1:])))
    return (kernel_CN + one)[:, None]


def _around(at: tuple[int, ...], size: tuple[int, ...]) -> list[int]:
    """Zeros before and behind one number, last axis first, that bring it to place ``at`` of a map of this size."""
    return [n for i, s in list(zip(at, size, strict=True))[::-1] for n in (i, s - 1 - i)]


@means(Hyena)
class HyenaMeaning(LongMeaning):
    """An MLP of the encoded distance times exp(-decay distance)."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        kernel = cast(Hyena, op.weight.kernel)
        found = linear("first", kernel.width, 1 + 2 * kernel.bands, True)
        for name in ("second", "third"):
            found |= linear(name, kernel.width, kernel.width, True)
        found |= linear("last", sizes.inner, kernel.width, False)
        found["frequency"] = Parameter((kernel.width,), f"constant:{kernel.omega}", decays=False)
        return found | {"D": Parameter((sizes.inner,), "normal:1", decays=False)}

    def numbers(self, call: Call) -> Tensor:
        kernel, params = cast(Hyena, call.op.weight.kernel), wide(call)
        ((_, last),) = offsets(call.op, call.grid)
        far_N = torch.arange(last + 1, device=call.value.device, dtype=wide_dtype(call))
        at_N = far_N / max(kernel.length - 1, 1)
        waves = torch.linspace(1e-4, kernel.bands - 1, kernel.bands, dtype=far_N.dtype, device=far_N.device)
        turn_Nf = (2 * math.pi / kernel.length) * far_N[:, None] * waves
        x = torch.cat([at_N[:, None], torch.cos(turn_Nf), -torch.sin(turn_Nf)], -1)
        for name in ("first", "second", "third"):
            x = torch.sin(params["frequency"] * F.linear(x, params[f"{name}_weight"], params[f"{name}_bias"]))
        made_CN = F.linear(x, params["last_weight"]).T
        fall = -math.log(FALL)
        decay_C = torch.linspace(fall / SLOW, fall / FAST, len(made_CN), dtype=far_N.dtype, device=far_N.device)
        return _with_skip(made_CN * torch.exp(-decay_C[:, None] * at_N), params["D"], (0,))


@means(S4D)
class S4DMeaning(LongMeaning):
    """Powers of exp(A step), weighed and added up: along the raster order, or both ways along every axis."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        axes, ways = (1, 1) if op.shape.causal else (sizes.ndim, 2)
        pairs = cast(S4D, op.weight.kernel).state // 2
        return {
            "log_dt": Parameter((axes, sizes.inner), "log_step", decays=False),
            "log_A_real": Parameter((axes, sizes.inner, pairs), f"constant:{math.log(0.5)}", decays=False),
            "A_imag": Parameter((axes, sizes.inner, pairs), "harmonics", decays=False),
            "C": Parameter((axes, ways, sizes.inner, pairs, 2), f"normal:{math.sqrt(0.5)}"),
            "D": Parameter((sizes.inner,), "normal:1", decays=False),
        }

    def numbers(self, call: Call) -> Tensor:
        # in float64: the phase of a pair grows to thousands of turns along a long map
        params = {name: p.double() for name, p in call.params.items()}
        ranges = offsets(call.op, call.grid)
        product: Tensor | None = None
        for axis, (first, last) in enumerate(ranges):
            rate = -params["log_A_real"][axis].exp(), params["A_imag"][axis]
            dt_C1 = params["log_dt"][axis].exp()[:, None]
            step = rate[0] * dt_C1, rate[1] * dt_C1
            grown = _exp(step)
            held = _times((grown[0] - 1, grown[1]), (rate[0], -rate[1]))
            size_Cn = rate[0].square() + rate[1].square()
            held = held[0] / size_Cn, held[1] / size_Cn
            ways = [_powers(_times((c[..., 0], c[..., 1]), held), step, last + 1) for c in params["C"][axis]]
            line = ways[0]
            if first < 0:  # the other way starts one step before the position
                line = torch.cat([ways[1][:, :last].flip(-1), line], -1)
            line = line.view(len(line), *(1,) * axis, -1, *(1,) * (len(ranges) - 1 - axis))
            product = line if product is None else product * line
        assert product is not None
        made = _with_skip(product, params["D"], tuple(-first for first, _ in ranges))
        return made.to(wide_dtype(call))


_Pair = tuple[Tensor, Tensor]
"""Real and imaginary part: exporters know no complex numbers."""


def _times(x: _Pair, y: _Pair) -> _Pair:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _exp(x: _Pair) -> _Pair:
    size = x[0].exp()
    return size * x[1].cos(), size * x[1].sin()


def _powers(weight: _Pair, step: _Pair, count: int) -> Tensor:
    """2 Re sum over n of weight exp(step l), for l from 0 to count - 1, of pairs (C, n): (C, count)."""
    near = torch.arange(SPAN, device=step[0].device)
    # one more than needed: a compiler makes a graph of its own where there may be one alone
    far = torch.arange(count // SPAN + 2, device=step[0].device) * SPAN
    starts, powers = (_exp((step[0][..., None] * at, step[1][..., None] * at)) for at in (far, near))
    first = _times((weight[0][..., None], weight[1][..., None]), starts)  # (C, n, far)
    line = first[0].mT @ powers[0] - first[1].mT @ powers[1]
    return 2 * line.flatten(1)[:, :count]


class _Siren(LongMeaning):
    """sin(omega (W t + b)) twice, then a map to the kernel's numbers."""

    def _made(self, op: Basic, sizes: Sizes) -> int:
        """How many numbers an offset has."""
        raise NotImplementedError

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        kernel: Any = op.weight.kernel
        axes, inner = 1 if op.shape.causal else sizes.ndim, kernel.hidden
        # as SIREN (arXiv 2006.09661): between sines, uniform up to sqrt(6 / inputs) / omega
        between = max(1, round(inner * kernel.omega**2 / 6))
        return (
            linear("first", inner, axes, True)
            | {"second_weight": Parameter((inner, inner), "uniform", between)}
            | {"second_bias": Parameter((inner,), "uniform", between)}
            | linear("last", self._made(op, sizes), inner, True)
        )

    def numbers(self, call: Call) -> Tensor:
        kernel: Any = call.op.weight.kernel
        params, dtype = wide(call), wide_dtype(call)
        axes = [
            torch.arange(first, last + 1, device=call.value.device, dtype=dtype) / kernel.length
            for first, last in offsets(call.op, call.grid)
        ]
        x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        for name in ("first", "second"):
            x = torch.sin(kernel.omega * F.linear(x, params[f"{name}_weight"], params[f"{name}_bias"]))
        return F.linear(x, params["last_weight"], params["last_bias"]).movedim(-1, 0)


@means(ContinuousDepthwise)
class ContinuousDepthwiseMeaning(_Siren):
    """A number for every channel."""

    bias_of = "last_weight"

    def _made(self, op: Basic, sizes: Sizes) -> int:
        return sizes.inner

    def numbers(self, call: Call) -> Tensor:
        return super().numbers(call)[:, None]


@means(Continuous)
class ContinuousMeaning(_Siren):
    """A number for every pair of channels of a group."""

    bias_of = "last_weight"
    maps_channels = True

    def _made(self, op: Basic, sizes: Sizes) -> int:
        groups = cast(Continuous, op.weight.kernel).groups
        require_divides(op, "groups", groups, sizes.inner, "value channels")
        require_divides(op, "groups", groups, sizes.out_channels, "out_channels")
        return sizes.out_channels * sizes.inner // groups

    def groups(self, kernel: Continuous, channels: int) -> int:
        return kernel.groups

    def parts(self, kernel: Continuous, out: int) -> int:
        return kernel.groups

    def made(self, call: Call) -> int:
        kernel = cast(Continuous, call.op.weight.kernel)
        return call.params["last_weight"].shape[0] * kernel.groups // call.value.shape[1]

    def numbers(self, call: Call) -> Tensor:
        return super().numbers(call).unflatten(0, (self.made(call), -1))
