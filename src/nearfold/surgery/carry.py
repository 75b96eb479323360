"""Weights from one operation into another: what of them means the same there, and whether the output stays the same.

Shape legend: O output channels, C input channels of a group, S slots, k ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from nearfold.grammar import Basic, Branch, Operation, Sum
from nearfold.grammar.complexity import features_share
from nearfold.grammar.operation import GATE
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import All, AllCandidates, Dense, Kernel, Nearest, Softmax, Window
from nearfold.lower.geometry import WindowGeometry
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import SHARED, bias_reach, parameters

GRADES = ("exact", "approximate", "new weights")
LETTERS = ("query", "key", "value", "out")


@dataclass(frozen=True)
class Carried:
    """What of a layer's weights another operation takes over.

    Attributes:
        tensors: values of the new operation's parameters, by name; those without one start as new layers do.
        grade: exact (the output stays the same), approximate (weights that mean something similar), or new weights.
        notes: why it is not exact, or up to where it is.
        limit: exact for grids of at most so many positions; None: of any size.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    grade: str = "new weights"
    notes: tuple[str, ...] = ()
    limit: int | None = None

    def weaker(self, note: str) -> Carried:
        """The same weights, and a reason why the output is not the same."""
        return replace(self, grade=max(self.grade, "approximate", key=GRADES.index), notes=(*self.notes, note))

    def at(self, positions: int | None) -> Carried:
        """The grade on a grid of so many positions; None: it is not known how many."""
        if self.limit is None or self.grade != "exact":
            return self
        if positions is not None and positions <= self.limit:
            return replace(self, notes=(*self.notes, f"exact up to {self.limit} positions; there are {positions}"))
        return self.weaker(f"exact only up to {self.limit} positions")


@dataclass(frozen=True)
class Weights:
    """The weights of a layer, in the words: those of ``operation`` by the names of `nearfold.lower.parameters`."""

    operation: Basic
    tensors: dict[str, Tensor]
    in_channels: int
    out_channels: int
    ndim: int

    def rows(self, first: int, last: int) -> Weights | None:
        """The part that makes some of the output channels; None where there is none."""
        if (first, last) == (0, self.out_channels):
            return self
        kernel = self.operation.weight.kernel
        if kernel != Dense() or self.operation.weight.projections:
            return None
        own = {name: t[first:last] for name, t in self.tensors.items()}
        return replace(self, tensors=own, out_channels=last - first)


def carry(source: Weights, target: Operation) -> Carried:
    """The weights of a layer as those of another operation between the same channels.

    >>> from nearfold import parse
    >>> conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    >>> own = Weights(parse("window(3) | box | kernel"), dict(conv.named_parameters()), 4, 8, 2)
    >>> for text in ("window(5) | box | kernel", "nearest(9, cosine, self) | ranked | kernel", "all | row | softmax"):
    ...     print(carry(own, parse(text)).grade)
    exact
    approximate
    new weights
    """
    if isinstance(target, Sum):
        return _into_sum(source, target)
    if isinstance(target, Branch):
        return _into_branch(source, target)
    assert isinstance(target, Basic)
    if target == source.operation:
        return Carried(dict(source.tensors), "exact")
    return _from_convolution(source, target) if _convolves(source.operation) else _from_attention(source, target)


def _convolves(op: Basic) -> bool:
    """Whether an operation is a convolution."""
    kernel = meaning(op.weight.kernel)
    maps = kernel.groups(op.weight.kernel, 1) is not None and not kernel.late_bias
    plain = maps and not op.weight.projections and not getattr(op.weight.kernel, "coordinates", False)
    return plain and meaning(op.weight.rho).first == 1 and isinstance(op.path, Window) and op.shape.whole


# --- combinators


def _into_sum(source: Weights, target: Sum) -> Carried:
    """One term takes the output over, the others start at rate zero."""
    found = [carry(source, term) for term in target.operands]
    chosen = min(range(len(found)), key=lambda i: GRADES.index(found[i].grade))
    result = replace(found[chosen], tensors={})
    specs = parameters(target, source.in_channels, source.out_channels, source.ndim)
    tensors: dict[str, Tensor] = {}
    order = [chosen, *(i for i in range(len(found)) if i != chosen)]
    for i in order:
        for name, tensor in found[i].tensors.items():
            own = f"{i}.{name}"
            shared = own not in specs and name in SHARED
            tensors.setdefault(name if shared else own, tensor)
    rates = []
    for i, rate in enumerate(target.rates):
        if rate == GATE:
            result = result.weaker(f"term {i + 1} has a gate, which is neither one nor zero")
        elif isinstance(rate, str):
            rates.append(1.0 if i == chosen else 0.0)
        elif i == chosen and rate not in (None, 1.0):
            result = result.weaker(f"the term that takes the weights over is multiplied by {rate:g}")
        elif i != chosen and rate != 0.0:
            result = result.weaker(f"term {i + 1} has no rate to start at zero: write name*(...)")
    if result.grade != "new weights" and rates:
        tensors["rates"] = torch.tensor(rates)
    return replace(result, tensors=tensors)


