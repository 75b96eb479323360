"""Layer by layer: the operators of a trained network of the user's, each layer's own, exchanged with weights kept."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nearfold.grammar import Basic, Operation, parse
from nearfold.grammar.unions import Union
from nearfold.grammar.words import Path
from nearfold.study import given, surgery
from nearfold.study.fourteen import FOURTEEN
from nearfold.study.measure import count_flops
from nearfold.study.search.budget import Budget, OverBudget
from nearfold.study.search.space import Space, Suggest, Value
from nearfold.study.tasks import build
from nearfold.surgery import Rule, Site, convert
from nearfold.surgery.report import few
from nearfold.train import ImageData

START: Mapping[str, str] = {
    **FOURTEEN,
    "9 best keys": "nearest(9, scaled) | ranked | softmax(heads={heads})",
    "32 best keys": "nearest(32, scaled) | ranked | softmax(heads={heads})",
    "plus ConvNN": "({self}) + near*(nearest(9, cosine, self) | ranked | kernel)",
    "plus attention": "({self}) + far*(all | row | softmax(heads={heads}))",
}
"""The known operators, and some that begin where the layer is, by title. Words in braces as in `Rule`."""
AS_IT_IS = "as it is"
"""The plan that exchanges nothing, as it is written."""
KEEP, KNOWN, DRAWN = "keep", "known", "drawn"
"""What may happen to a layer: nothing, an operator of the start in its place, or one of the space."""


def written(plan: Mapping[str, str]) -> str:
    """A plan, notation by the name of a layer, as a line.

    >>> written({"conv": "window(5) | box | kernel"}), written({})
    ('conv: window(5) | box | kernel', 'as it is')
    """
    return "; ".join(f"{name}: {notation}" for name, notation in plan.items()) or AS_IT_IS


def read(text: str) -> dict[str, str]:
    """A plan that `written` wrote.

    >>> read(written({"a.0": "all | row | softmax", "a.1": "window(3) | box | kernel"}))
    {'a.0': 'all | row | softmax', 'a.1': 'window(3) | box | kernel'}
    """
    if text == AS_IT_IS:
        return {}
    return dict(line.split(": ", 1) for line in text.split("; "))


def text_of(network: Mapping[str, Any]) -> str:
    """What is searched in a trial's network: the operation of a small one, or the plan of one that is given."""
    return written(network[surgery.CONVERT]) if network["name"] == given.GIVEN else str(network["operation"])


@dataclass(frozen=True)
class Layer:
    """A layer that may be exchanged.

    Attributes:
        name: dotted.
        site: as `convert` sees it, with the grid it works on.
        known: notation, sized for this layer, of the known operators that can take its place, by title.
    """

    name: str
    site: Site
    known: Mapping[str, str]

    @property
    def space(self) -> Space:
        """What may be drawn for it. Heads must divide what comes in."""
        assert self.site.grid is not None, self.name
        return Space(self.site.in_channels, self.site.grid)


def fitted(notation: str, site: Site) -> Operation:
    """An operation for a layer: words in braces filled in, tables for its positions, its stride.

    Raises:
        ValueError: it cannot be one, or the layer has not what it asks for.
    """
    try:
        text = notation.format_map(site.words)
    except KeyError as missing:
        raise ValueError(f"it has no {missing.args[0]}, which {notation!r} asks for") from None
    stride = getattr(getattr(site.operation, "path", None), "stride", 1)

    def own(part: Basic) -> Basic:
        part = part.sized(site.positions) if site.positions is not None else part
        path = strided(part.path, stride)
        return part if path == part.path else replace(part, path=path)

    return parse(str(parse(text).map(own)))


def strided(path: Path, stride: Any) -> Path:
    """The path with that output stride; as it is where it has none.

    >>> print(strided(parse("window(3) & nearest(4, cosine) | box | ones").parts[0].path, 2))
    window(3, stride=2) & nearest(4, cosine, stride=2)
    """
    if isinstance(path, Union):
        return Union(tuple(strided(one, stride) for one in path.paths))
    own: Any = path  # a dataclass, as every path of the language
    return replace(own, stride=stride) if "stride" in {f.name for f in fields(own)} else path


def mixes(site: Site) -> bool:
    """Whether positions meet in a layer: a pointwise convolution is kept."""
    size = site.kernel_size
    return size is None or (size if isinstance(size, int) else math.prod(size)) > 1


