"""`transposed`: outputs on a finer grid by constant alpha are F.conv_transpose.

Shape legend: g groups, c input and o output channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.words import Transposed
from nearfold.lower.call import Call
from nearfold.lower.geometry import crop
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.meaning import meaning
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.transposed import FineGeometry

NAME = "transposed"
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def supports(facts: Facts) -> Verdict:
    """Path transposed on 1 to 3 axes."""
    if not isinstance(facts.op.path, Transposed):
        return Verdict.no(f"path is {facts.op.path.word}, not transposed")
    if facts.ndim not in _CONV:
        return Verdict.no(f"torch has no transposed convolution on {facts.ndim} grid axes")
    return Verdict.yes("fixed offsets on a finer grid are F.conv_transpose", "roundoff")


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    fine, kernel, out = FineGeometry.of(call.op, call.ndim), call.op.weight.kernel, call.out_grid
    value = values(call).unflatten(2, call.grid) if meaning(kernel).reads_more(kernel) else call.value
    found = kernel_weight(call)
    if found is None:
        groups = value.shape[1]
        weight = torch.ones(groups, 1, *fine.size, dtype=value.dtype, device=value.device)
    else:
        weight, groups = found
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (g * o, c) to (g * c, o)
    # torch leaves as many out on both sides, and adds to the end fewer than a step
    padding, more = fine.before, tuple(b - a for b, a in zip(fine.before, fine.after, strict=True))
    fits = all(m < max(u, d) for m, u, d in zip(more, fine.up, fine.dilation, strict=True))
    first = (0,) * call.ndim
    if not fits:
        padding, first, more = fine.after, more, first
    later = meaning(kernel).late_bias  # the bias follows what `finish` does
    bias = None if later else call.params.get("bias")
    y = _CONV[call.ndim](value, weight, bias, fine.up, padding, more, groups, fine.dilation)
    return finish(call, y if fits else crop(y, first, out), with_bias=later)
