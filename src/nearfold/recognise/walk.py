"""Walking a model: every layer becomes mixing, pointwise or unknown, from what is registered alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from nearfold.grammar import Basic
from nearfold.grammar.complexity import c_d
from nearfold.grammar.word import all_ones
from nearfold.grammar.words import Depthwise, Window
from nearfold.lower.meaning import meaning
from nearfold.recognise.alone import TRIED, tried
from nearfold.recognise.attention import attention_of
from nearfold.recognise.blocks import BLOCK_RULES, PARENTS, deformable_children, is_deformable
from nearfold.recognise.deformable import DEFORMABLE_RULES
from nearfold.recognise.foreign import RULES, Match, Unsaid, names_of, rule_of, uninitialized
from nearfold.recognise.layouts import CROSS
from nearfold.recognise.pointwise import gathers_statistics, is_elementwise, is_linear, is_pointwise, strange_parameters
from nearfold.recognise.scans import scan_of

ALL_RULES = RULES | BLOCK_RULES | DEFORMABLE_RULES
EMPTY = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # without children they do nothing


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        name: dotted.
        modules: the layer itself; more than one where several make one operation.
        match: what it is in the words; None: pointwise without a word, or unknown.
        reason: why it is unknown; empty otherwise.
        counted: its share in the model's C_D.
        note: what the words leave open, why it counts what it counts, or how it is known.
        listed: whether its parts are listed on their own as well.
        within: whether it is a part of a layer that is listed as a whole.
    """

    name: str
    modules: tuple[nn.Module, ...]
    match: Match | None = None
    reason: str = ""
    counted: float = 0.0
    note: str = ""
    listed: bool = False
    within: bool = False

    @property
    def kind(self) -> str:
        """Name of its class."""
        return type(self.modules[0]).__name__

    @property
    def pointwise(self) -> bool:
        """Whether it reads one position for each it makes."""
        return not self.reason and (self.match is None or one_position(self.match))

    @property
    def mixes(self) -> bool:
        """Whether it is known, and reads other positions."""
        return self.match is not None and not one_position(self.match)


def one_position(match: Match) -> bool:
    """Whether an operation reads a single position and nothing else: a 1x1 convolution."""
    op = match.operation
    if not isinstance(op, Basic) or meaning(op.weight.kernel).of_the_map:
        return False
    return meaning(op.path).is_table(op.path) and all_ones(getattr(op.path, "size", 0))


def walk(model: nn.Module) -> list[Layer]:
    """The layers of a model in the order in which they are registered; a shared one once.

    >>> [layer.match and str(layer.match.operation) for layer in walk(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))]
    ['window(3, padding=0) | box | kernel', None]
    """
    return with_halves(list(_visit(model, "", None, set(), set())))


def of_match(name: str, modules: tuple[nn.Module, ...], match: Match) -> Layer:
    """A layer that can be said, and what it counts."""
    note = "; ".join(filter(None, (match.note, match.scaffold)))
    return Layer(name, modules, match, counted=0.0 if match.scaffold else c_d(match.operation), note=note)


def _visit(
    module: nn.Module, name: str, given: Match | Unsaid | None, seen: set[nn.Module], parts: set[nn.Module]
) -> Iterator[Layer]:
    """The layers of one module; ``parts`` are those that belong to a layer elsewhere."""
    if module in seen or module in parts:
        return
    seen.add(module)
    try:
        if isinstance(given, Unsaid):
            raise given
        match = given or _matched(module)
    except Unsaid as why:
        yield Layer(name, (module,), reason=str(why))
        return
    if match is not None:
        for child_name, part in match.beside:
            child = module.get_submodule(child_name)
            for layer in _visit(child, f"{name}.{child_name}".lstrip("."), part, seen, parts):
                yield dataclasses.replace(layer, within=True)
        yield of_match(name, (module, *match.nets), match)
        return
    if gathers_statistics(module):
        yield _alone(module, name, "no word for statistics over positions")
        return
    if is_pointwise(module):
        yield Layer(name, (module,))
        return
    children = list(module.named_children())
    strange = strange_parameters(module)
    if not children:
        owned = f"owns {', '.join(strange)}" if strange else "no rule for this class, which may mix positions"
        if strange or not isinstance(module, EMPTY):
            yield _alone(module, name, owned)
        return
    if strange:
        yield Layer(name, (module,), reason=f"owns {', '.join(strange)}; its parts are listed", listed=True)
    overrides = _overrides(module)
    parts |= {net for match in overrides.values() if isinstance(match, Match) for net in match.nets}
    below: list[Layer] = []
    for child_name, child in children:
        below += _visit(child, f"{name}.{child_name}".lstrip("."), overrides.get(child_name), seen, parts)
    if not strange and "att" in type(module).__name__.lower() and not any(b.mixes or b.reason for b in below):
        yield Layer(name, (module,), reason="called attention, and no rule for this class", listed=True)
    yield from below


def _alone(module: nn.Module, name: str, otherwise: str) -> Layer:
    """A layer in no table, as it was seen to be alone."""
    match = tried(module)
    if isinstance(match, Match):
        return of_match(name, (module,), match)
    return Layer(name, (module,), note=TRIED) if match else Layer(name, (module,), reason=otherwise)


def _matched(module: nn.Module) -> Match | None:
    if uninitialized(module) and not list(module.children()):
        raise Unsaid("lazy, and not initialised yet")
    if is_deformable(module):
        raise Unsaid("offsets are given from outside, and it has no parent in which to look for what makes them")
    rule = rule_of(module, ALL_RULES)
    try:
        if rule is not None:
            return rule(module)
        attention = attention_of(module)
        return attention.match(module) if attention else scan_of(module)
    except AttributeError as error:
        raise Unsaid(f"its attributes are not those of the version that the rule was written for: {error}") from error


def _overrides(module: nn.Module) -> dict[str, Match | Unsaid]:
    overrides: dict[str, Match | Unsaid] = dict(deformable_children(module))
    for name, child in module.named_children():
        if name in CROSS:
            try:
                if attention := attention_of(child, cross=True):
                    overrides[name] = attention.match(child)
            except Unsaid as why:
                overrides[name] = why
    for name in names_of(module):
        if name in PARENTS:
            overrides |= PARENTS[name](module)
    return overrides


def with_halves(layers: list[Layer]) -> list[Layer]:
    """GWO's separable convolution: a pointwise map that directly follows a depthwise one is its second half, 1.

    Norms, activations and dropout may be between.
    """
    out, first = [], None
    for layer in layers:
        if first is not None and _is_half(layer, first):
            layer = dataclasses.replace(layer, counted=1.0, note=f"separable half of {first.name}")
            first = None
        elif _is_depthwise(layer):
            first = layer
        elif not is_elementwise(layer.modules[0]):
            first = None
        out.append(layer)
    return out


def _is_depthwise(layer: Layer) -> bool:
    op = layer.match.operation if layer.match else None
    plain = isinstance(op, Basic) and isinstance(op.path, Window) and meaning(op.weight.rho).first == 1
    return plain and layer.mixes and op.weight.kernel == Depthwise()  # type: ignore[union-attr]


def _is_half(layer: Layer, first: Layer) -> bool:
    if not layer.pointwise:
        return False
    module, channels = layer.modules[0], getattr(first.modules[0], "out_channels", None)
    if is_linear(module):
        return module.in_features == channels
    return layer.match is not None and getattr(module, "groups", 1) == 1 and module.in_channels == channels
