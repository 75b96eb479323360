"""`fast_weights`: a matrix for each head that every position writes and reads, exactly, in linear time.

The engine goes step after step on the CPU; on CUDA devices, and where there is no engine, PyTorch goes by chunks.

Shape legend: B batch, C channels, H heads, N positions, p channels of a head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nearfold.grammar.words import FastWeights, Scan
from nearfold.kernels.fast_weights import fast_weights
from nearfold.lower.call import Call, refuse_derivatives
from nearfold.lower.meaning import meaning
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.fast import FastMeaning, along
from nearfold.lower.words.scan import visited

NAME = "fast_weights"


def supports(facts: Facts) -> Verdict:
    """Path scan under a rho of fast weights."""
    rho = facts.op.weight.rho
    if not isinstance(rho, FastWeights):
        return Verdict.no(f"rho {rho.word} writes no matrix")
    how = "step after step, the matrix in the first cache" if facts.device == "cpu" else "by chunks of matrix products"
    return Verdict.yes(f"what is written is held in a matrix for each head: {how}", "roundoff")


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    refuse_derivatives(call)
    own = cast(FastMeaning, meaning(call.op.weight.rho))
    steps = own.steps(call, along(call))
    keep = torch.is_grad_enabled() and not torch.compiler.is_exporting()  # their number is a size of its own
    y_BNHp = fast_weights(*steps.operands(), keep)[0]
    y_BNC = own.result(steps, y_BNHp).flatten(2)
    order = visited(cast(Scan, call.op.path), call.grid, y_BNC.device)
    if order is not None:
        y_BNC = y_BNC[:, order.argsort()]
    return y_BNC.mT.unflatten(2, call.grid).to(call.value.dtype)