def layers_of(
    model: nn.Module, size: Sequence[int], start: Mapping[str, str], pattern: str = "*"
) -> tuple[list[Layer], dict[str, str], dict[str, str]]:
    """The layers of a model that may be exchanged, and by what.

    Args:
        model: left as it is.
        size: channels, height and width of an image.
        start: notation of the known operators by title; words in braces as in `Rule`.
        pattern: a shell pattern for the names of layers.

    Returns:
        The layers; why, by name, others that match and may mix positions are kept; and why, by title, of the operators
        that can take no layer's place.

    Raises:
        ValueError: there is no such layer, or its name cannot be written in a plan.
    """
    seen: dict[str, Site] = {}

    def see(site: Site) -> None:
        seen[site.name] = site

    kept: dict[str, str] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is told here
            rows = convert(copy.deepcopy(model), Rule(see), input_size=tuple(size)).rows
        kept = {row.name: row.reason for row in rows if row.name not in seen and fnmatchcase(row.name, pattern)}
    except ValueError:
        if seen:  # no layer at all is told below
            raise
    found = {name: site for name, site in seen.items() if mixes(site) and fnmatchcase(name, pattern)}
    if not found:
        there = few([name for name, site in seen.items() if mixes(site)]) or "none"
        raise ValueError(
            f"layers={pattern!r} matches no layer that mixes positions and can be exchanged; there is {there}"
        )
    if odd := [name for name in found if "; " in name or ": " in name]:
        raise ValueError(f"a layer is called {odd[0]!r}: a name with '; ' or ': ' cannot be written in a plan")
    asked = Rule(see, name=pattern, where=mixes)
    known: dict[str, dict[str, str]] = {name: {} for name in found}
    left_out = {}
    for title, notation in start.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # layers that it is refused for are left out
                rule = replace(asked, to=functools.partial(fitted, notation))
                rows = convert(copy.deepcopy(model), rule, input_size=tuple(size)).rows
        except ValueError as error:
            left_out[title] = str(error)
            continue
        takes = {row.name: row.to for row in rows if row.status == "replaced"}
        if not takes:
            left_out[title] = next(row.reason for row in rows if row.status == "refused")
        for name, to in takes.items():
            if to != str(found[name].operation):
                known[name][title] = to
    return [Layer(name, site, known[name]) for name, site in found.items()], kept, left_out


def _of(suggest: Suggest, layer: str, name: str, among: Sequence[Value]) -> Value:
    return suggest(f"{layer} {name}", among)


@dataclass(frozen=True)
class LayerSpace:
    """Plans for the layers of a network, as `Space` for operations."""

    layers: Sequence[Layer]

    def draw(self, suggest: Suggest) -> str:
        """A plan by choices.

        Raises:
            ValueError: the grammar refuses one of its operations.
        """
        plan = {}
        for layer in self.layers:
            if suggest(layer.name, (KEEP, "exchange")) == KEEP:
                continue
            if not layer.known or suggest(f"{layer.name} by", (KNOWN, DRAWN)) == DRAWN:
                own = layer.space.draw(functools.partial(_of, suggest, layer.name))
                plan[layer.name] = str(fitted(own, layer.site))
            else:
                plan[layer.name] = layer.known[str(suggest(f"{layer.name} known", tuple(layer.known)))]
        return written(plan)

    def parameters(self, text: str) -> dict[str, Value] | None:
        """The choices that lead to a plan of known operators; None for others."""
        plan = read(text)
        found: dict[str, Value] = {}
        for layer in self.layers:
            notation = plan.pop(layer.name, None)
            found[layer.name] = KEEP if notation is None else "exchange"
            if notation is None:
                continue
            title = next((title for title, own in layer.known.items() if own == notation), None)
            if title is None:
                return None
            found |= {f"{layer.name} by": KNOWN, f"{layer.name} known": title}
        return None if plan else found

    def everywhere(self, start: Mapping[str, str]) -> dict[str, str]:
        """The plans that a search of layers has to beat: nothing exchanged, and each operator wherever it can stand.

        Args:
            start: notation by title; the titles count.

        Returns:
            Plan by title; how many layers it exchanges is said where these are not all.
        """
        found = {AS_IT_IS: AS_IT_IS}
        for title in start:
            plan = {layer.name: layer.known[title] for layer in self.layers if title in layer.known}
            if plan and written(plan) not in found.values():
                part = f" ({len(plan)} of {len(self.layers)} layers)" if len(plan) < len(self.layers) else ""
                found[title + part] = written(plan)
        return found


@dataclass(frozen=True)
class LayerNetworks:
    """A network that is given, with other layers: as `Networks` for the small ones.

    Attributes:
        data: what it is trained on.
        budget: of every network, at most.
        given: the network, as `nearfold.study.given.given` makes it.
        costs: parameters and FLOPs by plan, of those that were made.
    """

    data: ImageData
    budget: Budget
    given: Mapping[str, Any]
    costs: dict[str, tuple[int, int]] = field(default_factory=dict)

    heads = ("parameters", "FLOPs")
    """Of the columns that say what a network is."""
    unfit = "not an exchange of these layers"
    """Why what is refused in `around` is not trained."""

    def around(self, text: str) -> dict[str, Any]:
        """The network with a plan, as `nearfold.study.grid.Trial` takes it.

        Raises:
            OverBudget: it costs more.
            ValueError: a layer cannot be exchanged so.
        """
        network = {**self.given, surgery.CONVERT: read(text)}
        if text not in self.costs:
            model = build(network, self.data)
            try:
                flops = count_flops(model, (self.data.channels, *self.data.size))
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{text}: its FLOPs cannot be counted: {error}") from error
            self.costs[text] = (sum(p.numel() for p in model.parameters()), flops)
        spent = dict(zip(("params", "flops"), self.costs[text], strict=True)).get(self.budget.kind, 0)
        if spent > self.budget.most:
            raise OverBudget(f"takes {spent:,} of {self.budget}")
        return network

    def cells(self, network: Mapping[str, Any]) -> tuple[str, ...]:
        """What the columns say of a network."""
        return tuple(f"{number:,}" for number in self.costs[text_of(network)])
