"""The layers of a model that can be replaced, and those that cannot, with the reason."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearfold.grammar import Basic, Operation
from nearfold.nn.mixer import Mixer
from nearfold.recognise.attention import attention_of
from nearfold.recognise.blocks import PARENTS
from nearfold.recognise.foreign import Match, Unsaid, names_of, rule_of, uninitialized
from nearfold.recognise.layouts import CROSS
from nearfold.recognise.scans import REFUSAL, is_scan
from nearfold.recognise.walk import ALL_RULES, walk
from nearfold.surgery.carry import Weights
from nearfold.surgery.obstacles import Surroundings, made_of, own_ways, tracked
from nearfold.surgery.sources import BLOCKS, SOURCES, Make, Source, Trial, attention_source, mixer_source

LARGEST = 65  # side of a grid that is tried
STAGE = re.compile(r"(?:^|\.)[a-z_]*?(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Site:
    """A layer that can be replaced, as a rule's conditions and notation see it.

    Attributes:
        name: dotted; the first one where a layer is registered several times.
        module: the layer.
        kind: "conv" or "attention", or "other" for operations of this library that are neither.
        operation: what it is in the words.
        in_channels: of its input.
        out_channels: of its output.
        stage: the first number in the name of what it is in, such as 3 in layer3.0.conv2; None where there is none.
        source: how to replace it.
        place: what is exchanged in the model: the layer, or the block that calls it.
        grid: of its input, where an input was given.
    """

    name: str
    module: nn.Module
    kind: str
    operation: Operation
    in_channels: int
    out_channels: int
    stage: int | None
    source: Source
    place: nn.Module
    grid: tuple[int, ...] | None = None

    @property
    def positions(self) -> int | None:
        """How many there are in its input's grid."""
        return None if self.grid is None else math.prod(self.grid)

    @property
    def words(self) -> dict[str, str]:
        """What may stand in braces in a rule's notation."""
        path = self.operation.path if isinstance(self.operation, Basic) else None
        values = {"self": self.operation, "heads": getattr(self.operation, "heads", None)}
        for name in ("size", "stride", "dilation", "padding"):
            values[name] = getattr(path, name, None)
        groups = getattr(getattr(getattr(self.operation, "weight", None), "kernel", None), "groups", None)
        values["groups"] = groups
        return {name: str(value) for name, value in values.items() if value is not None}

    @property
    def kernel_size(self) -> int | tuple[int, ...] | None:
        """Of a convolution; one number where all axes have the same."""
        return getattr(getattr(self.operation, "path", None), "size", None) if self.kind == "conv" else None

    @property
    def weights(self) -> Weights | None:
        """Its weights, where it is one operation."""
        if not isinstance(self.operation, Basic):
            return None
        s = self.source
        return Weights(self.operation, s.tensors, self.in_channels, self.out_channels, s.ndim)

    def trials(self, generator: torch.Generator, old: nn.Module, limit: int | None) -> Iterator[Trial]:
        """Calls to compare on: the smallest grid that the layer takes, odd and larger ones; then special arguments."""

        def make(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        if self.source.unlike is not None:
            if self.grid is not None and not self.source.unlike(self.grid):
                yield self.source.call(self._map(make, 2, *self.grid))
            return
        if self.source.tokens:
            lengths = [n for n in (1, 4, 7) if limit is None or n <= limit]
            for n in lengths:
                yield from (self.source.calls or self._plain)(make, n)
            return
        least = self._least(old, make)
        if least is None:
            return
        grids = ([least] * 3, [least + 1, least + 4, least + 2], [least + 7, least + 5, least + 6])
        for grid in (grid[: self.source.ndim] for grid in grids):
            if limit is None or math.prod(grid) <= limit:
                yield self.source.call(self._map(make, 2, *grid))
        side = least + 2 if limit is None or (least + 2) ** self.source.ndim <= limit else least
        yield Trial((self._map(make, 1, *[side] * self.source.ndim)[0],), what="inputs without a batch axis")

    def _plain(self, make: Make, n: int) -> Iterator[Trial]:
        x = make(2, n, self.in_channels)
        yield Trial((x, make(2, n + 2, self.module.context_channels)) if self.operation.needs_context else (x,))

    def _map(self, make: Make, batch: int, *grid: int) -> Tensor:
        return (
            make(batch, *grid, self.in_channels) if self.source.channels_last else make(batch, self.in_channels, *grid)
        )

    def _least(self, layer: nn.Module, make: Make) -> int | None:
        """The smallest side of a grid that a layer takes."""
        for n in range(1, LARGEST):
            call = self.source.call(self._map(make, 1, *[n] * self.source.ndim))
            try:
                layer(*call.args, **call.kwargs)
            except (RuntimeError, ValueError):
                continue
            return n
        return None


class Obstacle(NamedTuple):
    """A layer that cannot be replaced, and why; ``known`` where another of its class could be."""

    name: str
    module: nn.Module
    reason: str
    known: bool = False


def sites(model: nn.Module) -> Iterator[Site | Obstacle]:
    """The layers that mix positions, and can be replaced or not.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    >>> conv, pool = sites(model)
    >>> conv.kernel_size, pool.reason
    (3, 'no rule to replace a MaxPool2d')
    """
    inside: set[nn.Module] = set()
    around = Surroundings(model)
    others = {layer.modules[0]: layer for layer in walk(model) if layer.mixes or layer.reason}
    crossed = {m for m, layer in others.items() if layer.match and layer.match.operation.needs_context}
    for name, module in model.named_modules():
        if module in inside:
            continue
        if is_scan(module):  # it reads its parts' weights itself
            inside.update(module.modules())
            yield Obstacle(name, module, REFUSAL)
            continue
        if module in crossed and not isinstance(module, Mixer | nn.MultiheadAttention):
            inside.update(module.modules())
            yield Obstacle(name, module, "cross-attention: keys and values of another input")
            continue
        try:
            known = _rule(module, name)
        except Unsaid as reason:
            yield Obstacle(name, module, str(reason), known=True)
            continue
        if known is None:
            if module in others:
                own = own_ways(module) if _derived(module) else ""
                why = others[module].reason or f"no rule to replace a {type(module).__name__}"
                yield Obstacle(name, module, f"it {own}" if own else why, known=bool(own))
            continue
        part, find, read, ran = known
        place, module = module, module.get_submodule(part)
        name = f"{name}.{part}".strip(".")
        inside.update(module.modules())
        try:
            yield _site(name, module, place, find, read, around, ran)
        except Unsaid as reason:
            yield Obstacle(name, module, str(reason), known=True)
        except AttributeError as error:
            why = f"its attributes are not those of the version the rule was written for: {error}"
            yield Obstacle(name, module, why, known=True)


class Known(NamedTuple):
    """How a layer is replaced.

    Attributes:
        part: its name in what is exchanged; empty: it is the layer.
        find: reads its operation.
        read: reads its weights.
        ran: whether it is known by what it computed and not by its class.
    """

    part: str
    find: Callable[[Any], Match]
    read: Callable[[Any], Source]
    ran: bool = False


def _rule(module: nn.Module, at: str) -> Known | None:
    if isinstance(module, Mixer):
        return Known("", ALL_RULES["nearfold.nn.mixer.Mixer"], mixer_source)
    for name in names_of(module):
        if name in SOURCES:
            return Known("", ALL_RULES[name], SOURCES[name])
        if name in BLOCKS:
            part, read = BLOCKS[name]
            return Known(part, functools.partial(_inside, name, part), read)
    if rule_of(module, ALL_RULES) is None:
        attention = attention_of(module, cross=at.rpartition(".")[2] in CROSS)
        if attention is not None:
            return Known("", attention.match, functools.partial(attention_source, read=attention), ran=True)
    return None


def _derived(module: nn.Module) -> bool:
    """Whether a layer is of a class that can be replaced, or of one made from it."""
    return any(f"{cls.__module__}.{cls.__qualname__}" in SOURCES for cls in type(module).__mro__)


def _inside(block: str, part: str, module: Any) -> Match:
    return PARENTS[block](module)[part]


def _site(
    name: str,
    module: nn.Module,
    place: nn.Module,
    find: Callable[[Any], Match],
    read: Callable[[Any], Source],
    around: Surroundings,
    ran: bool,
) -> Site:
    if uninitialized(module):
        raise Unsaid("lazy, and not initialised yet: run the model once")
    if reason := around.obstacle(module, place, ran):
        raise Unsaid(reason)
    operation = find(place).operation
    with tracked(module):
        source = read(place)
        source = replace(source, tensors={name: t.view_as(t) for name, t in source.tensors.items()})
    used = set().union(*map(made_of, source.tensors.values()))
    used |= set(source.wrap(nn.Identity()).parameters())  # parts that go on in what stands in its place
    unread = [name for name, parameter in module.named_parameters() if parameter not in used]
    if unread:
        raise Unsaid(f"its {unread[0]} has no place in the words, and would be lost")
    kind = "conv" if any(k in type(module).__name__ for k in ("Conv1d", "Conv2d", "Conv3d")) else "attention"
    if isinstance(module, Mixer):
        kind = _kind(operation)
    stage = STAGE.search(name.rpartition(".")[0])
    at = int(stage[1]) if stage else None
    return Site(name, module, kind, operation, source.in_channels, source.out_channels, at, source, place)


def _kind(op: Operation) -> str:
    words = {type(part.path).word for part in op.parts} | {part.weight.rho.needs_score for part in op.parts}
    if words == {"window", False}:
        return "conv"
    return "attention" if all(part.weight.rho.needs_score for part in op.parts) else "other"


def at(site: Site, operation: Operation | None, grid: tuple[int, ...] | None) -> Site:
    """The site as a run has shown it."""
    return replace(site, operation=operation or site.operation, grid=grid)
