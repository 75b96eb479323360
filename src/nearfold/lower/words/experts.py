"""`experts`: several kernels, mixed anew for every input.

Shape legend: B batch, C channels, E experts, S slots, O output channels.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Experts
from nearfold.lower.call import Call
from nearfold.lower.meaning import KernelMeaning, Sizes, means
from nearfold.lower.parameters import Parameter


@means(Experts)
class ExpertsMeaning(KernelMeaning):
    """All experts' outputs are made, and mixed by their shares."""

    generating = ("router", "router_reduce")
    maps_channels = True
    of_the_map = True
    late_bias = True

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        kernel, values, slots = cast(Experts, op.weight.kernel), sizes.inner, op.path.slot_shape(sizes.ndim)
        hidden, shape = max(1, values // kernel.reduction), (kernel.count * sizes.out_channels, values, *slots)
        return {
            "weight": Parameter(shape, "uniform", values * math.prod(slots)),
            "router_reduce_weight": Parameter((hidden, values), "uniform", values),
            "router_weight": Parameter((kernel.count, hidden), "uniform", hidden),
            "router_bias": Parameter((kernel.count,), "constant:0"),
        }

    def groups(self, kernel: Experts, channels: int) -> int:
        return 1

    def copies(self, kernel: Experts) -> int:
        return kernel.count

    def weight(self, call: Call) -> tuple[Tensor, int]:
        return call.params["weight"], 1

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        share_BE = expert_shares(call).to(y.dtype)
        y = torch.einsum("beo...,be->bo...", y.unflatten(1, (share_BE.shape[1], -1)), share_BE)
        return super().finish(call, y, with_bias)

    def blocks(self, call: Call) -> Tensor:
        weight_OcS, share_BE = call.params["weight"].flatten(2), expert_shares(call)
        weight_EOcS = weight_OcS.unflatten(0, (share_BE.shape[1], -1))
        return torch.einsum("eocs,be->bocs", weight_EOcS, share_BE.to(weight_OcS.dtype))[:, None]

    def made(self, call: Call) -> int:
        return call.params["weight"].shape[0] // cast(Experts, call.op.weight.kernel).count


def expert_shares(call: Call) -> Tensor:
    """How much of every expert an input gets (B, E)."""
    mean_BC = call.value.flatten(2).mean(-1)
    hidden = torch.relu(mean_BC @ call.params["router_reduce_weight"].to(mean_BC.dtype).T)
    logits = hidden @ call.params["router_weight"].to(mean_BC.dtype).T + call.params["router_bias"].to(mean_BC.dtype)
    return torch.softmax(logits / cast(Experts, call.op.weight.kernel).temperature, -1)
