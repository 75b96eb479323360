"""One call of an operator, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from nearfold.recognise.place import Place


class Unfollowed(Exception):
    """An operator, or a call of it, that no rule follows."""


@dataclass
class Call:
    """One call of an operator.

    Attributes:
        name: of the operator, without the underscore of what works in place.
        func: the operator.
        given: arguments by name.
        place: looks up the place of a tensor; None where it depends on no input.
        solid: whether a tensor that depends on no input is a weight, so that it masks nothing.
        made: what the call returned.
        before: shapes of its inputs, before it ran.
        mixes: set by a rule where positions are mixed, moved, or may be.
    """

    name: str
    func: Any
    given: dict[str, Any]
    place: Callable[[Tensor], Place | None]
    solid: Callable[[Tensor], bool]
    made: list[Tensor]
    mixes: bool = field(default=False)

    def tensor(self, name: str) -> Tensor:
        t = self.given[name]
        assert isinstance(t, Tensor)
        return t

    def main(self, name: str) -> Place:
        """The place of an argument that must depend on the input."""
        place = self.place(self.tensor(name))
        if place is None:
            raise Unfollowed
        return place

    def only(self, *names: str) -> None:
        """No other tensor may depend on the input."""
        others = [t for name, t in self.given.items() if name not in names for t in tensors(t)]
        if any(self.place(t) is not None for t in others):
            raise Unfollowed


def tensors(tree: Any) -> list[Tensor]:
    """All tensors among arguments."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
