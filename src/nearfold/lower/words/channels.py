"""Kernels over channels: `cross_covariance`, `excite` and `channel_shift`.

Shape legend: B batch, C channels, H heads, d, e channels of a head, N positions, S slots.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import ChannelShift, CrossCovariance, Excite
from nearfold.lower.call import Call
from nearfold.lower.meaning import KernelMeaning, Lengths, Sizes, means
from nearfold.lower.parameters import Parameter, linear, require_divides
from nearfold.lower.selection import metric_scores


@means(CrossCovariance)
class CrossCovarianceMeaning(KernelMeaning):
    """The sum over slots is the value itself, which the input's own map follows."""

    generating = ("temperature",)
    reads_features = True
    of_the_map = True
    bias_of = ""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        heads = cast(CrossCovariance, op.weight.kernel).heads
        require_divides(op, "heads", heads, sizes.inner, "channels of query, key and value")
        return {"temperature": Parameter((heads,), "constant:1", decays=False)}

    def weight(self, call: Call) -> None:
        return None

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        map_BHde = _channel_map(call)
        rows_BHeN = y.flatten(2).unflatten(1, (map_BHde.shape[1], -1))
        return (map_BHde.to(y.dtype) @ rows_BHeN).flatten(1, 2).unflatten(2, y.shape[2:])

    def blocks(self, call: Call) -> Tensor:
        return _channel_map(call)[..., None]


def _channel_map(call: Call) -> Tensor:
    """How every channel of a head is made of the others, (B, H, d, e), for every input."""
    assert call.query is not None and call.key is not None
    heads, wide = cast(CrossCovariance, call.op.weight.kernel).heads, torch.promote_types(call.x.dtype, torch.float32)
    q_BHdN, k_BHeN = (t.to(wide).flatten(2).unflatten(1, (heads, -1)) for t in (call.query, call.key))
    size_BHd, size_BHe = (torch.linalg.vector_norm(t, dim=-1).clamp(min=1e-12) for t in (q_BHdN, k_BHeN))
    # d^2 numbers are divided instead of d N; in float32 at least, for the sums over positions may be large
    score_BHde = metric_scores("dot", False, q_BHdN, k_BHeN) / size_BHd[..., None] / size_BHe[..., None, :]
    return torch.softmax(score_BHde * call.params["temperature"][:, None, None], -1)


@means(Excite)
class ExciteMeaning(KernelMeaning):
    """The sum over slots is the value itself, which the input's own gates follow."""

    generating = ("excite_reduce", "excite", "excite_span")
    of_the_map = True
    bias_of = ""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        kernel = cast(Excite, op.weight.kernel)
        if kernel.span is not None:
            return {"excite_span_weight": Parameter((kernel.span,), "uniform", kernel.span)}
        hidden = max(1, sizes.inner // kernel.reduction)
        return linear("excite_reduce", hidden, sizes.inner, sizes.bias) | linear(
            "excite", sizes.inner, hidden, sizes.bias
        )

    def weight(self, call: Call) -> None:
        return None

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        gate_BC = _gates(call).to(y.dtype)
        return y * gate_BC.view(*gate_BC.shape, *(1,) * call.ndim)

    def blocks(self, call: Call) -> Tensor:
        return _gates(call)[..., None, None, None]


def _gates(call: Call) -> Tensor:
    """A number between 0 and 1 for every channel (B, C) of every input, in float32 at least."""
    wide = torch.promote_types(call.value.dtype, torch.float32)
    params = {name: p.to(wide) for name, p in call.params.items()}
    rows_BCN = call.value.flatten(2).to(wide)
    # what is absent is zero: the mean of the others is larger by the share of those
    many = rows_BCN.shape[2] if call.keep is None else call.keep.sum(1, keepdim=True).clamp(min=1)
    mean_BC = rows_BCN.sum(2) / many
    if "excite_span_weight" in params:
        (span,) = params["excite_span_weight"].shape
        made = F.pad(mean_BC, (span // 2, span // 2)).unfold(1, span, 1) @ params["excite_span_weight"]
    else:
        hidden = F.relu(F.linear(mean_BC, params["excite_reduce_weight"], params.get("excite_reduce_bias")))
        made = F.linear(hidden, params["excite_weight"], params.get("excite_bias"))
    return made.sigmoid()


@means(ChannelShift)
class ChannelShiftMeaning(KernelMeaning):
    """One for the slot that a channel reads, zero for the others."""

    bias_of = ""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        slots_of(cast(ChannelShift, op.weight.kernel), op.path.slot_shape(sizes.ndim), sizes.inner)
        return {}

    def weight(self, call: Call) -> tuple[Tensor, int]:
        slots, channels = call.op.path.slot_shape(call.ndim), call.value.shape[1]
        found = slots_of(cast(ChannelShift, call.op.weight.kernel), slots, channels)
        slot_C1 = torch.cat([torch.full((many, 1), at, device=call.value.device) for at, many in found])
        one_hot_CS = slot_C1 == torch.arange(math.prod(slots), device=slot_C1.device)
        return one_hot_CS.to(call.value.dtype).view(channels, 1, *slots), channels


def slots_of(kernel: ChannelShift, slots: Lengths, channels: int) -> list[tuple[int, int]]:
    """Which slot, in raster order, how many of the channels read, from the first channel on."""
    total, steps = math.prod(slots), [math.prod(slots[axis + 1 :]) for axis in range(len(slots))]
    if kernel.share is None:
        each = -(-channels // total)
        found: list[tuple[int, int]] = []
        for at in range(total - 1, -1, -1):
            found.append((at, min(each, channels - sum(many for _, many in found))))
        return found
    middle, fold = total // 2, int(channels * kernel.share)
    moved = [step for step, size in zip(steps, slots, strict=True) if size == 3]
    if 2 * len(moved) * kernel.share > 1:
        raise ValueError(f"{kernel}: share must be at most 1 / {2 * len(moved)} in a window of 3 on {len(moved)} axes")
    found = [(middle + way * step, fold) for step in moved for way in (1, -1)]
    return [*found, (middle, channels - fold * len(found))]
