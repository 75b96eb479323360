"""Networks of different operators with one budget: the pointwise MLPs make up what an operator leaves over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from nearfold.models import SpectrumNet
from nearfold.models.small import GRID
from nearfold.study.grid import Data, Label, Trial
from nearfold.study.measure import count_flops, count_parameters
from nearfold.train import Recipe

SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
"""Channels, height and width of the images that budgets are counted for."""
CLASSES = {"cifar100": 100}
TOLERANCE = 0.05
"""How far a network may be from its budget."""

Measure = Callable[[nn.Module, tuple[int, ...]], int]
flops: Measure = count_flops


def parameters(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Trainable numbers."""
    return count_parameters(model)


def matched(
    layers: Mapping[Label, str],
    axis: str,
    data: Data,
    recipe: Recipe,
    measure: Measure,
    side: int = GRID,
    width: int = 32,
    depth: int = 2,
) -> list[Trial]:
    """A trial for every layer in `SpectrumNet`, whose MLPs are so wide that all networks have the same budget.

    The budget is that of the hungriest layer with MLPs of twice the width.

    Args:
        layers: notation by value on the axis.
        axis: what the values are of.
        data: what is trained on.
        recipe: how.
        measure: of what the budget is: `parameters` or `flops`.
        side: of the grid of positions that the stem makes, at most.
        width: channels.
        depth: blocks.

    Raises:
        ValueError: a layer cannot meet the budget within `TOLERANCE`.
    """
    stride = max(1, SHAPES[data.name][1] // side)
    trials = []
    for value, hidden in mlps(layers, width, depth, data.name, stride, measure).items():
        network = {"name": "spectrum", "operation": layers[value], "width": width, "depth": depth, "hidden": hidden}
        network |= {"stride": stride} if side != GRID else {}
        trials.append(Trial({"data": data.name, axis: value}, network, data, recipe))
    return trials


def mlps(
    layers: Mapping[Label, str],
    width: int,
    depth: int,
    data: str,
    stride: int,
    measure: Measure,
    plain: int | None = None,
) -> dict[Label, int]:
    """How wide the MLPs have to be, by layer, so that all networks have the budget of the hungriest one.

    Args:
        layers: notation by value on the axis.
        width: channels.
        depth: blocks.
        data: whose images are counted for. Numbers of parameters differ between data in the stem and the classifier
            alone, which all layers share.
        stride: of the stem.
        measure: of what the budget is.
        plain: channels inside the MLPs of the hungriest layer; None: twice the width.

    Raises:
        ValueError: as in `matched`.
    """
    plain = 2 * width if plain is None else plain
    price = functools.partial(_cost, width, depth, data, stride, measure)
    budget = max(price(layer, plain) for layer in layers.values())
    found = {}
    for value, layer in layers.items():
        first, second = (price(layer, hidden) for hidden in (plain, 2 * plain))
        found[value] = plain + round((budget - first) / ((second - first) / plain))
        off = price(layer, found[value]) / budget - 1
        if abs(off) > TOLERANCE:
            raise ValueError(f"{layer} is {off:+.1%} off the budget of {budget:,}: widen the network ({width=})")
    return found


@functools.cache
def _cost(width: int, depth: int, data: str, stride: int, measure: Measure, layer: str, hidden: int) -> int:
    shape, classes = SHAPES[data], CLASSES.get(data, 10)
    with torch.device("meta"):
        model = SpectrumNet(layer, shape[0], classes, width=width, depth=depth, stride=stride, hidden=hidden)
    return measure(model, shape)
