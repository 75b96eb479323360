"""What a run adds to the layers of a model: token MLPs, attention in a forward, and what else mixes positions there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nearfold.recognise.blocks import PARENTS, token_table
from nearfold.recognise.compared import Compared
from nearfold.recognise.foreign import Match, count
from nearfold.recognise.observation import Observation
from nearfold.recognise.observe import observe
from nearfold.recognise.pointwise import is_elementwise, is_linear
from nearfold.recognise.walk import Layer, of_match, walk, with_halves

SEEN = "seen in the run"
GLUED = frozenset(PARENTS)  # containers whose own forward a rule explains


def layers_of(
    model: nn.Module, input_size: tuple[int, ...] | None, inputs: dict[str, Any] | None = None
) -> tuple[list[Layer], Observation | None]:
    """The layers of a model, and what a run of it showed where it has a size or inputs to run on."""
    layers = walk(model)
    if input_size is None and inputs is None:
        return layers, None
    seen = observe(model, layers, input_size, GLUED, inputs)
    whole = {layer.name for layer in layers if not layer.listed}

    def owner(name: str) -> str:  # what a part that is not listed does, its owner does
        return next((up for up in _upwards(name) if up in whole), name)

    glue: dict[str, set[str]] = {}
    for name, counts in seen.glue.items():
        if calls := set(+counts):
            glue.setdefault(owner(name), set()).update(calls)
    layers = list(_with_attention(model, layers, seen, glue, owner))
    layers = [new for layer in _with_tables(layers, seen) if (new := _as_seen(_as_called(layer, seen), seen, glue))]
    strange = {layer.name for layer in layers if layer.reason}
    for name, calls in glue.items():
        if name not in strange:
            layers.append(
                Layer(name, (model.get_submodule(name),), reason=f"{_mixing(calls)}; its parts are listed", listed=True)
            )
    return with_halves(layers), seen


Owner = Callable[[str], str]


def _with_attention(
    model: nn.Module, layers: list[Layer], seen: Observation, glue: dict[str, set[str]], owner: Owner
) -> Iterator[Layer]:
    """The layers, and what the run showed to be attention and nothing else; the maps that it is made of are its own."""
    by_name = {layer.name: layer for layer in layers}
    often = Counter(map(owner, seen.compared))
    attentions = {}
    for name, compared in seen.compared.items():
        layer = by_name.get(owner(name))
        if owner(name) not in glue and often[owner(name)] == 1 and (layer is None or layer.reason):
            attentions[owner(name)] = compared
    parts = {part: name for name, one in attentions.items() for part in one.parts if _is_part(by_name.get(part), one)}
    said: set[str] = set()
    for layer in layers:
        around = [up for up in _upwards(layer.name) if up in attentions]
        for name in around:
            if name not in said:
                said.add(name)
                yield _attention(model, name, attentions[name], by_name, parts)
        if layer.name not in attentions and layer.name not in parts:
            yield dataclasses.replace(layer, within=True) if around else layer


def _is_part(layer: Layer | None, compared: Compared) -> bool:
    """Whether a layer is one of the maps around an attention, or its softmax."""
    if layer is None:
        return False
    map_ = is_linear(layer.modules[0]) or (layer.match is not None and layer.pointwise)
    return map_ or (layer.name in compared.through and bool(layer.reason))


def _attention(
    model: nn.Module, name: str, compared: Compared, by_name: dict[str, Layer], parts: dict[str, str]
) -> Layer:
    module, layer = model.get_submodule(name), by_name.get(name)
    if layer is not None and not layer.listed:
        return of_match(name, (module,), compared.match(count(module)))
    own = sum(p.numel() for p in module.parameters(recurse=False))
    generating = own + sum(count(model.get_submodule(part)) for part, its in parts.items() if its == name)
    below = f"{name}." if name else ""
    beside = tuple(
        (other.removeprefix(below), None)
        for other in by_name
        if other.startswith(below) and other != name and other not in parts
    )
    return of_match(name, (module,), dataclasses.replace(compared.match(generating), beside=beside))


def _upwards(name: str) -> Iterator[str]:
    """A dotted name, and those of what it is in, from the outermost."""
    parts = name.split(".")
    yield from ("", *(".".join(parts[: i + 1]) for i in range(len(parts)))) if name else ("",)


def _mixing(calls: set[str]) -> str:
    return f"its own forward calls {', '.join(sorted(calls))}"


def _as_seen(layer: Layer, seen: Observation, glue: dict[str, set[str]]) -> Layer | None:
    """What a run adds to a layer without an operation: whether it mixed positions. None: only its parts are left."""
    if layer.match is not None or layer.name in seen.calls or is_linear(layer.modules[0]):
        return layer
    if layer.name in glue:
        if layer.reason and not layer.reason.startswith(("no rule", "owns", "called")):  # a rule says more
            return layer
        return dataclasses.replace(layer, reason=_mixing(glue[layer.name]) + ("; its parts are listed" * layer.listed))
    if layer.reason and layer.name in seen.ran:
        return None if layer.listed else Layer(layer.name, layer.modules, note=SEEN)
    return layer


def _as_called(layer: Layer, seen: Observation) -> Layer:
    new = seen.calls.get(layer.name)
    if isinstance(new, Match):
        return of_match(layer.name, layer.modules, new)
    if new is not None:
        return dataclasses.replace(layer, match=None, reason=new, counted=0.0)
    if layer.pointwise and seen.linears.get(layer.name) == "both":
        return dataclasses.replace(layer, match=None, reason="reads positions that its container gathered", counted=0.0)
    return layer


def _with_tables(layers: list[Layer], seen: Observation) -> list[Layer]:
    """The nn.Linear that act on positions; those with nothing but activations between are one operation."""
    out: list[Layer] = []
    run: list[Layer] = []
    between: list[Layer] = []

    def close() -> None:
        if run:
            linears = [layer.modules[0] for layer in run]
            name = run[0].name if len(run) == 1 else _joined([layer.name for layer in run])
            out.append(of_match(name, tuple(linears), token_table(*linears)))  # type: ignore[arg-type]
        out.extend(between)
        run.clear()
        between.clear()

    for layer in layers:
        module = layer.modules[0]
        if seen.linears.get(layer.name) == "positions" and is_linear(module):
            follows = run and run[-1].modules[0].out_features == module.in_features and _siblings(run[-1], layer)
            if not follows:
                close()
            run.append(layer)
        elif run and is_elementwise(module) and _siblings(run[-1], layer):
            between.append(layer)
        else:
            close()
            out.append(layer)
    close()
    return out


def _siblings(a: Layer, b: Layer) -> bool:
    return a.name.rpartition(".")[0] == b.name.rpartition(".")[0]


def _joined(names: list[str]) -> str:
    """Names of siblings in one: mlp.fc1 and mlp.fc2 are mlp.fc1+fc2."""
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
