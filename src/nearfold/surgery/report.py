"""What `convert` did, layer by layer, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nearfold.mixing import evaluating
from nearfold.recognise.foreign import count
from nearfold.surgery.carry import GRADES


@dataclass(frozen=True)
class Row:
    """One layer.

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
    """A row, the layer it is about, and what stands in its place."""

    row: Row
    old: nn.Module
    new: nn.Module | None = None


class Report:
    """What became of every layer; ``str()`` is a table.

    Attributes:
        rows: one a layer that mixes positions, in the model's order.
        exact: whether every replaced layer is.
        unused: the rules that matched nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        changes: tuple[Change, ...],
        flops: dict[str, int],
        input_size: tuple[int, ...] | None,
        unused: tuple[str, ...] = (),
    ) -> None:
        self._model, self._changes, self.input_size, self.unused = model, changes, input_size, unused
        self._before, self._after, self._applied = flops, {}, False  # type: dict[str, int], dict[str, int], bool
        self._parameters = count(model)

    @property
    def rows(self) -> tuple[Row, ...]:
        """One a layer that mixes positions, in the model's order."""
        return tuple(
            replace(c.row, flops=self._before.get(c.row.name), flops_after=self._after.get(c.row.name))
            for c in self._changes
        )

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The rows of the layers that were replaced."""
        return tuple(row for row in self.rows if row.status == "replaced")

    @property
    def exact(self) -> bool:
        """Whether the model's output is what it was: every replaced layer is exact."""
        return all(row.grade == "exact" for row in self.replaced)

    def apply(self) -> None:
        """Put the new layers in (`convert` has done so; again after `undo`)."""
        if self._applied:
            raise ValueError("the new layers are in the model already")
        self._exchange([(c.old, c.new) for c in self._changes if c.new is not None])
        self._applied = True

    def undo(self) -> None:
        """Put the old layers back, as they were; what the new ones have learned stays with them.

        Raises:
            ValueError: when that was done before, or somebody else has replaced a layer since.
        """
        if not self._applied:
            raise ValueError("the old layers are in the model already")
        self._exchange([(c.new, c.old) for c in self._changes if c.new is not None])
        self._applied = False

    def _exchange(self, pairs: list[tuple[nn.Module | None, nn.Module | None]]) -> None:
        there = set(self._model.modules())
        gone = [type(old).__name__ for old, _ in pairs if old not in there]
        if gone:
            raise ValueError(f"{len(gone)} layers are no longer in the model ({gone[0]} ...); nothing was changed")
        new = dict(pairs)
        for parent in list(there):
            for name, child in parent._modules.items():  # a layer may be registered several times
                replacement = new.get(child)
                if child is not None and replacement is not None:
                    parent._modules[name] = replacement.train(child.training)

    def measure(self) -> None:
        """Count the new layers' FLOPs."""
        from nearfold.surgery.observe import count_flops

        assert self.input_size is not None
        self._after = count_flops(self._model, self.input_size)

    @torch.no_grad()
    def difference(self, *args: Any, **kwargs: Any) -> float:
        """Largest difference of the model's outputs with the old and the new layers, over the largest old output.

        Args:
            args: a call's arguments; the model runs twice, in evaluation mode.
            kwargs: a call's named arguments.
        """
        with evaluating(self._model):
            new = _tensors(self._model(*args, **kwargs))
            self.undo()
            try:
                old = _tensors(self._model(*args, **kwargs))
            finally:
                self.apply()
        scale = max(t.abs().max().item() for t in old)
        return max((a - b).abs().max().item() for a, b in zip(new, old, strict=True)) / max(scale, 1e-30)

    def __str__(self) -> str:
        lines = [f"{type(self._model).__name__}: {self._summary()}", ""]
        cells = [("layer", "was", "", "is now", "parameters", "FLOPs")]
        for row in self.rows:
            if row.status == "replaced":
                cells.append((row.name, row.operation, row.grade, row.to, *_counts(row)))
        if len(cells) > 1:
            widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
            lines += ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        for grade in (*GRADES, "kept", "refused"):
            reasons: dict[str, list[str]] = {}
            for row in self.rows:
                if row.reason and grade in (row.grade, row.status):
                    reasons.setdefault(row.reason, []).append(row.name)
            lines += [f"{grade}: {_few(names)}: {reason}" for reason, names in reasons.items()]
        lines += [f"unused: no layer matches {rule}" for rule in self.unused]
        return "\n".join(lines)

    def _summary(self) -> str:
        count = {s: sum(r.status == s for r in self.rows) for s in ("replaced", "kept", "refused")}
        now = self._parameters + sum((r.parameters_after or 0) - r.parameters for r in self.replaced)
        text = ", ".join(f"{n} {status}" for status, n in count.items() if n)
        text += f"; parameters {self._parameters:,} -> {now:,}"
        if self._after:
            text += f"; FLOPs {self._before['']:,} -> {self._after['']:,}"
        return text + ("; exact" if self.exact else "")


def _counts(row: Row) -> tuple[str, str]:
    flops = "" if row.flops is None else f"{row.flops:,} -> {row.flops_after or 0:,}"
    return f"{row.parameters:,} -> {row.parameters_after:,}", flops


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]
