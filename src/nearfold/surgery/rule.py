"""`Rule`: which layers to replace, and by what."""

from __future__ import annotations

import fnmatch
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from nearfold.grammar import Operation, parse
from nearfold.recognise.foreign import plain
from nearfold.surgery.sites import Site

Target = str | Operation


@dataclass(frozen=True)
class Rule:
    """Which layers to replace, and by what. Every condition that is given must hold.

    Attributes:
        to: the operation: notation, an Operation, or a function from a `Site` to one of them (None: keep the layer).
            Words in braces are filled in from the layer: {self} is its own operation, {heads}, {size}, {stride},
            {dilation}, {padding} and {groups} its arguments.
        kind: "conv", "attention", a class, or a class's name.
        name: a shell pattern for the dotted name, such as "layer3.*.conv2".
        kernel_size: of a convolution.
        stage: the first number in the name of what the layer is in, such as 3 in layer3.0.conv2; one or several.
        where: a condition of your own, from a `Site` to a bool.
        start: where the operation starts, for `SpectrumSchedule` to move on from: ``ratio``, ``lam``, ``k`` or
            ``candidates``. The layer keeps room for both.

    >>> Rule("nearest(9, scaled) | ranked | softmax(heads={heads})", kind="attention", name="blocks.*").kind
    'attention'
    """

    to: Target | Callable[[Site], Target | None]
    kind: str | type | None = None
    name: str = "*"
    kernel_size: int | tuple[int, ...] | None = None
    stage: int | tuple[int, ...] | None = None
    where: Callable[[Site], bool] | None = None
    start: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, "*", {})}
        return f"Rule({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __post_init__(self) -> None:
        if not (isinstance(self.to, str | Operation) or callable(self.to)):
            raise ValueError(f"to must be an operation, its notation or a function of a site, got {self.to!r}")
        if isinstance(self.to, str):
            words = {name for _, name, _, _ in string.Formatter().parse(self.to) if name is not None}
            unknown = words - {"self", "heads", "size", "stride", "dilation", "padding", "groups"}
            if unknown:
                raise ValueError(f"to={self.to!r}: nothing is called {{{min(unknown)}}} here; see Rule")

    def matches(self, site: Site) -> bool:
        """Whether a layer fulfils every condition."""
        return self.miss(site) == ""

    def miss(self, site: Site) -> str:
        """The first condition that a layer does not fulfil; empty where it fulfils every one."""
        size = plain(self.kernel_size) if isinstance(self.kernel_size, tuple) else self.kernel_size
        stages = (self.stage,) if isinstance(self.stage, int) else self.stage
        if self.kind is not None and not _is(site, self.kind):
            return "kind"
        if not fnmatch.fnmatchcase(site.name, self.name):
            return "name"
        if size is not None and site.kernel_size != size:
            return "kernel_size"
        if stages is not None and site.stage not in stages:
            return "stage"
        return "" if self.where is None or self.where(site) else "where"

    def asks_for(self, name: str, module: nn.Module) -> bool:
        """Whether a layer that cannot be replaced is what the rule is about, as far as its name and class say."""
        looks = looks_like(module)
        of_kind = isinstance(self.kind, type) and isinstance(module, self.kind)
        return (
            fnmatch.fnmatchcase(name, self.name)
            and (self.kind is None or of_kind or self.kind in (looks, type(module).__name__))
            and (self.kernel_size is None or looks == "conv")
            and (self.where is None or self.kind is not None or self.name != "*")  # it asks for a `Site`
        )

    def operation(self, site: Site) -> Operation | None:
        """What to put in a layer's place; None: keep it.

        Raises:
            ValueError: when the notation does not parse, or asks for what the layer does not have.
        """
        to = self.to if isinstance(self.to, str | Operation) else self.to(site)
        if to is None or isinstance(to, Operation):
            return to
        try:
            return parse(to.format_map(site.words))
        except KeyError as missing:
            raise ValueError(f"it has no {missing.args[0]}, which to={to!r} asks for") from None


def looks_like(module: nn.Module) -> str:
    """The kind of a layer that cannot be replaced, by the name of its class."""
    name = type(module).__name__.lower()
    return "conv" if "conv" in name else "attention" if "att" in name else "other"


def _is(site: Site, kind: str | type) -> bool:
    if isinstance(kind, type):
        return isinstance(site.module, kind)
    return kind in (site.kind, type(site.module).__name__)