def _into_branch(source: Weights, target: Branch) -> Carried:
    """Each operand takes over the channels it makes; a mixing map starts as the identity."""
    tensors: dict[str, Tensor] = {}
    result, first = Carried(grade="exact"), 0
    reads = target.inputs(source.in_channels)
    for i, (operand, channels) in enumerate(zip(target.operands, target.shares(source.out_channels), strict=True)):
        if not channels:
            continue
        part = source.rows(first, first + channels)
        first += channels
        all_read = range(source.in_channels)[reads[i]] == range(source.in_channels)
        found = carry(part, operand) if part is not None and all_read else Carried()
        tensors |= {f"{i}.{name}": tensor for name, tensor in found.tensors.items()}
        limits = [n for n in (result.limit, found.limit) if n is not None]
        grade = max(result.grade, found.grade, key=GRADES.index)
        result = replace(result, grade=grade, notes=result.notes + found.notes, limit=min(limits, default=None))
    if target.mix and result.grade != "new weights":
        tensors["mix_weight"] = torch.eye(source.out_channels)
        tensors["mix_bias"] = torch.zeros(source.out_channels)
    return replace(result, tensors=tensors)


# --- from a convolution


def _from_convolution(source: Weights, target: Basic) -> Carried:
    rho, kernel = target.weight.rho, target.weight.kernel
    weight = _kernel(source, kernel)
    if weight is None or not meaning(target.path).slots or target.weight.projections:
        return Carried()
    first = meaning(rho).start(target, source.ndim)
    moved = _in_slots(source, target, weight if first is None else weight / first)
    tensors = {"weight": moved.repeat(meaning(kernel).copies(kernel), *(1,) * (moved.dim() - 1))}
    if "bias" in source.tensors:
        tensors["bias"] = source.tensors["bias"]
    found = Carried(tensors, "exact")
    if first is None:
        found = found.weaker(f"slots are weighted by {rho.word}")
    for note in _differences(source, target):
        found = found.weaker(note)
    return found


