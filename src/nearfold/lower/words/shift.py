"""`shift`: ACmix's convolution, k^2 pointwise maps of query, key and value, shifted and summed.

Shape legend: O output channels, M outputs, S slots, o channels, t maps made, m maps read.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Shift
from nearfold.lower.call import Call
from nearfold.lower.meaning import KernelMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, require_divides
from nearfold.lower.windows import window_index


@means(Shift)
class ShiftMeaning(KernelMeaning):
    """Maps, shifted and summed, are one grouped kernel."""

    reads_features = True
    bias_of = ""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        kernel, slots = cast(Shift, op.weight.kernel), op.path.slot_shape(sizes.ndim)
        count, maps = math.prod(slots), 3 * kernel.heads
        require_divides(op, "heads", kernel.heads, sizes.inner, "channels of query, key and value")
        found = {
            "weight": Parameter((count, maps), "uniform", maps),
            "shift_weight": Parameter((sizes.inner, count, *slots), "shift"),
        }
        return found | {"slot_bias": Parameter((count,), "uniform", maps)} if kernel.bias else found

    def fill_plain(self, kernel: Shift, weight: Tensor, each: float) -> None:
        # columns: query, key, value of every head, all heads alike
        weight.zero_()[:, 2 * kernel.heads] = 1 / len(weight)

    def reads_more(self, kernel: Shift) -> bool:
        return True

    def values(self, call: Call) -> Tensor:
        heads = cast(Shift, call.op.weight.kernel).heads
        assert call.query is not None and call.key is not None
        parts = [t.flatten(2).unflatten(1, (heads, -1)) for t in (call.query, call.key, call.value)]
        # group by head dimension, then (query, key, value) x heads: the grouped convolution's layout
        return torch.stack(parts, 1).flatten(1, 2).transpose(1, 2).flatten(1, 2)

    def weight(self, call: Call) -> tuple[Tensor, int]:
        # sum over maps of shift * map
        merged = torch.einsum("ot...,tm->om...", call.params["shift_weight"], call.params["weight"])
        return merged, merged.shape[0] // cast(Shift, call.op.weight.kernel).heads

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        kernel = cast(Shift, call.op.weight.kernel)
        return shifted_bias(call, kernel, _by_head(y, kernel))

    def blocks(self, call: Call) -> Tensor | None:
        found = super().blocks(call)
        if found is None or cast(Shift, call.op.weight.kernel).interleaved:
            return found
        # its groups are the dimensions of a head, but its output lies head by head: as attention's does
        return found.transpose(1, 2)


def _by_head(y: Tensor, kernel: Shift) -> Tensor:
    """The grouped convolution's channels (head dimension first), head by head unless they are to stay."""
    return y if kernel.interleaved else y.unflatten(1, (-1, kernel.heads)).transpose(1, 2).flatten(1, 2)


def shifted_bias(call: Call, kernel: Shift, y: Tensor) -> Tensor:
    """Adds the biases of the maps that were shifted and summed: at the border fewer of them arrive."""
    bias_t = call.params.get("slot_bias")
    if bias_t is None:
        return y
    arriving_OS = torch.einsum("ots,t->os", call.params["shift_weight"].flatten(2), bias_t)
    _, valid_MS = window_index(call.op, call.grid, y.device)
    bias_OM = (arriving_OS @ valid_MS.to(arriving_OS.dtype).T).unflatten(1, call.out_grid)
    return y + _by_head(bias_OM[None], kernel).to(y.dtype)
