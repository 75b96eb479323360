"""Walking the spectrum: lambda, k, branch ratio and candidates that change while a network is trained."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nearfold.grammar import Basic, Branch, Operation
from nearfold.grammar.word import with_arguments
from nearfold.grammar.words import Random
from nearfold.nn.mixer import Mixer

Range = tuple[float, float]
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "step": lambda t: float(t >= 0.5),
}
"""From the share of the way that is done, 0 to 1, to the share of the change."""


def _blend(op: Basic, lam: float) -> Basic | None:
    near = op.path.similarity
    if not hasattr(near, "lam") or near.learned:
        return None
    return dataclasses.replace(op, path=with_arguments(op.path, similarity=with_arguments(near, lam=lam)))


def _neighbours(op: Basic, k: float) -> Basic | None:
    return dataclasses.replace(op, path=with_arguments(op.path, k=round(k))) if hasattr(op.path, "k") else None


def _candidates(op: Basic, r: float) -> Basic | None:
    found = getattr(op.path, "candidates", None)
    if found is None or found.word not in ("all", "random"):
        return None
    return dataclasses.replace(op, path=with_arguments(op.path, candidates=Random(round(r))))


KNOBS: dict[str, Callable[[Basic, float], Basic | None]] = {"lam": _blend, "k": _neighbours, "candidates": _candidates}
"""What is changed inside a `Basic` operation, None where it has no such thing; ``ratio`` is a branch's own."""


def changed(op: Operation, **values: float) -> Operation:
    """An operation with other values of ``lam``, ``k``, ``ratio`` and ``candidates``, wherever it has them.

    Raises:
        ValueError: for an unknown name, a value that the words refuse, or where the operation has no such thing.

    >>> from nearfold import parse
    >>> print(changed(parse("branch(0.5, nearest(9, cosine) | ranked | kernel, all | row | softmax)"), ratio=0, k=4))
    branch(0.0, nearest(4, cosine) | ranked | kernel, all | row | softmax)
    """
    for name, value in values.items():
        if name not in (*KNOBS, "ratio"):
            raise ValueError(f"{name}: what changes is one of ratio, {', '.join(KNOBS)}")
        if not has(op, name):
            raise ValueError(f"{op} has no {name} to change")
        op = _changed(op, name, value)
    return op


def has(op: Operation, name: str) -> bool:
    """Whether an operation has a value of this name."""
    if name == "ratio":
        return isinstance(op, Branch) or any(has(operand, name) for operand in op.operands)
    return name in KNOBS and any(KNOBS[name](part, 1.0) is not None for part in op.parts)


def _changed(op: Operation, name: str, value: float) -> Operation:
    return _with_ratio(op, value) if name == "ratio" else op.map(lambda part: KNOBS[name](part, value) or part)


def _with_ratio(op: Operation, ratio: float) -> Operation:
    op = op.combine(tuple(_with_ratio(operand, ratio) for operand in op.operands))
    return dataclasses.replace(op, ratio=ratio) if isinstance(op, Branch) else op


