"""Which Triton kernels serve CUDA tensors; PyTorch does where there is none.

``NEARFOLD_ENGINE=off`` chooses the PyTorch path. Sums that several programs add to are made in a fixed order;
``NEARFOLD_ATOMICS=1`` allows faster ones whose rounding differs from run to run. ``NEARFOLD_SELECT`` chooses how the k
best are found: ``two_pass`` (the default), where that one serves, or ``threshold``; the keys are the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from nearfold.kernels.engine import OFF

SEARCHES = ("two_pass", "threshold")

_interpreted = 0  # how many `interpreted()` are open
_recorded = 0  # how many `recorded()`


@functools.cache
def _load(name: str) -> ModuleType | None:
    if os.environ.get("NEARFOLD_ENGINE") == OFF:
        return None
    try:
        return importlib.import_module(f".triton.{name}", __package__)
    except ImportError as error:
        warnings.warn(
            f"Triton is not here ({error}): tiled PyTorch runs on the GPU instead, with the same results, slower and "
            "with more memory. pip install triton, or set NEARFOLD_ENGINE=off to silence this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def kernels(name: str, *tensors: Tensor | None) -> ModuleType | None:
    """The module of kernels of this name, where all tensors are on a CUDA device and Triton is installed.

    >>> import torch
    >>> kernels("select", torch.zeros(1)) is None
    True
    """
    there = [t for t in tensors if t is not None]
    if not all(t.is_cuda for t in there) and not _interpreted and not _recorded:
        return None
    return _load(name)


def serves(t: Tensor, interpreter: bool) -> bool:
    """Whether the kernels run on a tensor's device; ``interpreter`` says whether Triton interprets them.

    >>> serves(torch.zeros(1), interpreter=True), serves(torch.zeros(1), interpreter=False)
    (True, False)
    """
    return t.device.type == ("meta" if _recorded else "cpu" if interpreter else "cuda")


def deterministic() -> bool:
    """Whether every result must be the same from run to run: unless NEARFOLD_ATOMICS=1, and whenever torch says so.

    >>> deterministic()
    True
    """
    return os.environ.get("NEARFOLD_ATOMICS") != "1" or torch.are_deterministic_algorithms_enabled()


def search() -> str:
    """How the k best are to be found, one of ``SEARCHES``; ValueError where NEARFOLD_SELECT names another.

    >>> search()
    'two_pass'
    """
    wanted = os.environ.get("NEARFOLD_SELECT") or SEARCHES[0]
    if wanted not in SEARCHES:
        raise ValueError(f"NEARFOLD_SELECT={wanted!r} is none of {', '.join(SEARCHES)}; set one of them, or unset it")
    return wanted


def is_interpreted() -> bool:
    """Whether the kernels serve CPU tensors now.

    >>> is_interpreted()
    False
    """
    return _interpreted > 0


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it the kernels serve CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1): for tests."""
    global _interpreted
    _interpreted += 1
    try:
        yield
    finally:
        _interpreted -= 1


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Within it the kernels are asked to serve meta tensors, which hold no numbers: triton/launches.py."""
    global _recorded
    _recorded += 1
    try:
        yield
    finally:
        _recorded -= 1
