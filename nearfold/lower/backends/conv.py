"""`conv`: a window with a kernel and constant alpha is a convolution, torch's own but for ACmix's many small groups.

Shape legend: B batch, C channels, N positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.words import Ones, Shift, Window
from nearfold.kernels import engine
from nearfold.kernels.grouped_conv import grouped_conv
from nearfold.lower import oracle
from nearfold.lower.call import Call, autocast_dtype, in_forward_mode
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
    if isinstance(op.weight.kernel, Shift):
        return Verdict.yes("maps, shifted and summed, are one grouped convolution", "roundoff")
    return Verdict.yes("window with constant alpha is F.conv", "roundoff")


def _by_groups(call: Call) -> bool:
    """Whether this is ACmix's convolution where the compiled engine may run it."""
    x = call.value
    plain = x.device.type == "cpu" and x.dtype in engine.COMPUTE and autocast_dtype(x) is None
    return isinstance(call.op.weight.kernel, Shift) and plain and not in_forward_mode(call)


def _shift(call: Call) -> Tensor:
    """ACmix's convolution straight from query, key and value, whose channels are never joined."""
    kernel, geometry = call.op.weight.kernel, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(kernel, Shift) and isinstance(call.op.path, Window)
    assert call.query is not None and call.key is not None
    maps = [t.unflatten(1, (kernel.heads, -1)).transpose(1, 2) for t in (call.query, call.key, call.value)]
    found = oracle.kernel_weight(call)
    assert found is not None
    weight, groups = found
    y = grouped_conv(
        maps,
        weight.unflatten(0, (groups, -1)),
        list(geometry.stride),
        list(geometry.dilation),
        list(geometry.before),
        list(geometry.output(call.grid)),
        call.op.path.mode == "reflect",
    )
    return (y.transpose(1, 2) if kernel.interleaved else y).flatten(1, 2)


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    if _by_groups(call):
        return _shift(call)
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
