"""Which layers of a model mix positions, and what of each is known before it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nearfold.examine.layout import Layout, observed
from nearfold.grammar import Operation
from nearfold.nn.mixer import Mixer
from nearfold.recognise.blocks import token_table
from nearfold.recognise.foreign import Match
from nearfold.recognise.observation import Observation
from nearfold.recognise.ran import layers_of
from nearfold.recognise.walk import Layer
from nearfold.surgery.build import in_words, standing
from nearfold.surgery.sites import Site, sites


@dataclass(frozen=True)
class Source:
    """One layer to be measured.

    Attributes:
        name: dotted, in the model.
        kind: name of its class.
        operation: what it is in the words; None: they do not say it.
        place: the module whose calls are watched: the layer, or the block that calls it.
        layout: how its input lies on the map, as a run has shown it.
        mixer: the layer in the words, with its weights; None where it must be differentiated.
        twin: what would stand in ``place``, around the mixer; it is compared before the mixer is believed.
        reason: why the words do not say it.
    """

    name: str
    kind: str
    operation: Operation | None
    place: nn.Module
    layout: Layout
    mixer: Mixer | None = None
    twin: nn.Module | None = None
    reason: str = ""


@dataclass(frozen=True)
class Left:
    """A layer that is not measured, and why."""

    name: str
    kind: str
    reason: str


def sources(model: nn.Module, input_size: tuple[int, ...]) -> tuple[list[Source], list[Left]]:
    """The layers of a model that mix positions, in the order in which they are registered, and those left out.

    Args:
        model: any module that takes a batch of maps; it is left as it is.
        input_size: channels and grid of one of them.

    Raises:
        ValueError: the model does not run on such an input.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1))
    >>> found, left = sources(net, (3, 8, 8))
    >>> [(one.name, str(one.operation)) for one in found]
    [('0', 'window(3, padding=0) | box | kernel'), ('2', 'window(2, stride=2, padding=0) | box | mean')]
    """
    layers, seen = layers_of(model, input_size)
    assert seen is not None
    said = {entry.name: entry for entry in sites(model) if isinstance(entry, Site)}
    found: list[Source] = []
    left = [Left(name, type(model.get_submodule(name)).__name__, MEAN) for name in seen.means]
    inner = {layer.name for layer in layers if layer.mixes or (layer.reason and not layer.listed)}
    for layer in layers:
        if layer.listed and layer.name in seen.glue and not any(_is_in(name, layer.name) for name in inner):
            layer = replace(layer, listed=False)  # none of its parts mixes: what its forward does is all there is
        one = _source(model, layer, seen, said)
        if isinstance(one, Source):
            found.append(one)
        elif one is not None:
            left.append(one)
    return found, left


def _is_in(name: str, container: str) -> bool:
    return not container or name.startswith(f"{container}.")


MEAN = "a mean over all positions: it reads each alike and leaves no map"


def _source(model: nn.Module, layer: Layer, seen: Observation, said: dict[str, Site]) -> Source | Left | None:
    called = seen.calls.get(layer.name)
    match = called if isinstance(called, Match) else layer.match
    lies = None if _batch_second(layer.modules[0]) else seen.lies.get(layer.name)
    if layer.reason or isinstance(called, str):
        reason = layer.reason or str(called)
        if layer.listed or layer.name not in seen.ran:
            return Left(layer.name, layer.kind, reason)
        module = model.get_submodule(layer.name)
        return Source(layer.name, layer.kind, None, module, observed(lies, None), reason=reason)
    if match is None or not layer.mixes:
        return None
    if layer.name not in seen.ran and layer.name not in said:
        return Left(layer.name, layer.kind, "it did not run")
    if match.operation.needs_context:
        return Left(layer.name, layer.kind, "it reads a second input, whose positions are not those of the map")
    module = layer.modules[0]
    plain = Source(layer.name, layer.kind, match.operation, module, observed(lies, match.axis))
    if isinstance(module, Mixer):
        return replace(plain, mixer=module, twin=module)
    along = isinstance(module, nn.Linear) and match.operation == token_table(module).operation
    if along and lies is not None and plain.layout.axis == 1:
        mixer = _table(module, match.operation, lies.channel.shape[1])
        return replace(plain, mixer=mixer, twin=mixer)
    site = said.get(layer.name)
    if site is None:
        return plain
    try:
        mixer = in_words(site, match.operation)
    except ValueError:  # differentiated instead
        return plain
    layout = plain.layout if site.place is module else Layout(match.axis)
    return replace(plain, place=site.place, layout=layout, mixer=mixer, twin=standing(site, mixer))


def _batch_second(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first


def _table(linear: Any, operation: Operation, channels: int) -> Mixer:
    """A map of positions in the words, with its weights."""
    mixer = Mixer(operation, channels, ndim=1, bias=linear.bias is not None)
    own = {"table_weight": linear.weight} | ({} if linear.bias is None else {"table_bias": linear.bias})
    mixer.load_state_dict(own)
    return mixer.to(linear.weight.device, linear.weight.dtype).eval()
