"""Networks of a study that start from weights that come along, some of their layers exchanged, and walk from there."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nearfold.models.pretrained import weights_of
from nearfold.surgery import Rule, SpectrumSchedule, convert

Config = Mapping[str, Any]

TRAINED, CONVERT, LAYERS, ALONG = "pretrained", "convert", "layers", "along"
"""In a trial's network: start from the weights that come along; exchange layers by this notation, or each by its own
(notation by name); these, by a shell pattern for their names; and move them along the spectrum, as `SpectrumSchedule`
takes it."""
WALK = 2 / 3
"""Share of the steps in which layers move; in the rest they stay where they have arrived."""


def arguments(network: Config) -> dict[str, Any]:
    """What `create` is to be given: on the meta device, where nothing can be loaded, fresh weights stand for others.

    Raises:
        ValueError: the run was planned with other weights than those that come along.
    """
    own = {name: value for name, value in network.items() if name not in (TRAINED, CONVERT, LAYERS, ALONG)}
    planned = network.get(TRAINED)
    if not planned or torch.get_default_device().type == "meta":
        return own
    found = weights_of(network["name"]).sha256
    if planned not in (True, found):
        raise ValueError(
            f"this run was planned with other weights of {network['name']} ({str(planned)[:12]}, here are "
            f"{found[:12]}): plan it again"
        )
    return own | {TRAINED: True}


def operate(model: nn.Module, network: Config, size: Sequence[int]) -> None:
    """Exchange layers of a model, in place.

    Args:
        model: the model.
        network: as in `Trial`.
        size: channels, height and width of an image.

    Raises:
        ValueError: no layer is exchanged, or not every one that is named.
    """
    if not network.get(CONVERT) or torch.get_default_device().type == "meta":
        return
    to = network[CONVERT]
    if isinstance(to, str):
        convert(model, Rule(to, name=network.get(LAYERS, "*")), input_size=tuple(size))
        return
    rules = [Rule(notation, name=glob.escape(name)) for name, notation in to.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is refused is an error here
        rows = {row.name: row for row in convert(model, rules, input_size=tuple(size)).rows}
    for name, notation in to.items():
        row = rows.get(name)
        if row is None or row.status != "replaced":
            why = "there is no such layer" if row is None else row.reason
            raise ValueError(f"layer {name} does not become {notation}: {why}")


def walk(model: nn.Module, network: Config, steps: int) -> SpectrumSchedule | None:
    """What moves the layers of a model in so many steps of training; None where nothing moves."""
    if ALONG not in network:
        return None
    ranges = {name: (first, last) for name, (first, last) in network[ALONG].items()}
    return SpectrumSchedule(model, ranges, steps=max(1, int(WALK * steps)))


def arrive(model: nn.Module, network: Config) -> None:
    """Put the layers of a model where they arrive."""
    if CONVERT in network and torch.get_default_device().type != "meta":
        moved = walk(model, network, 1)
        if moved is not None:
            moved.step()
