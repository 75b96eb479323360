"""The language: words, operations, notation and the catalogue. Pure meaning; no tensors."""

from nearfold.grammar.notation import NotationError, parse
from nearfold.grammar.operation import Basic, Branch, Operation, Sum, Weight
from nearfold.grammar.presets import CATALOGUE, Entry, preset
from nearfold.grammar.word import WORDS

__all__ = [
    "CATALOGUE",
    "WORDS",
    "Basic",
    "Branch",
    "Entry",
    "NotationError",
    "Operation",
    "Sum",
    "Weight",
    "parse",
    "preset",
]
