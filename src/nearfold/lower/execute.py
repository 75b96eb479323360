"""Run an operation: combinators here, `Basic` operations on the backend that `lower` chose.

All that follows from sizes is settled in a step, made once; calling it is tensor work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic, Branch, Operation, Sum
from nearfold.grammar.operation import GATE
from nearfold.kernels.select import wide
from nearfold.lower.call import Call, Run, pointwise, project
from nearfold.lower.extent import narrowed
from nearfold.lower.frame import Frame, Source, frame
from nearfold.lower.geometry import crop, pads_input
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import LETTERS, operand

Choose = Callable[[Basic, Frame], Run]
Given = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool]
"""What a call brings beside x: (draw, context, mask, keep, and whether searches compare float32), as in `execute`."""
Body = Callable[[dict[str, Tensor], Tensor, Given, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What a step is made for: channels in and out, the grid, a second input's (or its maps'), whether it draws."""

    channels: int
    out_channels: int
    grid: tuple[int, ...]
    source: Source = ()
    drawing: bool = False


@dataclass(frozen=True)
class Step:
    """An operation for some sizes: ``run`` (parameters, x, given, projections shared by a sum) -> (B, O, *out_grid)."""

    out_grid: tuple[int, ...]
    run: Body


def execute(
    op: Operation,
    params: dict[str, Tensor],
    x: Tensor,
    choose: Choose,
    draw: Tensor | None = None,
    out_channels: int | None = None,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """x (B, C, *grid) -> (B, O, *out).

    ``choose`` says what runs each `Basic` operation, ``out_channels`` is O (default C), ``draw`` (seed, draws) of
    random candidates, ``context`` the input that `cross` paths read, ``mask`` the keys that each query may read,
    ``keep`` (B, N) which positions are there: the others are zero in x already.
    """
    C = x.shape[1]
    source = () if context is None else tuple(context.shape[2:])
    sizes = Sizes(C, C if out_channels is None else out_channels, tuple(x.shape[2:]), source, draw is not None)
    return step(op, sizes, choose).run(params, x, (draw, context, mask, keep, False), {})


def step(op: Operation, sizes: Sizes, choose: Choose) -> Step:
    """An operation, settled for these sizes.

    Raises:
        ValueError: where its parts have different output grids, or a window does not fit.
    """
    if isinstance(op, Basic):
        return _basic(op, sizes, choose)
    return _branch(op, sizes, choose) if isinstance(op, Branch) else _sum(op, sizes, choose)


def _branch(op: Operation, sizes: Sizes, choose: Choose) -> Step:
    assert isinstance(op, Branch)
    sides = zip((op.first, op.second), op.shares(sizes.out_channels), op.inputs(sizes.channels), strict=True)
    parts = []
    for i, (part, made, read) in enumerate(sides):
        if made:
            channels = len(range(sizes.channels)[read])
            parts.append((i, read, step(part, Sizes(channels, made, sizes.grid, sizes.source, sizes.drawing), choose)))
    out_grid, split, mix = _one_grid(op, [part for _, _, part in parts]), op.split, op.mix

    def run(params: dict[str, Tensor], x: Tensor, given: Given, shared: dict[str, Tensor]) -> Tensor:
        each = [part.run(operand(params, i), x[:, read] if split else x, given, {}) for i, read, part in parts]
        y = torch.cat(each, 1) if len(each) > 1 else each[0]
        return pointwise(y, params["mix_weight"], params.get("mix_bias"), True) if mix else y

    return Step(out_grid, run)


def _sum(op: Operation, sizes: Sizes, choose: Choose) -> Step:
    assert isinstance(op, Sum)
    parts = [step(term, sizes, choose) for _, term in op.terms]
    out_grid = _one_grid(op, parts)
    if op.gates and out_grid != sizes.grid:
        raise ValueError(
            f"a gate is made at every position of the input, {sizes.grid}, and the operands make {out_grid}: leave "
            f"their strides out, or use a rate with a name of its own; got {op}"
        )
    # a projection hoisted into the sum is computed once, for every operand that asks for it, unless one projects its
    # own padded input; keys and values of a second input are each operand's own
    bordered = any(pads_input(part, sizes.grid) for part in op.parts)
    hoisted = [] if bordered else ["q"] if op.needs_context else ["q", "k", "v"]
    planes = all(meaning(part.path).planes for part in op.parts)
    searching = [i for i, (_, term) in enumerate(op.terms) if any(part.path.searches for part in term.parts)]

    def run(params: dict[str, Tensor], x: Tensor, given: Given, shared: dict[str, Tensor]) -> Tensor:
        there = [c for c in hoisted if f"{LETTERS[c]}_weight" in params]
        made = _hoisted(there, params, x, planes)
        precise = {c: compared(params, c, x) for c in there if c != "v"} if given[4] and searching else {}
        total: Tensor | None = None
        for i, (factor, part) in enumerate(zip(factors(op, params, x), parts, strict=True)):
            shared = made | precise if i in searching else made
            mine = {c: t for c, t in shared.items() if f"{i}.{LETTERS[c]}_weight" not in params}
            y = part.run(operand(params, i), x, given, mine)
            if factor is not None:
                y = y * (factor.to(y.dtype) if isinstance(factor, Tensor) else factor)
            total = y if total is None else total + y
        assert total is not None
        return total

    return Step(out_grid, run)


def factors(op: Operation, params: dict[str, Tensor], x: Tensor) -> list[Tensor | float | None]:
    """What each operand of a sum is multiplied by: a number, a learned one, a gate (B, 1, *grid), or None, for one."""
    learned = iter(params["rates"].unbind()) if "rates" in params else iter(())
    gates: Iterator[Tensor] = iter(())
    if "gate_weight" in params:
        gates = iter(torch.sigmoid(pointwise(x, params["gate_weight"], params.get("gate_bias"), True)).split(1, 1))
    return [next(gates) if rate == GATE else next(learned) if isinstance(rate, str) else rate for rate in op.rates]


def _hoisted(letters: list[str], params: dict[str, Tensor], x: Tensor, planes: bool) -> dict[str, Tensor]:
    """The projections of a sum, by their letters: as maps they are one product."""
    weights = [params[f"{LETTERS[c]}_weight"] for c in letters]
    biases = [params.get(f"{LETTERS[c]}_bias") for c in letters]
    alike = len({b is None for b in biases}) == 1
    if len(letters) > 1 and planes and alike and x.is_contiguous():
        bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]
        y = pointwise(x, torch.cat(weights), bias, True)
        return dict(zip(letters, y.split([len(w) for w in weights], 1), strict=True))
    each = (pointwise(x, w, b, planes) for w, b in zip(weights, biases, strict=True))
    return dict(zip(letters, each, strict=True))


