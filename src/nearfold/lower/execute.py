"""Run an operation: combinators here, `Basic` operations on the backend that `lower` chose."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._kept import once
from nearfold.grammar import Basic, Branch, Operation, Sum
from nearfold.lower.call import Call, pointwise, project
from nearfold.lower.extent import narrowed
from nearfold.lower.frame import frame
from nearfold.lower.geometry import crop, pads_input
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import LETTERS, operand

Run = Callable[[Call], Tensor]


def execute(
    op: Operation,
    params: dict[str, Tensor],
    x: Tensor,
    choose: Callable[[Basic], Run],
    draw: Tensor | None = None,
    shared: dict[str, Tensor] | None = None,
    out_channels: int | None = None,
    context: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """x (B, C, *grid) -> (B, O, *out).

    ``shared`` holds projections already made by an enclosing sum, ``out_channels`` is O (default C), ``context`` the
    input that `cross` paths read, ``mask`` the keys that each query may read.
    """
    out_channels = x.shape[1] if out_channels is None else out_channels
    if isinstance(op, Basic):
        return _basic(op, params, x, choose, draw, shared or {}, context, mask)
    if isinstance(op, Branch):
        sides = zip((op.first, op.second), op.shares(out_channels), op.inputs(x.shape[1]), strict=True)
        made = [
            execute(part, operand(params, i), x[:, read], choose, draw, None, channels, context, mask)
            for i, (part, channels, read) in enumerate(sides)
            if channels
        ]
        _same_grid(op, [m.shape[2:] for m in made])
        y = torch.cat(made, 1) if len(made) > 1 else made[0]
        return pointwise(y, params["mix_weight"], params.get("mix_bias")) if op.mix else y
    assert isinstance(op, Sum)
    # a projection hoisted into the sum is computed once, for every operand that asks for it
    bordered, planes, contextual = _shared_by(op, tuple(x.shape[2:]))
    shared = {
        c: pointwise(x, params[f"{LETTERS[c]}_weight"], params.get(f"{LETTERS[c]}_bias"), planes)
        for c in "qkv"
        if f"{LETTERS[c]}_weight" in params and not bordered and not (contextual and c != "q")
    }
    rates = iter(params["rates"].unbind()) if "rates" in params else iter(())
    total: Tensor | None = None
    for i, (rate, term) in enumerate(op.terms):
        mine = {c: t for c, t in shared.items() if f"{i}.{LETTERS[c]}_weight" not in params}
        y = execute(term, operand(params, i), x, choose, draw, mine, out_channels, context, mask)
        if rate is not None:
            y = y * (next(rates).to(y.dtype) if isinstance(rate, str) else rate)
        if total is not None:
            _same_grid(op, [total.shape[2:], y.shape[2:]])
        total = y if total is None else total + y
    assert total is not None
    return total


@once
def _shared_by(op: Sum, grid: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Of a sum: whether some operand projects its own padded input, all are windows, and some reads a context."""
    bordered = any(pads_input(part, grid) for part in op.parts)
    return bordered, all(meaning(part.path).planes for part in op.parts), op.needs_context


def _shared_heads(y: Tensor, groups: int, heads: int) -> Tensor:
    """A copy for each query head that shares a key head: O(N C) numbers, as many as the queries. Rows of channels."""
    rows_BNC = y.flatten(2).transpose(1, 2)
    B, N, C = rows_BNC.shape
    each = rows_BNC.unflatten(2, (groups, 1, C // groups)).expand(-1, -1, -1, heads // groups, -1)
    return each.reshape(B, N, C // groups * heads).transpose(1, 2).unflatten(2, y.shape[2:])


def _same_grid(op: Operation, grids: list[torch.Size]) -> None:
    if any(g != grids[0] for g in grids):
        sizes = " and ".join(str(tuple(g)) for g in grids)
        raise ValueError(f"the parts must have one output grid, got {sizes} (do their strides agree?): {op}")


def _basic(
    op: Basic,
    params: dict[str, Tensor],
    x: Tensor,
    choose: Callable[[Basic], Run],
    draw: Tensor | None,
    shared: dict[str, Tensor],
    context: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    if op.cross and context is None:
        raise ValueError(f"{op}: keys and values come from a second input; call it with context=(B, C, *grid)")
    read = context if op.cross and context is not None else x
    at = frame(op, tuple(x.shape[2:]), tuple(read.shape[2:]) if op.cross else (), draw is not None)
    if at.added:
        x = read = F.pad(x, at.added)
    projections = op.weight.projections

    def projected(letter: str) -> Tensor:
        if letter in projections and letter in shared:
            y = shared[letter]
        else:
            y = project(op, letter, params, x if letter == "q" else read)
        return y if letter == "q" or at.kv is None else _shared_heads(y, at.kv, op.weight.heads)

    query = projected("q") if at.features else None
    key = (query if at.same else projected("k")) if at.features else None
    own = narrowed(op, at.op, params, len(at.grid))
    y = choose(op)(Call(at, own, projected("v"), query, key, x, draw, mask))
    if at.inner:
        y = crop(y, [0] * len(at.inner), at.inner)
    if "o" in projections:
        y = pointwise(y, params["out_weight"], params.get("out_bias"), meaning(op.path).planes)
    return y
