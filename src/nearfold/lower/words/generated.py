"""`generated`: a number for every slot, made from the query position's own features.

Shape legend: B batch, G groups of channels, M outputs, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Generated
from nearfold.lower.call import Call, pointwise
from nearfold.lower.geometry import crop
from nearfold.lower.meaning import RhoMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.weighting import wide_dtype

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda a: a,
    "softmax": lambda a: torch.softmax(a, -1),
    "sigmoid": torch.sigmoid,
}


@means(Generated)
class GeneratedMeaning(RhoMeaning):
    """One or two pointwise maps make alpha."""

    generating = ("reduce", "span")
    per_slot = True

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        rho, read = cast(Generated, op.weight.rho), sizes.in_channels
        found, hidden = {}, read
        if rho.reduction:
            hidden = max(1, read // rho.reduction)
            found = linear("reduce", hidden, read, sizes.bias)
        numbers = math.prod(op.path.slot_shape(sizes.ndim)) * rho.heads
        return found | linear("span", numbers, hidden, sizes.bias)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        rho = cast(Generated, call.op.weight.rho)
        hidden = crop(call.x, (0,) * call.ndim, call.grid, call.stride)
        home = tuple(hidden.shape[2:])
        if home != call.out_grid:
            raise ValueError(
                f"{call.op}: makes a kernel for each of {home} positions, but has outputs {call.out_grid}; "
                "use padding=same"
            )
        if rho.reduction:
            hidden = F.relu(pointwise(hidden, call.params["reduce_weight"], call.params.get("reduce_bias"), True))
        span = pointwise(hidden, call.params["span_weight"], call.params.get("span_bias"), True)
        alpha = span.flatten(2).unflatten(1, (rho.heads, -1)).transpose(2, 3).to(wide_dtype(call))
        return _ACTIVATIONS[rho.activation](alpha) * valid
