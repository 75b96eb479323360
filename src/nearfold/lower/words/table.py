"""`table`: a learned matrix of output and input positions."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Table
from nearfold.lower.call import Call, count_positions
from nearfold.lower.meaning import Lengths, RhoMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.weighting import wide_dtype


def require_table(call: Call) -> None:
    """ValueError where the grid is not the table's."""
    rho = cast(Table, call.op.weight.rho)
    if count_positions(call.grid) != rho.inputs:
        raise ValueError(
            f"{call.op}: the table is for {rho.inputs} positions, got a grid of {call.grid} = "
            f"{count_positions(call.grid)}"
        )


@means(Table)
class TableMeaning(RhoMeaning):
    """Alpha is the matrix; its bias is one number for every output."""

    apart = True
    takes_mask = False

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        rho = cast(Table, op.weight.rho)
        made = rho.outputs or rho.inputs
        if made != rho.inputs and sizes.ndim != 1:
            raise ValueError(f"{op}: {made} outputs of {rho.inputs} inputs are for sequences, got ndim={sizes.ndim}")
        return linear("table", made, rho.inputs, sizes.bias)

    def output(self, op: Basic, grid: Lengths, out: Lengths) -> Lengths:
        outputs = cast(Table, op.weight.rho).outputs
        if outputs is None:
            return out
        return (outputs,) if len(grid) == 1 else grid

    def queries(self, call: Call) -> Tensor:
        return torch.arange(count_positions(call.out_grid), device=call.value.device)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        require_table(call)
        return call.params["table_weight"].to(wide_dtype(call))[None, None] * valid

    def finish(self, call: Call, y: Tensor) -> Tensor:
        bias = call.params.get("table_bias")
        return y if bias is None else y + bias.to(y.dtype).reshape(call.out_grid)
