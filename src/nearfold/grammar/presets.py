"""Named operations: the catalogue behind `nearfold ops`, and functions that build the usual ones."""

from __future__ import annotations

from nearfold.grammar.entry import Entry
from nearfold.grammar.families import attention, fast, neighbours, sequences, several, windows
from nearfold.grammar.notation import NAMES, did_you_mean
from nearfold.grammar.operation import Operation

_FAMILIES: dict[str, tuple[Entry, ...]] = {
    **windows.FAMILIES,
    **several.FAMILIES,
    **attention.FAMILIES,
    **neighbours.FAMILIES,
    **sequences.FAMILIES,
    **fast.FAMILIES,
}
FAMILIES: dict[str, tuple[str, ...]] = {family: tuple(e.name for e in entries) for family, entries in _FAMILIES.items()}
CATALOGUE: dict[str, Entry] = {entry.name: entry for entries in _FAMILIES.values() for entry in entries}
"""The operators that have a name, by name."""
NAMES.update({name: (entry.notation, f"{entry.title} {entry.source}") for name, entry in CATALOGUE.items()})


def preset(name: str) -> Operation:
    """The operation of a catalogue entry.

    >>> print(preset("convnn"))
    nearest(9, cosine, self) | ranked | kernel
    """
    return entry_of(name).operation


def entry_of(name: str) -> Entry:
    """The catalogue's entry of this name.

    Raises:
        ValueError: when there is none, with those that may be meant.
    """
    if name not in CATALOGUE:
        raise ValueError(f"the catalogue has no {name!r}{did_you_mean(name)}; its names: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]
