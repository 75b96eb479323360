"""Nearfold: convolution and self-attention as two ends of one operator."""

from nearfold.grammar import CATALOGUE, NotationError, Operation, parse, preset

__version__ = "0.1.0"

__all__ = ["CATALOGUE", "NotationError", "Operation", "__version__", "parse", "preset"]
