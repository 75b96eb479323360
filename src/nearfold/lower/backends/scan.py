"""`scan`: a state-space recurrence, parallel in time by chunks; nothing of size N x N, or N x state x channels.

Shape legend: B batch, C channels, H heads, N positions, s numbers of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Scan, Selective
from nearfold.kernels.scan import selective_scan
from nearfold.kernels.ssd import decayed_attention
from nearfold.lower.call import Call, refuse_derivatives
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.scan import state_space, visited

NAME = "scan"


def supports(facts: Facts) -> Verdict:
    """Path scan under selective."""
    op = facts.op
    if not isinstance(op.path, Scan):
        return Verdict.no(f"path is {op.path.word}, not scan")
    if not isinstance(op.weight.rho, Selective):
        return Verdict.no(f"rho is {op.weight.rho.word}, not selective")
    if op.weight.rho.scan_heads is None:
        return Verdict.yes("the recurrence by chunks, states in registers", "roundoff")
    return Verdict.yes("chunks of matrix products (state-space duality)", "roundoff")


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    path, rho = call.op.path, call.op.weight.rho
    assert isinstance(path, Scan) and isinstance(rho, Selective)
    value_BNC, delta_BNh, write_BNs, read_BNs = state_space(call)
    dtype, wide = value_BNC.dtype, delta_BNh.dtype
    rate = -call.params["A_log"].to(wide).exp()
    skip = call.params["D"].to(wide)
    x_BNC = value_BNC.to(wide)
    if rho.scan_heads is None:
        refuse_derivatives(call)
        keep = torch.is_grad_enabled() and not torch.compiler.is_exporting()  # their number is a size of its own
        y_BNC = selective_scan(x_BNC, delta_BNh, rate, write_BNs, read_BNs, keep)[0] + x_BNC * skip
    else:
        x_BHNp = x_BNC.unflatten(2, (rho.scan_heads, -1)).transpose(1, 2)
        delta_BHN = delta_BNh.transpose(1, 2)
        y_BHNp = decayed_attention(
            read_BNs[:, None], write_BNs[:, None], x_BHNp * delta_BHN[..., None], delta_BHN * rate[:, None]
        )
        y_BNC = (y_BHNp + x_BHNp * skip[:, None, None]).transpose(1, 2).flatten(2)
    order = visited(path, call.grid, y_BNC.device)
    if order is not None:
        y_BNC = y_BNC[:, order.argsort()]
    return y_BNC.transpose(1, 2).unflatten(2, call.grid).to(dtype)
