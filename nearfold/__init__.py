"""Nearfold: convolution and self-attention as two ends of one operator.

The parts (``nearfold.nn``, ``nearfold.lower``, ``nearfold.compat``, ``nearfold.train`` ...) load at their first use.

>>> import nearfold
>>> print(nearfold.parse("nearest(9,cosine)|ranked|kernel"))
nearest(9, cosine) | ranked | kernel
"""

import importlib
from types import ModuleType

from nearfold.grammar import CATALOGUE, NotationError, Operation, parse, preset

__version__ = "0.1.0"

__all__ = ["CATALOGUE", "NotationError", "Operation", "__version__", "parse", "preset"]

_PACKAGES = ("compat", "grammar", "kernels", "lower", "models", "nn", "study", "testing", "train")


def __getattr__(name: str) -> ModuleType:
    """Load a part of the library at its first use: ``import nearfold`` alone stays light."""
    if name in _PACKAGES:
        return importlib.import_module(f"nearfold.{name}")
    raise AttributeError(f"module 'nearfold' has no attribute {name!r}")
