"""Whether what `describe` says of a network is true: the support of gradients, next to every row.

A row's own words are compared with its module run alone, on what it was given in a run of the network; its field with
the network's input. Weights are random, in float64, and none is zero.

Shape legend: B batch, C channels, N positions.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nearfold.grammar import Basic
from nearfold.grammar.words import All, Block, Causal, Max, Mean, Row, Table, Window
from nearfold.recognise.ran import layers_of
from nearfold.recognise.report import Description, describe

SECOND = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d,
    nn.MaxPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
"""Classes whose channels are the second axis; of others they are the last one, or either."""
CONTEXTS = ("key_value_states", "encoder_hidden_states")


@dataclass
class Tally:
    """What was compared, and what was wrong.

    Attributes:
        words: rows whose path was compared with the gradient of their module.
        fields: rows whose receptive field was compared with the gradient of the network.
        tight: those of them whose field was reached, not only not exceeded.
        pointwise: layers without a row.
        left: what could not be compared, with the reason.
        wrong: rows that are not what they are said to be.
    """

    words: int = 0
    fields: int = 0
    tight: int = 0
    pointwise: int = 0
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, n) + getattr(other, n) for n in Tally.__dataclass_fields__))


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """A copy in float64 and evaluation, in which nothing is zero or the same for every channel."""
    torch.manual_seed(0)
    twin = copy.deepcopy(model).double().eval()
    for p in twin.parameters():
        if p.numel() and bool((p == p.flatten()[0]).all()):
            p.copy_(0.5 + torch.rand_like(p))
        p.requires_grad_(False)
    for module in twin.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_()
        if isinstance(module, nn.ReLU | nn.SiLU | nn.Hardswish | nn.ReLU6 | nn.LeakyReLU):
            module.inplace = False
    return twin


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


@dataclass
class Call:
    """Of a module: its arguments, and what it made."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Tensor

    @property
    def input(self) -> Tensor | None:
        """The first tensor of real numbers that it is given."""
        return next((t for t in tensors((self.args, self.kwargs)) if t.is_floating_point()), None)


def calls_of(twin: nn.Module, names: set[str], given: dict[str, Any] | Tensor) -> dict[str, Call]:
    """The first call of every module of these names, in one run that keeps what gradients need."""
    found: dict[str, Call] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
            out = tensors(made)
            if name not in found and out:
                found[name] = Call(args, kwargs, out[0])

        return hook

    hooks = [m.register_forward_hook(keep(n), with_kwargs=True) for n, m in twin.named_modules() if n in names]
    twin(**given) if isinstance(given, dict) else twin(given)
    for hook in hooks:
        hook.remove()
    return found


# --- one module alone


def support(
    module: nn.Module, call: Call, at: tuple[int, ...], axis: int, scale: float = 0.0, context: str | None = None
) -> Tensor | None:
    """Which entries of its input one position of its output depends on; None where it takes no real numbers.

    Args:
        module: alone.
        call: of it, in the network.
        at: position of the output.
        axis: of the output's channels.
        scale: other than 0: random numbers of this size instead of the input.
        context: the argument that is its input here; None: the first.
    """
    args, kwargs = tree_map(_fresh, (call.args, call.kwargs))
    origin = call.input if context is None else call.kwargs.get(context)
    if origin is None:
        return None
    x = (scale * torch.randn_like(origin) if scale else origin.detach().clone()).requires_grad_()
    args, kwargs = _tied(call.args, args, origin, x), _tied(call.kwargs, kwargs, origin, x)
    with torch.enable_grad():
        y = tensors(module(*args, **kwargs))[0]
    one, grad = y.movedim(axis, -1)[at], None
    if y.requires_grad:
        weighed = (one * torch.linspace(1, 2, one.numel(), dtype=y.dtype)).sum()
        (grad,) = torch.autograd.grad(weighed, x, allow_unused=True)
    return torch.zeros_like(x, dtype=torch.bool) if grad is None else grad != 0


