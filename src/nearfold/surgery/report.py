"""What `convert` did, layer by layer, and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nearfold.look.derivative import evaluating
from nearfold.recognise.foreign import count
from nearfold.recognise.report import aligned
from nearfold.surgery.carry import GRADES
from nearfold.surgery.proof import difference, tensors


@dataclass(frozen=True)
class LayerOutcome:
    """What became of one layer.

    Attributes:
        name: dotted.
        layer: class of the old layer.
        status: replaced, kept or refused.
        operation: what the layer was, in the words.
        to: what it is now.
        grade: exact, approximate or new weights.
        reason: why it was kept or refused, or what is not the same.
        parameters: before.
        parameters_after: now.
        flops: before, for one input; None when no input size was given.
        flops_after: now.
    """

    name: str
    layer: str
    status: str
    operation: str = ""
    to: str = ""
    grade: str = ""
    reason: str = ""
    parameters: int = 0
    parameters_after: int | None = None
    flops: int | None = None
    flops_after: int | None = None


@dataclass(frozen=True)
class Change:
    """A row, the layer it is about, what stands in its place, and whether the two were compared."""

    row: LayerOutcome
    old: nn.Module
    new: nn.Module | None = None
    proven: bool = False


class Report:
    """What became of every layer; ``str()`` is a table.

    Attributes:
        rows: one a layer that mixes positions, in the model's order.
        exact: whether every replaced layer is.
        difference_seen: of the model's outputs before and after, over the largest; None where no inputs were given.
        unused: the rules that matched nothing.
    """

    def __init__(
        self, model: nn.Module, changes: tuple[Change, ...], flops: dict[str, int], unused: tuple[str, ...] = ()
    ) -> None:
        self._model, self._changes, self.unused = model, changes, unused
        self._before, self._after, self.applied = flops, {}, False  # type: dict[str, int], dict[str, int], bool
        self._parameters = self._parameters_after = count(model)
        self.difference_seen: float | None = None

    @property
    def rows(self) -> tuple[LayerOutcome, ...]:
        """One a layer that mixes positions, in the model's order."""
        return tuple(
            replace(c.row, flops=self._before.get(c.row.name), flops_after=self._after.get(c.row.name))
            for c in self._changes
        )

    @property
    def replaced(self) -> tuple[LayerOutcome, ...]:
        """The rows of the layers that were replaced."""
        return tuple(row for row in self.rows if row.status == "replaced")

    @property
    def exact(self) -> bool:
        """Whether the model's output is what it was: every layer that was replaced is exact, if any was."""
        return all(row.grade == "exact" for row in self.replaced)

    @property
    def standing(self) -> tuple[Change, ...]:
        """The changes that replace a layer."""
        return tuple(change for change in self._changes if change.new is not None)

    def refuse(self, reasons: dict[str, str]) -> None:
        """Keep layers after all, by name and reason, while the new ones are not in the model."""
        assert not self.applied
        self._changes = tuple(
            Change(
                replace(c.row, status="refused", to="", grade="", reason=reasons[c.row.name], parameters_after=None),
                c.old,
            )
            if c.new is not None and c.row.name in reasons
            else c
            for c in self._changes
        )

    def weaken(self, note: str, names: Iterable[str] | None = None) -> None:
        """Call layers (default: every one) approximate that are not exact after all."""
        chosen = {row.name for row in self.replaced} if names is None else set(names)

        def weaker(row: LayerOutcome) -> LayerOutcome:
            if row.name not in chosen or row.grade != "exact":
                return row
            return replace(row, grade="approximate", reason="; ".join(filter(None, (row.reason, note))))

        self._changes = tuple(replace(c, row=weaker(c.row)) for c in self._changes)

    def measured(self, difference: float, flops: dict[str, int]) -> None:
        """Note what the model's run with the new layers showed."""
        self.difference_seen, self._after = difference, flops

    def apply(self) -> None:
        """Put the new layers in (`convert` has done so; again after `undo`)."""
        if self.applied:
            raise ValueError("the new layers are in the model already")
        self._exchange({c.old: c.new for c in self.standing})
        self.applied = True
        self._parameters_after = count(self._model)

    def undo(self) -> None:
        """Put the old layers back, as they were; what the new ones have learned stays with them.

        Raises:
            ValueError: when that was done before, or somebody else has replaced a layer since.
        """
        if not self.applied:
            raise ValueError("the old layers are in the model already")
        self._exchange({c.new: c.old for c in self.standing})
        self.applied = False

    def _exchange(self, new: dict[Any, Any]) -> None:
        """Put other layers in the model, all or none: everywhere where the present ones are registered."""
        there = list(self._model.modules())
        gone = [type(old).__name__ for old in new if old not in set(there)]
        if gone:
            raise ValueError(f"{len(gone)} layers are no longer in the model ({gone[0]} ...); nothing was changed")
        places = [(parent, n, child) for parent in there for n, child in parent._modules.items() if child in new]
        modes = [(m, m.training) for layer in new.values() for m in layer.modules()]
        try:
            for parent, name, child in places:
                parent._modules[name] = new[child]
            for old, layer in new.items():
                if layer.training != old.training:  # the mode was changed since: only of what is not in both
                    for module in set(layer.modules()) - set(old.modules()):
                        module.training = old.training
        except BaseException:
            for parent, name, child in places:
                parent._modules[name] = child
            for module, mode in modes:
                module.training = mode
            raise

    @torch.no_grad()
    def difference(self, *args: Any, **kwargs: Any) -> float:
        """Largest difference of the model's outputs with the old and the new layers, over the largest old output.

        Args:
            args: a call's arguments; the model runs twice, in evaluation mode.
            kwargs: a call's named arguments.
        """
        with evaluating(self._model):
            new = tensors(self._model(*args, **kwargs))
            self.undo()
            try:
                old = tensors(self._model(*args, **kwargs))
            finally:
                self.apply()
        return max((difference(a, b) for a, b in zip(new, old, strict=True)), default=0.0)

    def __str__(self) -> str:
        lines = [f"{type(self._model).__name__}: {self._summary()}", ""]
        cells = [("layer", "was", "", "is now", "parameters", "FLOPs")]
        for row in self.rows:
            if row.status == "replaced":
                cells.append((row.name, row.operation, row.grade, row.to, *_counts(row)))
        if len(cells) > 1:
            lines += aligned(cells, left=len(cells[0]))
        for grade in (*GRADES, "kept", "refused"):
            reasons: dict[str, list[str]] = {}
            for row in self.rows:
                if row.reason and grade in (row.grade, row.status):
                    reasons.setdefault(row.reason, []).append(row.name)
            lines += [f"{grade}: {few(names)}: {reason}" for reason, names in reasons.items()]
        lines += [f"unused: no layer matches {rule}" for rule in self.unused]
        return "\n".join(lines)

    def _summary(self) -> str:
        count = {s: sum(r.status == s for r in self.rows) for s in ("replaced", "kept", "refused")}
        text = ", ".join(f"{n} {status}" for status, n in count.items() if n)
        text += f"; parameters {self._parameters:,} -> {self._parameters_after:,}"
        if self._after:
            text += f"; FLOPs {self._before['']:,} -> {self._after['']:,}"
        return text + ("; exact" if self.replaced and self.exact else "")


def _counts(row: LayerOutcome) -> tuple[str, str]:
    flops = "" if row.flops is None else f"{row.flops:,} -> {row.flops_after or 0:,}"
    return f"{row.parameters:,} -> {row.parameters_after:,}", flops


def few(names: list[str]) -> str:
    """The first three, and how many more.

    >>> few(list("abcde"))
    'a, b, c and 2 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
