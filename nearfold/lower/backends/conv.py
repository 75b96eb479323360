"""`conv`: a window with a kernel and constant alpha is torch's own convolution.

Shape legend: B batch, C channels, N positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.words import Ones, Window
from nearfold.lower import oracle
from nearfold.lower.call import Call
from nearfold.lower.geometry import WindowGeometry
from nearfold.lower.verdict import Facts, Verdict

NAME = "conv"
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def supports(facts: Facts) -> Verdict:
    """Window paths under rho ones, on 1 to 3 axes."""
    op = facts.op
    if not isinstance(op.path, Window):
        return Verdict.no(f"path is {op.path.word}, not window")
    if not isinstance(op.weight.rho, Ones):
        return Verdict.no(f"weight looks at the scores (rho {op.weight.rho.word})")
    if facts.ndim not in _CONV:
        return Verdict.no(f"torch has no convolution on {facts.ndim} grid axes")
    return Verdict.yes("window with constant alpha is F.conv", "roundoff")


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    op, geometry = call.op, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(op.path, Window)
    geometry.output(call.grid)
    value = oracle.values(call).unflatten(2, call.grid)
    kernel = oracle.kernel_weight(call)
    if kernel is None:
        channels = value.shape[1]
        kernel = torch.ones(channels, 1, *geometry.size, dtype=value.dtype, device=value.device), channels
    weight, groups = kernel
    padding = geometry.before
    if op.path.mode == "reflect" or geometry.before != geometry.after:
        value, padding = geometry.pad(value, op.path.mode), (0,) * call.ndim
    bias = None if "pointwise_weight" in call.params else call.params.get("bias")
    y = _CONV[call.ndim](value, weight, bias, geometry.stride, padding, geometry.dilation, groups)
    return oracle.finish(call, y, with_bias=False)