def _fresh(value: Any) -> Any:
    """An argument as it was before the run: a tensor of its own, and no cache, which the run has filled."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return None if type(value).__name__.endswith("Cache") else value


def _tied(before: Any, after: Any, origin: Tensor, x: Tensor) -> Any:
    """The same arguments with ``x`` wherever ``origin`` was: what is one tensor as query and key stays one."""
    if isinstance(before, Tensor):
        return x if before is origin else after
    if isinstance(before, tuple | list):
        return type(before)(_tied(b, a, origin, x) for b, a in zip(before, after, strict=True))
    if isinstance(before, dict):
        return {k: _tied(before[k], after[k], origin, x) for k in before}
    return after


def axis_of(module: nn.Module, y: Tensor) -> int:
    return 1 if isinstance(module, SECOND) and y.dim() > 2 else -1


def middle(y: Tensor, axis: int) -> tuple[int, ...]:
    """The position in the middle, of the first input."""
    return (0, *(n // 2 for n in y.movedim(axis, -1).shape[1:-1]))


def tuples(value: Any, count: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * count


def window_reads(path: Window, grid: tuple[int, ...], at: tuple[int, ...]) -> list[set[int]]:
    """Per axis, the positions that the words say; written down here on its own."""
    reads = []
    for axis, n in enumerate(grid):
        size, stride, dilation = (tuples(v, len(grid))[axis] for v in (path.size, path.stride, path.dilation))
        before = dilation * (size - 1) // 2 if path.padding == "same" else tuples(path.padding, len(grid))[axis]
        places = {at[axis] * stride - before + dilation * j for j in range(size)}
        if path.mode == "reflect":
            places = {n - 1 - abs(n - 1 - abs(p)) for p in places}
        reads.append({p for p in places if 0 <= p < n})
    return reads


def block_reads(path: Block, grid: tuple[int, ...], at: tuple[int, ...]) -> list[set[int]]:
    reads = []
    for axis, n in enumerate(grid):
        size, shift = tuples(path.size, len(grid))[axis], tuples(path.shift, len(grid))[axis]
        shift = 0 if size >= n else shift
        home = (at[axis] - shift) // size
        reads.append({p for p in range(n) if (p - shift) // size == home})
    return reads


def check_words(row: Any, module: nn.Module, call: Call) -> str | None:
    """What is wrong with a row's path, shape or weight; empty where nothing is; None where it cannot be compared."""
    op = row.operation
    if not isinstance(op, Basic):
        return None
    context = None
    if op.needs_context:
        context = next((n for n in CONTEXTS if n in call.kwargs), None)
        if context is None:
            return None
    axis = axis_of(module, call.made)
    x = call.input
    if x is None or call.made.dim() < 2:
        return None
    if isinstance(op.weight.rho, Table):
        axis = 1  # positions are the last
    at = middle(call.made, axis)
    grad = support(module, call, at, axis, context=context)
    if grad is None:
        return None
    if isinstance(op.path, All) and isinstance(op.shape, Row):
        for scale in (1.0, 0.1):  # a gate that is closed, or a softmax that has decided, on one input is not on others
            grad = grad | support(module, call, at, axis, scale, context)
        if part := re.search(r"of (\d+) of its (\d+) positions", row.note):
            read = int(grad[0].all(axis).sum())
            return "" if read == int(part[1]) else f"{read} positions are read, {part[1]} are said"
        if bool(grad[0].all()):
            return ""
        if isinstance(op.weight.rho, Mean) and x.dim() == 4 and call.made.shape == x.shape:
            grad = grad.any(1, keepdim=True)  # a gate of neighbouring channels: of each position some are read
        return "" if bool(grad[0].all()) else f"not all of its input is read: {int(grad[0].sum())} of {grad[0].numel()}"
    where = grad.movedim(axis, -1).any(-1)
    if bool(where[1:].any()):
        return "it reads other inputs of the batch"
    where = where[0]
    if isinstance(op.path, Block) and x.dim() == 3:  # its caller has cut the map, and says with a mask what was shifted
        masked = any(t is not x and t.is_floating_point() for t in tensors((call.args, call.kwargs)))
        return "" if masked or bool(where.all()) else "not all of its block is read"
    if isinstance(op.path, All | Window) and isinstance(op.shape, Causal):
        said = torch.arange(len(where)) <= at[1]
        if isinstance(op.path, Window):
            said &= torch.arange(len(where)) > at[1] - tuples(op.path.size, 1)[0]
        read, meant = (t.nonzero().flatten().tolist() for t in (where, said))
        return "" if read == meant else f"{read} is read, {meant} is said"
    if not isinstance(op.path, Window | Block):
        return None
    grid = tuple(where.shape)
    if "zeros around it" in row.note:  # by as many as its size asks for: how far it looks is said, from where is not
        spread = [{p - int(w.min()) for p in w.tolist()} for w in where.nonzero(as_tuple=True)]
        wide = [
            s * d for s, d in zip((tuples(op.path.size, len(grid))), tuples(op.path.dilation, len(grid)), strict=True)
        ]
        return "" if all(max(s) < n for s, n in zip(spread, wide, strict=True)) else f"{spread} is read"
    read_by = window_reads if isinstance(op.path, Window) else block_reads
    reads = read_by(op.path, grid, at[1:])  # type: ignore[operator]
    said = torch.zeros(grid, dtype=torch.bool)
    for place in itertools.product(*reads):
        said[place] = True
    if bool((where & ~said).any()) or (not isinstance(op.weight.rho, Max) and not torch.equal(where, said)):
        return f"at {at[1:]} {where.nonzero().tolist()} is read, {said.nonzero().tolist()} is said"
    return ""