def compared(params: dict[str, Tensor], letter: str, x: Tensor) -> Tensor:
    """A projection of queries or keys in float32 at least, whatever autocast says: rounded, near ones change places."""
    names = f"{LETTERS[letter]}_weight", f"{LETTERS[letter]}_bias"
    weight, bias = (None if (t := params.get(name)) is None else wide(t) for name in names)
    assert weight is not None
    with torch.autocast(x.device.type, enabled=False):
        return pointwise(wide(x), weight, bias)


def _one_grid(op: Operation, parts: list[Step]) -> tuple[int, ...]:
    grids = [part.out_grid for part in parts]
    if any(g != grids[0] for g in grids):
        sizes = " and ".join(map(str, grids))
        raise ValueError(f"the parts must have one output grid, got {sizes} (do their strides agree?): {op}")
    return grids[0]


def _shared_heads(y: Tensor, groups: int, heads: int) -> Tensor:
    """A copy for each query head that shares a key head: O(N C) numbers, as many as the queries. Rows of channels."""
    rows_BNC = y.flatten(2).transpose(1, 2)
    B, N, C = rows_BNC.shape
    each = rows_BNC.unflatten(2, (groups, 1, C // groups)).expand(-1, -1, -1, heads // groups, -1)
    return each.reshape(B, N, C // groups * heads).transpose(1, 2).unflatten(2, y.shape[2:])


def _hidden(
    at: Frame, keep: Tensor, value: Tensor, query: Tensor | None, key: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Which positions of the padded grid are there (B, N), and value, query and key with zeros for the others."""
    if at.added:  # zero inputs that a path adds are read like any other
        keep = F.pad(keep.unflatten(1, at.inner or tuple(n - 2 * at.padding for n in at.padded)), at.added, value=True)
    lost = ~keep.view(keep.shape[0], 1, *value.shape[2:])
    same = key is query
    query = query if query is None or cross else query.masked_fill(lost, 0)
    key = query if same else None if key is None else key.masked_fill(lost, 0)
    return keep.flatten(1), value.masked_fill(lost, 0), query, key


def _basic(op: Operation, sizes: Sizes, choose: Choose) -> Step:
    assert isinstance(op, Basic)
    at = frame(op, sizes.grid, sizes.source if op.cross else (), sizes.drawing)
    backend, projections, heads, ndim = choose(op, at), op.weight.projections, op.weight.heads, len(at.grid)
    planes, cross = meaning(op.path).planes, op.cross

    def alone(params: dict[str, Tensor], x: Tensor, given: Given, shared: dict[str, Tensor]) -> Tensor:
        """With nothing around the backend."""
        return backend(Call(at, params, x, None, None, x, given[0], given[2], given[3]))

    def run(params: dict[str, Tensor], x: Tensor, given: Given, shared: dict[str, Tensor]) -> Tensor:
        draw, context, mask, keep, precise = given
        if cross and context is None:
            raise ValueError(f"{op}: keys and values come from a second input; call it with context=(B, C, *grid)")
        read = context if cross and context is not None else x
        if at.added:
            x = read = F.pad(x, at.added)

        def projected(letter: str) -> Tensor:
            source = x if letter == "q" else read
            if letter in projections and letter in shared:
                y = shared[letter]
            elif precise and letter in projections and letter != "v" and op.path.searches:
                y = compared(params, letter, source)
            else:
                y = project(op, letter, params, source)
            return y if letter == "q" or at.kv is None else _shared_heads(y, at.kv, heads)

        query = projected("q") if at.features else None
        key = (query if at.same else projected("k")) if at.features else None
        value, own = projected("v"), narrowed(op, at.op, params, ndim)
        if keep is not None:
            keep, value, query, key = _hidden(at, keep, value, query, key, cross)
        y = backend(Call(at, own, value, query, key, x, draw, mask, keep))
        if at.inner:
            y = crop(y, [0] * ndim, at.inner)
        if "o" in projections:
            y = pointwise(y, params["out_weight"], params.get("out_bias"), planes)
        return y

    # what is not there is zero in x, and only a projection's bias changes that
    plain = not (projections or at.added or at.features or cross or at.kv) and at.op is op
    return Step(at.inner or at.out_grid, alone if plain else run)
