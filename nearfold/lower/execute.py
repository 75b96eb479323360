"""Run an operation: combinators here, `Basic` operations on the backend that `lower` chose."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic, Branch, Operation, Sum
from nearfold.grammar.words import Shift
from nearfold.lower.call import Call, pointwise, project, reads_features
from nearfold.lower.geometry import padding_of
from nearfold.lower.parameters import LETTERS, operand

Run = Callable[[Call], Tensor]


def execute(
    op: Operation,
    params: dict[str, Tensor],
    x: Tensor,
    choose: Callable[[Basic], Run],
    draw: Tensor | None = None,
    shared: dict[str, Tensor] | None = None,
) -> Tensor:
    """x (B, C, *grid) -> (B, O, *out). ``shared`` holds projections already made by an enclosing sum."""
    if isinstance(op, Basic):
        return _basic(op, params, x, choose, draw, shared or {})
    if isinstance(op, Branch):
        made = [
            execute(part, operand(params, i), x, choose, draw)
            for i, part in enumerate((op.first, op.second))
            if any(name.startswith(f"{i}.") for name in params)
        ]
        y = torch.cat(made, 1) if len(made) > 1 else made[0]
        return pointwise(y, params["mix_weight"], params.get("mix_bias")) if op.mix else y
    assert isinstance(op, Sum)
    # a projection hoisted into the sum is computed once, for every operand that asks for it
    bordered = any(padding_of(part) for part in op.parts)  # those project their own padded input
    shared = {
        c: pointwise(x, params[f"{LETTERS[c]}_weight"], params.get(f"{LETTERS[c]}_bias"))
        for c in "qkv"
        if f"{LETTERS[c]}_weight" in params and not bordered
    }
    rates = iter(params["rates"].unbind()) if "rates" in params else iter(())
    total: Tensor | None = None
    for i, (rate, term) in enumerate(op.terms):
        mine = {c: t for c, t in shared.items() if f"{i}.{LETTERS[c]}_weight" not in params}
        y = execute(term, operand(params, i), x, choose, draw, mine)
        if rate is not None:
            y = y * (next(rates).to(y.dtype) if isinstance(rate, str) else rate)
        if total is not None and total.shape != y.shape:
            raise ValueError(
                f"the terms of a sum must have one output size, got {tuple(total.shape)} and {tuple(y.shape)}: {op}"
            )
        total = y if total is None else total + y
    assert total is not None
    return total


def _basic(
    op: Basic,
    params: dict[str, Tensor],
    x: Tensor,
    choose: Callable[[Basic], Run],
    draw: Tensor | None,
    shared: dict[str, Tensor],
) -> Tensor:
    grid = tuple(x.shape[2:])
    border = padding_of(op)
    if border:
        x = F.pad(x, [border] * (2 * len(grid)))

    def projected(letter: str) -> Tensor:
        if letter in op.weight.projections and letter in shared:
            return shared[letter]
        return project(op, letter, params, x)

    features = reads_features(op) or isinstance(op.weight.kernel, Shift)
    query = projected("q") if features else None
    same = not {"q", "k"} & set(op.weight.projections)
    key = (query if same else projected("k")) if features else None
    call = Call(op, params, grid, projected("v"), query, key, draw)
    y = choose(op)(call)
    if "o" in op.weight.projections:
        y = pointwise(y, params["out_weight"], params.get("out_bias"))
    return y