class SpectrumSchedule:
    """Moves layers along the spectrum, one call of `step` after every optimizer step.

    Args:
        model: its `Mixer` layers are moved. They get room for both ends at once: make the schedule before the
            optimizer.
        steps: from the first value to the last.
        ranges: by name, (first, last): ``lam`` of `blend`, ``k`` of `nearest`, ``ratio`` of `branch`, ``candidates``
            drawn at random. Or by a shell pattern for layers' names, such as {"layer4.*": {"lam": (0, 0.5)}}: every
            layer follows the first pattern that it matches.
        shape: linear, cosine (slow at both ends) or step (all at half the way).
        wait: steps before anything moves.
        every: steps between changes. Under torch.compile every new value is compiled anew: make it an epoch's.

    A checkpoint of the weights alone does not know how far the operation is: save `state_dict` with the model's, and
    load both. While a branch's ratio is 0 or 1, the weights of the half that makes no channel get no gradient; DDP then
    needs ``find_unused_parameters=True``.

    Raises:
        ValueError: for a layer that cannot hold both ends, a pattern or a name that fits no layer, a wrong value.

    >>> layer = Mixer("nearest(9, blend(0), self) | ranked | kernel", 4)
    >>> schedule = SpectrumSchedule(nn.Sequential(layer), {"lam": (0, 1)}, steps=4)
    >>> for _ in range(3):
    ...     schedule.step()
    >>> print(layer.operation.path.similarity)
    blend(0.75)
    """

    def __init__(
        self,
        model: nn.Module,
        ranges: Mapping[str, Range | Mapping[str, Range]],
        steps: int,
        *,
        shape: str = "linear",
        wait: int = 0,
        every: int = 1,
    ) -> None:
        if shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
        for name, value, least in (("steps", steps, 1), ("wait", wait, 0), ("every", every, 1)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.steps, self.shape, self.wait, self.every = steps, shape, wait, every
        self.done = 0
        self._moved = _assigned(model, ranges)
        plan = {"steps": steps, "shape": shape, "wait": wait, "every": every}
        self.plan: dict[str, Any] = plan | {
            name: {k: list(r) for k, r in own.items()} for name, (_, own) in self._moved.items()
        }
        for name, (layer, own) in self._moved.items():
            if shape != "step" and "ratio" in own:
                _require_passable(name, layer, *own["ratio"])
            layer.reserve(*(changed(layer.operation, **{n: r[end] for n, r in own.items()}) for end in (0, 1)))
        self._apply()

    def step(self) -> None:
        """One optimizer step was done."""
        self.done += 1
        if self.done % self.every == 0:
            self._apply()

    @property
    def share(self) -> float:
        """How much of the change is done, 0 to 1."""
        at = self.done // self.every * self.every
        return SHAPES[self.shape](min(max((at - self.wait) / self.steps, 0.0), 1.0))

    def values(self) -> dict[str, dict[str, float]]:
        """The values of the moment, by layer and name."""
        return {
            layer: {name: first + (last - first) * self.share for name, (first, last) in own.items()}
            for layer, (_, own) in self._moved.items()
        }

    def _apply(self) -> None:
        for name, values in self.values().items():
            layer = self._moved[name][0]
            layer.become(changed(layer.operation, **values))

    def follow(self, copy: nn.Module) -> None:
        """Put the layers of a copy of the model, such as one of averaged weights, where those of the model are."""
        for name, (layer, _) in self._moved.items():
            twin = copy.get_submodule(name)
            assert isinstance(twin, Mixer)
            twin.become(layer.operation)

    def state_dict(self) -> dict[str, Any]:
        """How far it is."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the layers change at once."""
        self.done = int(state["done"])
        self._apply()


def _assigned(
    model: nn.Module, ranges: Mapping[str, Range | Mapping[str, Range]]
) -> dict[str, tuple[Mixer, dict[str, Range]]]:
    """Which layers move, and what of them."""
    if not ranges:
        raise ValueError("ranges must say what changes, such as {'lam': (0, 1)}")
    by_layer = {p: r for p, r in ranges.items() if isinstance(r, Mapping)}
    if by_layer and len(by_layer) != len(ranges):
        raise ValueError("ranges are by name, or by layers' pattern and name; got a mixture")
    patterns: Mapping[str, Mapping[str, Range]] = by_layer or {"*": ranges}  # type: ignore[dict-item]
    moved: dict[str, tuple[Mixer, dict[str, Range]]] = {}
    used: set[tuple[str, str]] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Mixer):
            continue
        pattern = next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None:
            continue
        own = {knob: _range(knob, r) for knob, r in patterns[pattern].items() if has(module.operation, knob)}
        used |= {(pattern, knob) for knob in own}
        if own:
            moved[name] = module, own
    for pattern, wanted in patterns.items():
        missing = [knob for knob in wanted if (pattern, knob) not in used]
        if missing:
            raise ValueError(
                f"no Mixer of the model whose name matches {pattern!r} has {missing[0]!r} to change; what can change "
                f"is ratio, {', '.join(KNOBS)}, where the operation has it"
            )
    return moved


def _require_passable(name: str, layer: Mixer, first: float, last: float) -> None:
    """ValueError where a share of channels on the way is none that the operands can make: said now, not in training."""
    made = layer.made_channels
    for channels in range(int(made * min(first, last)), int(made * max(first, last)) + 1):
        try:
            layer.parameters_of(changed(layer.operation, ratio=(channels + 0.5) / made if channels < made else 1.0))
        except ValueError as error:
            raise ValueError(
                f"{name}: on its way from {first} to {last} the ratio gives one operand {channels} of {made} channels, "
                f"which it cannot make ({error}); use shape='step'"
            ) from error


def _range(name: str, given: Any) -> Range:
    try:
        first, last = (float(v) for v in given)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: wanted (first, last), two numbers; got {given!r}") from None
    return first, last
