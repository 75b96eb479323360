"""Nearfold: convolution and self-attention as two ends of one operator.

The parts (``nearfold.nn``, ``nearfold.lower``, ``nearfold.compat``, ``nearfold.train`` ...) load at their first use.

>>> import nearfold
>>> print(nearfold.parse("nearest(9,cosine)|ranked|kernel"))
nearest(9, cosine) | ranked | kernel
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfold.examine import xray
    from nearfold.grammar import CATALOGUE, NotationError, Operation, parse, preset
    from nearfold.kernels.points import knn, knn_graph
    from nearfold.look import mixing_matrix
    from nearfold.nn.functional import deform_attn
    from nearfold.recognise import complexity, describe
    from nearfold.surgery.convert import convert
    from nearfold.surgery.rule import Rule
    from nearfold.surgery.schedule import SpectrumSchedule

__version__ = "0.2.0"

__all__ = [
    "CATALOGUE",
    "NotationError",
    "Operation",
    "Rule",
    "SpectrumSchedule",
    "__version__",
    "complexity",
    "convert",
    "deform_attn",
    "describe",
    "knn",
    "knn_graph",
    "mixing_matrix",
    "parse",
    "preset",
    "xray",
]

_PACKAGES = [
    "compat",
    "examine",
    "extend",
    "grammar",
    "kernels",
    "look",
    "lower",
    "mixing",
    "models",
    "nn",
    "recognise",
    "study",
    "surgery",
    "testing",
    "train",
]
_NAMES = {
    "CATALOGUE": "grammar",
    "NotationError": "grammar",
    "Operation": "grammar",
    "Rule": "surgery",
    "SpectrumSchedule": "surgery",
    "complexity": "recognise",
    "convert": "surgery",
    "deform_attn": "nn",
    "describe": "recognise",
    "knn": "kernels.points",
    "knn_graph": "kernels.points",
    "mixing_matrix": "look",
    "parse": "grammar",
    "preset": "grammar",
    "xray": "examine",
}


def __getattr__(name: str) -> Any:
    """Load a part of the library at its first use: ``import nearfold`` alone stays light."""
    if name in _NAMES:
        return getattr(importlib.import_module(f"nearfold.{_NAMES[name]}"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"nearfold.{name}")
    raise AttributeError(f"module 'nearfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Everything that `__getattr__` finds, too: so that a prompt completes it."""
    return sorted({*globals(), *_PACKAGES, *_NAMES})
