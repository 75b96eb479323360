"""The compiled CPU engine: found where the package was built with a compiler, otherwise one notice and PyTorch.

``NEARFOLD_ENGINE`` in the environment chooses: ``off`` (the PyTorch path), or an instruction set (``amx``, ``avx512``,
``avx2``, ``generic``); without it, the best one this machine can run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

OFF = "off"
COMPUTE = (torch.float32, torch.float64)
_forced_off = 0  # how many `forced("off")` are open


@functools.cache
def _compiled() -> ModuleType | ImportError:
    try:
        return importlib.import_module("._engine", __package__)
    except ImportError as error:
        return error


if os.environ.get("NEARFOLD_ENGINE") != OFF:
    _compiled()  # at import, for it must see every fork: a child has lost torch's pool of threads, used here or not


@functools.cache
def _load() -> ModuleType | None:
    wanted = os.environ.get("NEARFOLD_ENGINE", "")
    if wanted == OFF:
        return None
    module = _compiled()
    if isinstance(module, ImportError):
        if wanted:
            raise ImportError(
                f"NEARFOLD_ENGINE={wanted!r} asks for the compiled engine, but it is not there ({module}); install "
                "nearfold where a C++ compiler is, or set NEARFOLD_ENGINE=off"
            ) from module
        warnings.warn(
            "nearfold was installed without its compiled CPU engine (no C++ compiler?): the PyTorch path runs "
            "instead, with the same results, several times slower. Install again where a C++17 compiler is, or set "
            "NEARFOLD_ENGINE=off to silence this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if wanted:
        module.use(wanted)  # ValueError with the names this machine can run
    return module


def get() -> ModuleType | None:
    """The compiled module, or None."""
    return None if _forced_off else _load()


def run(function: str, *args: Any) -> Any:
    """Call a function of the compiled engine, which is there: what it returns.

    Tensors cross as DLPack capsules: the engine would ask each for one through Python, three microseconds a tensor.
    """
    module = get()
    assert module is not None
    return getattr(module, function)(*map(_lent, args))


def _lent(x: Any) -> Any:
    if isinstance(x, Tensor):
        return to_dlpack(x)
    return [to_dlpack(t) for t in x] if isinstance(x, list) and x and isinstance(x[0], Tensor) else x


def serves(*tensors: Tensor | None) -> bool:
    """Whether the engine runs on these: it is there, and they are float32 or float64 alike, on the CPU."""
    there = [t for t in tensors if t is not None]
    first = there[0]
    return (
        first.dtype in COMPUTE
        and all(t.device.type == "cpu" and t.dtype == first.dtype for t in there)
        and get() is not None
    )


SHARE = 2**22  # multiplications for which one more thread is worth being woken


def threads(work: int | None = None) -> int:
    """As many as torch uses; fewer where there is so little to do that to share it costs more.

    >>> threads(1000)
    1
    """
    most = torch.get_num_threads()
    return most if work is None else min(most, 1 + work // SHARE)


def names() -> tuple[str, ...]:
    """What `forced` takes: the instruction sets this machine can run, best first, and "off".

    >>> names()[-1]
    'off'
    """
    module = _load()
    return (*(module.names() if module is not None else ()), OFF)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Within it one instruction set, or the PyTorch path, serves every thread. For tests and comparisons.

    >>> with forced("off"):
    ...     get() is None
    True
    """
    global _forced_off
    if name == OFF:
        _forced_off += 1
        try:
            yield
        finally:
            _forced_off -= 1
        return
    module = _load()
    if module is None:
        raise ValueError(f"name={name!r}: there is no compiled engine here, only {OFF!r}")
    before = module.chosen()
    module.use(name)
    try:
        yield
    finally:
        module.use(before)


def describe() -> str:
    """Which code serves CPU tensors, in a few words."""
    module = get()
    return "PyTorch" if module is None else f"C++ ({module.chosen()})"
