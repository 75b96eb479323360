"""A row of the catalogue."""

from __future__ import annotations

from dataclasses import dataclass

from nearfold.grammar.notation import parse
from nearfold.grammar.operation import Operation


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue: how an operator of the field is spelled here, and the three words in prose."""

    name: str
    title: str
    notation: str
    words: tuple[str, str, str]
    source: str

    @property
    def operation(self) -> Operation:
        """The parsed operation."""
        return parse(self.notation)
