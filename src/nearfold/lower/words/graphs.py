"""`relative` and `edge`: kernels that see what a slot reads next to the query's own value.

Shape legend: B batch, C channels, M outputs, S slots, O output channels, G groups, h hidden channels.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Edge, Relative
from nearfold.lower.call import Call
from nearfold.lower.kernel import own_values
from nearfold.lower.meaning import KernelMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear, require_divides
from nearfold.lower.weighting import wide_dtype


class _EdgesMeaning(KernelMeaning):
    """A kernel without numbers for slots. What slots bring is computed in float32 at least, as scores are."""

    maps_channels = True
    bias_of = "edge_weight"
    late_bias = True

    def weight(self, call: Call) -> None:
        return None

    def blocks(self, call: Call) -> None:
        return None

    def made(self, call: Call) -> int:
        return call.params["edge_weight"].shape[0]


@means(Relative)
class RelativeMeaning(_EdgesMeaning):
    """Slots bring differences; a map of them and the query's own value follows."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        groups = cast(Relative, op.weight.kernel).groups
        require_divides(op, "groups", groups, sizes.inner, "value channels")
        require_divides(op, "groups", groups, sizes.out_channels, "out_channels")
        read = 2 * sizes.inner // groups
        return {"edge_weight": Parameter((sizes.out_channels, read), "uniform", read)}

    def messages(self, call: Call, read_BCMS: Tensor, own_BCM1: Tensor) -> Tensor:
        wide = wide_dtype(call)
        return read_BCMS.to(wide) - own_BCM1.to(wide)

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        groups = cast(Relative, call.op.weight.kernel).groups
        both = [t.unflatten(1, (groups, -1)) for t in (own_values(call).to(y.dtype), y.flatten(2))]
        rows_BGMc = torch.cat(both, 2).transpose(2, 3)
        weight_Goc = call.params["edge_weight"].unflatten(0, (groups, -1))
        out = (rows_BGMc @ weight_Goc.mT).transpose(2, 3).flatten(1, 2).unflatten(2, y.shape[2:])
        return super().finish(call, out, with_bias)


@means(Edge)
class EdgeMeaning(_EdgesMeaning):
    """A perceptron of every pair."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        hidden, read = cast(Edge, op.weight.kernel).hidden, 2 * sizes.inner
        found = linear("hidden", hidden, read, sizes.bias) if hidden else {}
        read = hidden or read
        return found | {"edge_weight": Parameter((sizes.out_channels, read), "uniform", read)}

    def messages(self, call: Call, read_BCMS: Tensor, own_BCM1: Tensor) -> Tensor:
        wide, slope = wide_dtype(call), cast(Edge, call.op.weight.kernel).slope
        params = {name: p.to(wide) for name, p in call.params.items()}
        read_BCMS, own_BCM1 = read_BCMS.to(wide), own_BCM1.to(wide)
        pair = torch.cat([own_BCM1.expand_as(read_BCMS), read_BCMS - own_BCM1], 1).movedim(1, -1)
        first = "hidden" if "hidden_weight" in params else "edge"
        bias = params.get("hidden_bias" if first == "hidden" else "bias")
        y_BMSh = F.leaky_relu(F.linear(pair, params[f"{first}_weight"], bias), slope)
        if first == "hidden":
            y_BMSh = F.linear(y_BMSh, params["edge_weight"], params.get("bias"))
        return y_BMSh.movedim(-1, 1)

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        return y
