"""Kernels that are one learned number for every slot, channel and input channel, or for fewer of them; and none.

Shape legend: B batch, C channels, G groups, N positions, S slots, O output channels, p features of a position.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.place import BANDS, LEARNED, Place, encode, encoded_features
from nearfold.grammar.words import Dense, Depthwise, Separable
from nearfold.lower.call import Call
from nearfold.lower.meaning import KernelMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, require_divides


@means(type(None))
class NoKernel(KernelMeaning):
    """No kernel: slots are summed up."""

    bias_of = ""

    def weight(self, call: Call) -> None:
        return None


class _Placed(KernelMeaning):
    """A kernel from channels to channels that may read coordinates beside the values."""

    maps_channels = True
    generating = ("value_encoding",)

    def reads_more(self, kernel: Dense | Separable) -> bool:
        return kernel.coordinates is not False

    def values(self, call: Call) -> Tensor:
        """With coordinates appended to every head where asked for."""
        value, coordinates = call.value.flatten(2), cast(Dense | Separable, call.op.weight.kernel).coordinates
        if coordinates is False:
            return value
        wide = torch.promote_types(value.dtype, torch.float32)
        place = Place(call.padded, value.device, wide)
        code_pN = encode(coordinates, place, call.params.get("value_encoding_weight")).T.to(value.dtype)
        heads = value.unflatten(1, (call.heads, -1))
        return torch.cat([heads, code_pN.expand(*heads.shape[:2], *code_pN.shape)], 2).flatten(1, 2)


def _read(op: Basic, sizes: Sizes) -> tuple[int, dict[str, Parameter]]:
    """How many channels the kernel reads, coordinates included, and what encodes these."""
    kernel, values = cast(Dense | Separable, op.weight.kernel), sizes.inner
    found = {}
    if kernel.coordinates:
        values += op.heads * encoded_features(kernel.coordinates, sizes.ndim)
        if kernel.coordinates == "learned":
            waves = 2 * BANDS * sizes.ndim
            found["value_encoding_weight"] = Parameter((LEARNED, waves), "uniform", waves)
    require_divides(op, "groups", kernel.groups, values, "value channels")
    require_divides(op, "groups", kernel.groups, sizes.out_channels, "out_channels")
    return values, found


def _by_channel(op: Basic, channels: int, slots: tuple[int, ...]) -> Parameter:
    """A number for every channel and slot; next to scores all start as one: exactly k-NN attention."""
    return Parameter((channels, 1, *slots), "constant:1" if op.weight.rho.needs_score else "uniform", math.prod(slots))


def _each_alone(op: Basic, specs: dict[str, Parameter], name: str) -> dict[str, Tensor] | None:
    """A kernel that keeps every channel, in every slot; None where it makes other channels than it reads."""
    kernel, shape = cast(Dense | Separable, op.weight.kernel), specs[name].shape
    if kernel.coordinates or shape[0] // kernel.groups != shape[1]:
        return None
    eye = torch.eye(shape[1]).repeat(kernel.groups, 1)
    return {name: eye.view(*eye.shape, *(1,) * (len(shape) - 2)).expand(shape)}


@means(Dense)
class DenseMeaning(_Placed):
    """A full kernel."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        slots = op.path.slot_shape(sizes.ndim)
        values, found = _read(op, sizes)
        read = values // cast(Dense, op.weight.kernel).groups
        return found | {"weight": Parameter((sizes.out_channels, read, *slots), "uniform", read * math.prod(slots))}

    def groups(self, kernel: Dense, channels: int) -> int:
        return kernel.groups

    def neutral(self, op: Basic, specs: dict[str, Parameter]) -> dict[str, Tensor] | None:
        return _each_alone(op, specs, "weight")

    def weight(self, call: Call) -> tuple[Tensor, int]:
        return call.params["weight"], cast(Dense, call.op.weight.kernel).groups


@means(Depthwise)
class DepthwiseMeaning(KernelMeaning):
    """One number for every channel and slot."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        return {"weight": _by_channel(op, sizes.inner, op.path.slot_shape(sizes.ndim))}

    def groups(self, kernel: Depthwise, channels: int) -> int:
        return channels

    def neutral(self, op: Basic, specs: dict[str, Parameter]) -> dict[str, Tensor]:
        return {"weight": torch.ones(specs["weight"].shape)}


@means(Separable)
class SeparableMeaning(_Placed):
    """One number for every channel and slot, then a map of the channels, which has the bias."""

    bias_of = "pointwise_weight"
    late_bias = True

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        slots = op.path.slot_shape(sizes.ndim)
        values, found = _read(op, sizes)
        read = values // cast(Separable, op.weight.kernel).groups
        pointwise = Parameter((sizes.out_channels, read, *(1 for _ in slots)), "uniform", read)
        return found | {"weight": _by_channel(op, values, slots), "pointwise_weight": pointwise}

    def neutral(self, op: Basic, specs: dict[str, Parameter]) -> dict[str, Tensor] | None:
        pointwise = _each_alone(op, specs, "pointwise_weight")
        return None if pointwise is None else {"weight": torch.ones(specs["weight"].shape)} | pointwise

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        groups, bias = cast(Separable, call.op.weight.kernel).groups, call.params.get("bias")
        rows, weight = y.flatten(2).unflatten(1, (groups, -1)), call.params["pointwise_weight"]
        out = torch.einsum("bgcm,goc->bgom", rows, weight.flatten(1).unflatten(0, (groups, -1)))
        out = out.flatten(1, 2).unflatten(2, y.shape[2:])
        return out if bias is None else out + bias.view(-1, *(1,) * (y.dim() - 2)).to(out.dtype)

    def made(self, call: Call) -> int:
        return call.params["pointwise_weight"].shape[0]
