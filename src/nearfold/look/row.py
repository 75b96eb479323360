"""`looks`: where one output position of a layer looks, from the operation's own Selection.

Shape legend: B batch, H heads, M outputs, S slots, N positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfold._numbers import plain
from nearfold.grammar import Branch, Operation
from nearfold.kernels.names import require_tensors
from nearfold.lower import oracle
from nearfold.lower.call import Call
from nearfold.lower.execute import execute, factors
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import operand
from nearfold.lower.selection import select
from nearfold.nn.mixer import Mixer


def looks(layer: Mixer, x: Tensor, at: tuple[int, ...]) -> Tensor:
    """How much output position ``at`` reads every input position: (B, *grid), non-negative.

    It sums to one, or to zero where the output is zero. A position's share is |alpha| times the size of the
    kernel's slot, over all heads; the parts of a sum or a branch count by the energy of what each of them makes
    there, times its rate, before any output projection. Random candidates are not drawn. All rows at once, head by
    head and signed, are `nearfold.look.mixing_matrix`.

    Args:
        layer: a `Mixer`.
        x: an input of the layer; where the layer unshuffles it, the grid is the unshuffled one.
        at: output position of the operation, one entry per grid axis.

    Raises:
        ValueError: `at` is not an output position, or a part reads another input (`cross`), which is not the grid of x.

    >>> from nearfold.nn import Mixer
    >>> looks(Mixer("window(3) | box | ones", 4, ndim=1), torch.ones(1, 4, 5), (0,)).tolist()
    [[0.5, 0.5, 0.0, 0.0, 0.0]]
    """
    if layer.operation.needs_context:
        raise ValueError(
            f"{layer.operation}: reads another input, whose positions are not those of x; "
            "nearfold.look.mixing_matrix(layer, x, context=...) says which of them"
        )
    require_tensors(x=x)
    x, at = layer.prepare(x), plain(tuple(at))
    grid = tuple(x.shape[2:])
    if len(at) != len(grid):
        raise ValueError(f"at must have {len(grid)} entries, one per grid axis, got {at}")
    total = x.new_zeros(x.shape[0], *grid)
    params = layer.tensors()
    flat = 0
    for a, n in zip(at, grid, strict=True):
        flat = flat * n + a
    rates = iter(_rates(layer.operation, params, x, flat, layer.made_channels))

    def spy(call: Call) -> Tensor:
        y = oracle.run(call)
        out = tuple(y.shape[2:])
        if any(not 0 <= a < n for a, n in zip(at, out, strict=True)):
            raise ValueError(f"at={at} is outside the output grid {out}")
        m = 0
        for a, n in zip(at, out, strict=True):
            m = m * n + a
        chosen = select(call)
        share = _share(call, oracle.weights(call, chosen)[..., m, :].abs())
        index = chosen.index[..., m, :].expand(x.shape[0], share.shape[1], -1)
        row = x.new_zeros(*share.shape[:2], chosen.positions).scatter_add_(2, index, share.to(x.dtype))
        border = call.at.padding
        inside = (slice(None), *(slice(border, border + n) for n in grid))
        row = row.sum(1).unflatten(1, call.padded)[inside]
        row = row / row.flatten(1).sum(1).clamp(min=1e-12).view(-1, *(1,) * len(grid))
        energy = y.flatten(2)[..., m].square().sum(1).sqrt() * next(rates)
        total.add_(row * energy.view(-1, *(1,) * len(grid)).to(x.dtype))
        return y

    with torch.no_grad():
        execute(layer.operation, params, x, lambda *_: spy, out_channels=layer.made_channels)
    return total / total.flatten(1).sum(1).clamp(min=1e-12).view(-1, *(1,) * len(grid))


Rate = float | Tensor
"""A number, or one for each image (B,)."""


def _rates(op: Operation, params: dict[str, Tensor], x: Tensor, at: int, out_channels: int) -> list[Rate]:
    """By how much every `Basic` part is multiplied on its way out at a position, in the order in which they run."""
    if not op.operands:
        return [1.0]
    found: list[Rate] = []
    reads = op.inputs(x.shape[1]) if isinstance(op, Branch) else (slice(None),) * len(op.operands)
    each = zip(factors(op, params, x), op.operands, op.shares(out_channels), strict=True)
    for i, (factor, term, made) in enumerate(each):
        times: Any = 1.0 if factor is None else abs(factor)
        if isinstance(times, Tensor) and times.dim():  # a gate
            times = times.flatten(1)[:, at]
        if made:
            found += [times * r for r in _rates(term, operand(params, i), x[:, reads[i]], at, made)]
    return found


def _share(call: Call, alpha_BHS: Tensor) -> Tensor:
    """Alpha times the root-sum-square of every slot's kernel, per head: (B, H, S)."""
    # max and scan look on their own in every channel: alpha has more heads than the layer
    share = alpha_BHS.expand(call.value.shape[0], max(call.heads, alpha_BHS.shape[1]), -1)
    kernel = meaning(call.op.weight.kernel).blocks(call)
    if kernel is None:
        return share
    size_BS = kernel.square().sum((1, 2, 3)).sqrt()
    # a slot at a fractional position reads several entries
    return share * size_BS.repeat_interleave(share.shape[-1] // size_BS.shape[-1], -1)[:, None]
