"""Networks of one budget: the pointwise MLPs make up what an operator leaves over, and one that is over it is refused.

As in `nearfold.study.catalogue.matched`, but the budget is given, is never exceeded, and holds for any data.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nearfold.grammar import parse
from nearfold.grammar.complexity import c_d
from nearfold.models import stem_stride
from nearfold.study.measure import count_flops, count_parameters
from nearfold.study.tasks import build
from nearfold.train import ImageData, require_trainable

UNITS = {"params": "parameters", "flops": "FLOPs of an image", "latency_ms": "ms of an image"}
"""What a budget may be of."""
TOLERANCE = 0.05
"""How far below its budget a network may be."""
PLAIN = "window(1) | box | kernel"  # any: the price of the MLPs is the same around every operator


class OverBudget(ValueError):
    """An operator that alone, its MLPs one channel wide, is more than the budget."""


@dataclass(frozen=True)
class Budget:
    """What a network may cost.

    Attributes:
        kind: ``"params"`` or ``"flops"`` (of one image, forward): every network has as many, within `TOLERANCE`.
            ``"latency_ms"`` (of one image, forward, one thread on the CPU): no network takes longer; MLPs are twice as
            wide as the network.
        most: how much.

    >>> str(Budget("params", 30000))
    '30,000 parameters'
    """

    kind: str
    most: float

    def __post_init__(self) -> None:
        if self.kind not in UNITS:
            raise ValueError(f"Budget.kind must be one of {', '.join(UNITS)}; got {self.kind!r}")
        if not self.most > 0:
            raise ValueError(f"Budget.most must be above 0, got {self.most}")

    @property
    def measured(self) -> bool:
        """Whether it has to be measured on this machine, and cannot be counted."""
        return self.kind == "latency_ms"

    def __str__(self) -> str:
        return f"{self.most:,g} {UNITS[self.kind]}" if self.measured else f"{self.most:,.0f} {UNITS[self.kind]}"


@dataclass(frozen=True)
class Networks:
    """The small networks of a search.

    The stem cuts patches (a pointwise map where images are small): outside the operator, and the pooling at the end,
    positions exchange nothing.

    Attributes:
        data: what they are for.
        budget: of every network.
        width: channels.
        depth: blocks.
    """

    data: ImageData
    budget: Budget
    width: int = 32
    depth: int = 2

    heads = ("C_D", "MLP")
    """Of the columns that say what a network is."""
    unfit = "not for this width and grid"
    """Why what is refused in `around` is not trained."""

    def cells(self, network: Mapping[str, Any]) -> tuple[str, ...]:
        """What the columns say of a network."""
        return f"{c_d(parse(network['operation'])):g}", str(network["hidden"])

    @property
    def stride(self) -> int:
        """Of the stem."""
        return stem_stride(self.data.size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions that the operators work on."""
        return tuple(side // self.stride for side in self.data.size)

    def around(self, notation: str) -> dict[str, Any]:
        """The network around an operator, as `nearfold.study.grid.Trial` takes it.

        Raises:
            OverBudget: the operator leaves nothing for the MLPs.
            ValueError: it does not work in this network, or no width of the MLPs is near the budget.
        """
        if self.budget.measured:
            hidden = 2 * self.width
        else:
            least = self.price(notation, 1)
            hidden = 1 + int((self.budget.most - least) // self._step)
            if hidden < 1:
                raise OverBudget(f"{notation} takes {least:,} of {self.budget} with MLPs one channel wide")
            if (spent := least + (hidden - 1) * self._step) < (1 - TOLERANCE) * self.budget.most:
                raise ValueError(
                    f"{notation}: no width of the MLPs brings the network near {self.budget}, {hidden} channels are "
                    f"{spent:,} and one more is too many: take a larger budget"
                )
        network = self._network(notation, hidden)
        require_trainable(lambda: build(network, self.data), (self.data.channels, *self.data.size))
        return network

    def price(self, notation: str, hidden: int) -> int:
        """Parameters, or FLOPs, of the network with MLPs so wide; for a budget of latency, parameters.

        Raises:
            ValueError: the operator does not work in this network.
        """
        try:
            with torch.device("meta"):
                model: nn.Module = build(self._network(notation, hidden), self.data)
            if self.budget.kind == "flops":
                return count_flops(model, (self.data.channels, *self.data.size))
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{notation} does not run in this network: {error}") from error
        return count_parameters(model)

    @functools.cached_property
    def _step(self) -> int:
        """What one more channel in the MLPs costs."""
        return self.price(PLAIN, 2) - self.price(PLAIN, 1)

    def _network(self, notation: str, hidden: int) -> dict[str, Any]:
        return {
            "name": "spectrum", "operation": notation, "width": self.width, "depth": self.depth,
            "stride": self.stride, "kernel": self.stride, "hidden": hidden,
        }  # fmt: skip