def _kernel(source: Weights, kernel: Kernel | None) -> Tensor | None:
    """The kernel (O, C, S) in the groups of another one; None where they do not go together."""
    own, weight_OCS = source.operation.weight.kernel, source.tensors["weight"].flatten(2)
    groups = meaning(own).groups(own, source.in_channels)
    wanted = meaning(kernel).groups(kernel, source.in_channels)
    if groups is None or wanted is None or getattr(kernel, "coordinates", False):
        return None
    if not meaning(kernel).maps_channels:
        return weight_OCS if groups == source.in_channels == source.out_channels else None
    if groups == wanted:
        return weight_OCS
    if groups % wanted:
        return None
    # fewer groups: the kernel that reads all channels of the larger group, zero where it did not before
    O, C, S = weight_OCS.shape
    wide = weight_OCS.new_zeros(wanted, groups // wanted, O // groups, groups // wanted, C, S)
    blocks = weight_OCS.reshape(wanted, groups // wanted, O // groups, C, S)
    for g in range(groups // wanted):
        wide[:, g, :, g] = blocks[:, g]
    return wide.reshape(O, groups // wanted * C, S)


def _in_slots(source: Weights, target: Basic, weight_OCS: Tensor) -> Tensor:
    """A kernel over the source's window as one over the target's slots."""
    size = as_tuple(source.operation.path.size, source.ndim, "size")  # type: ignore[attr-defined]
    wanted = target.path.slot_shape(source.ndim)
    if meaning(target.path).slots == "rank":
        metric = getattr(target.path.similarity, "metric", "euclidean")
        order = list(range(math.prod(size))) if target.shape.raster else _by_distance(size, metric)
        return _fit(weight_OCS[:, :, order], *wanted)
    return _embed(weight_OCS.unflatten(2, size), wanted)


def _by_distance(size: tuple[int, ...], metric: str) -> list[int]:
    """The slots of a window, the middle one first: the order in which `ranked` lists positions in space."""
    at = torch.cartesian_prod(*(torch.arange(n) - n // 2 for n in size)).reshape(-1, len(size))
    distance = at.abs().amax(1) if metric == "chebyshev" else at.square().sum(1)
    return torch.argsort(distance, stable=True).tolist()


def _fit(weight_OCS: Tensor, k: int) -> Tensor:
    """The first k slots; zeros where there are fewer."""
    missing = k - weight_OCS.shape[2]
    return torch.nn.functional.pad(weight_OCS, (0, missing)) if missing > 0 else weight_OCS[:, :, :k]


def _embed(weight: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """In the middle of a larger window, or the middle of itself."""
    pads = [n for have, want in list(zip(weight.shape[2:], wanted, strict=True))[::-1] for n in _margins(have, want)]
    return torch.nn.functional.pad(weight, pads)


def _margins(have: int, want: int) -> tuple[int, int]:
    before = (want - 1) // 2 - (have - 1) // 2
    return before, want - have - before


def _differences(source: Weights, target: Basic) -> list[str]:
    """Why a convolution and an operation that has its kernel do not give the same output."""
    own = cast(Window, source.operation.path)
    if meaning(target.path).slots == "rank":
        return _differences_in_space(source, own, target)
    path, notes = target.path, []
    if not target.shape.whole:
        notes.append(f"shape {target.shape} leaves slots out")
    mode = getattr(path, "mode", "zeros")
    if mode != own.mode:
        notes.append(f"the border is {mode}, and was {own.mode}")
    ours, theirs = WindowGeometry.of(source.operation, source.ndim), WindowGeometry.of(target, source.ndim)
    if ours.stride != theirs.stride:
        notes.append(f"stride {theirs.stride}, and was {ours.stride}")
    for axis in range(source.ndim):
        have, want = ours.size[axis], theirs.size[axis]
        step = theirs.dilation[axis]
        before, after = _margins(have, want)
        if have > 1 and step != ours.dilation[axis]:
            notes.append(f"dilation {theirs.dilation}, and was {ours.dilation}")
        elif before < 0 or after < 0:
            notes.append(f"a window of {theirs.size} cuts one of {ours.size}")
        elif (theirs.before[axis], theirs.after[axis]) != (
            ours.before[axis] + before * step,
            ours.after[axis] + after * step,
        ):
            notes.append("another padding")
        else:
            continue
        break
    return notes


def _differences_in_space(source: Weights, own: Window, target: Basic) -> list[str]:
    path = cast(Nearest, target.path)
    near, size = path.similarity, as_tuple(own.size, source.ndim, "size")
    dilation = set(as_tuple(own.dilation, source.ndim, "dilation"))
    if features_share(near) > 0 or getattr(near, "unit", False):
        return ["neighbours in features, by rank, where there were neighbours in space"]
    side, step = size[0], dilation.pop() if len(dilation) == 1 else 0
    reach = (side - 1) // 2
    corners = near.reduced == "chebyshev" or source.ndim * reach**2 < (reach + 1) ** 2  # nearer than what is outside
    square = len(set(size)) == 1 and side % 2 == 1 and path.k == side**source.ndim and corners
    geometry = WindowGeometry.of(source.operation, source.ndim)
    checks = {
        f"the {path.k} nearest positions are not the window {own}": square
        and step == near.dilation
        and path.candidates == AllCandidates()
        and path.recall == 1.0,
        f"shape {target.shape} leaves slots out": target.shape.whole,
        f"the border: padding={reach * step} and zeros make it the same": own.mode == "zeros"
        and path.padding == reach * step
        and set(geometry.before) == set(geometry.after) == {path.padding},
        "another stride": as_tuple(path.stride, source.ndim, "stride") == geometry.stride,
    }
    return [note for note, same in checks.items() if not same]


# --- from attention


def _from_attention(source: Weights, target: Basic) -> Carried:
    own, rho = source.operation, target.weight.rho
    softmax = isinstance(own.weight.rho, Softmax) and rho.needs_score
    if not softmax or set(own.weight.projections) != set(target.weight.projections):
        return Carried()
    if rho.kv != own.weight.rho.kv or own.cross != target.cross:
        return Carried()
    kernel = _plain_kernel(source, target)
    if kernel is None:
        return Carried()
    names = [f"{letter}_{part}" for letter in LETTERS for part in ("weight", "bias")]
    found = Carried({n: source.tensors[n] for n in names if n in source.tensors} | kernel, "exact")
    table = source.tensors.get("relative_bias")
    if table is not None and target.path.similarity.bias == "table":
        ndim = table.dim() - 1
        if bias_reach(own, ndim) == bias_reach(target, ndim):
            found = replace(found, tensors=found.tensors | {"relative_bias": table})
    if rho.heads != own.weight.heads:
        found = found.weaker(f"{rho.heads} heads, and there were {own.weight.heads}")
    if rho != replace(own.weight.rho, heads=rho.heads, project=rho.project):  # type: ignore[type-var]
        found = found.weaker(f"weighted by {rho}, and it was {own.weight.rho}")
    path = target.path
    if path == own.path:
        return found if target.shape == own.shape else found.weaker(f"shape {target.shape}, and it was {own.shape}")
    near, k = own.path.similarity, getattr(path, "k", 0)
    everywhere = own.path == All(near, cross=own.cross)
    alike = k > 0 and path == Nearest(k, near, cross=target.cross)
    shaped = target.shape.causal if own.shape.causal else own.shape.whole and target.shape.whole
    if everywhere and alike and shaped:
        return replace(found, limit=k)
    return found.weaker(f"it looks at {path}, and looked at {own.path}")


def _plain_kernel(source: Weights, target: Basic) -> dict[str, Tensor] | None:
    """A kernel after attention that changes nothing: one in every slot. None where there is no such thing."""
    if target.weight.kernel is None:
        return {}
    specs = parameters(target, source.in_channels, source.out_channels, source.ndim, bias=False)
    return meaning(target.weight.kernel).neutral(target, specs)