def check_pointwise(layer: Any, module: nn.Module, call: Call) -> str | None:
    """Whether one position is read for each that is made."""
    x, y = call.input, call.made
    if x is None or x.dim() < 3 or y.dim() != x.dim():
        return None
    axes = ((1, 1),) if isinstance(module, SECOND) else ((-1, -1), (1, 1), (-1, 1), (1, -1))  # of input and output
    axes = ((-1, -1),) if type(module) in (nn.Linear, nn.LayerNorm) else axes
    stride = 1
    if layer.match is not None and not layer.match.followed:
        stride = layer.match.operation.path.stride
    what = "nothing"
    for before, axis in axes:
        at = middle(y, axis)
        grad = support(module, call, at, axis)
        if grad is None:
            return None
        where = grad.movedim(before, -1).any(-1)
        m, n = y.movedim(axis, -1).shape[1:-1], where.shape[1:]
        home = tuple(
            i * s if s > 1 else i * b // a if a != b else i
            for i, s, a, b in zip(at[1:], tuples(stride, len(n)), m, n, strict=True)
        )
        where[(0, *home)] = False
        if not bool(where.any()):
            return ""
        what = f"{where.nonzero().tolist()[:9]}"
    return f"besides its own, it reads {what}"


# --- in the network


def check_field(row: Any, y: Tensor, axis: int, x: Tensor, grid: tuple[int, ...]) -> tuple[str, bool]:
    """What is wrong with a field, and whether it is reached."""
    at = middle(y, axis)
    one = y.movedim(axis, -1)[at]
    (grad,) = torch.autograd.grad(
        (one * torch.linspace(1, 2, one.numel(), dtype=y.dtype)).sum(), x, retain_graph=True, allow_unused=True
    )
    if grad is None:
        return "", False
    sizes = [int(n) for n in row.field.removeprefix("<=").split("x")]
    sizes = sizes * len(grid) if len(sizes) == 1 else sizes
    reached = True
    there = (grad[0] != 0).any(0) if x.dim() > 2 else grad[0] != 0
    for a, where in enumerate(there.nonzero(as_tuple=True)):
        true = 0 if not where.numel() else int(where.max() - where.min()) + 1
        if true > sizes[a]:
            return f"field {row.field} is said, along axis {a} it is {true}", False
        reached &= true == min(sizes[a], grid[a])
    return "", reached


def check(
    model: nn.Module, size: tuple[int, ...] | None, inputs: dict[str, Any] | None = None, most: int = 4
) -> tuple[Description, Tally]:
    """Compare all rows of a network, its pointwise layers (one of each kind and shape), and so many of its fields."""
    found, tally = describe(model, size, inputs), Tally()
    layers, _ = layers_of(model, size, inputs)
    plain = {layer.name: layer for layer in layers if layer.pointwise}
    rows = {row.name: row for row in found.rows}
    twin = randomised(model)
    named = dict(twin.named_modules())
    generator = torch.Generator().manual_seed(1)
    given: Any = None
    if size is not None:
        given = x = torch.randn(1, *size, generator=generator, dtype=torch.float64).requires_grad_()
    else:
        given = {
            n: torch.randn(t.shape, generator=generator, dtype=torch.float64)
            if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in (inputs or {}).items()
        }  # fmt: skip
        x = next(t for t in given.values() if isinstance(t, Tensor))
        if x.is_floating_point():
            x.requires_grad_()
    calls = calls_of(twin, set(rows) | set(plain), given)
    for name, row in rows.items():
        if name not in calls:
            tally.left.append(f"{name}: it is not one module")
        else:
            wrong = check_words(row, named[name], calls[name])
            tally.words += wrong is not None
            if wrong is None:
                tally.left.append(f"{name} ({row.kind}): {row.operation}")
            elif wrong:
                tally.wrong.append(f"{name} ({row.kind}): {row.operation}: {wrong}")
    done = set()
    for name, layer in plain.items():
        if name not in calls:
            continue
        key = layer.kind, tuple(calls[name].made.shape), str(layer.match and layer.match.operation)
        if key in done:
            continue
        done.add(key)
        wrong = check_pointwise(layer, named[name], calls[name])
        tally.pointwise += wrong is not None
        if wrong:
            tally.wrong.append(f"{name} ({layer.kind}), pointwise: {wrong}")
    stated = [row for row in rows.values() if row.field[-1:].isdigit() and row.name in calls] if x.requires_grad else []
    step = max(1, math.ceil(len(stated) / most))
    for row in sorted({id(r): r for r in (*stated[::step], *stated[-1:])}.values(), key=lambda r: rows[r.name].name):
        y = calls[row.name].made
        if y.requires_grad and y.dim() > 2:
            wrong, reached = check_field(row, y, axis_of(named[row.name], y), x, tuple(x.shape[2:] or x.shape[1:]))
            tally.fields += 1
            tally.tight += reached
            if wrong:
                tally.wrong.append(f"{row.name} ({row.kind}): {wrong}")
    return found, tally
