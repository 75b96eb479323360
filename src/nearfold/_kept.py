"""What depends on sizes alone is made once, not at every call: `once` for values, `kept` for tables of integers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MANY = 4096  # values of each function that are remembered
MOST = 2**16  # numbers of a table that is kept: making a larger one takes little beside what it is made for
TABLES = 128  # of each function: 64 MiB at most

_INFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_PLAIN = _INFERENCE | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def is_idle() -> bool:
    """Whether nothing watches or turns what torch does now: no compiler, tracer, mode, transform or profiler.

    >>> is_idle(), torch.vmap(lambda x: x * is_idle())(torch.ones(1))
    (True, tensor([0.]))
    """
    if torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
        return False
    # what the dispatcher includes while nothing is on, and in inference mode; all the others add to it
    return torch._C._dispatch_tls_local_include_set() in (_PLAIN, _INFERENCE)


def once(make: Callable[..., T]) -> Callable[..., T]:
    """A function of hashable arguments that remembers its values; compiled, it is traced like any other.

    >>> @once
    ... def twice(n):
    ...     return [2 * n]
    >>> twice(3) is twice(3)
    True
    """
    remembered = functools.lru_cache(MANY)(make)

    @functools.wraps(make)
    def value(*args: Any) -> T:
        return make(*args) if torch.compiler.is_compiling() else remembered(*args)

    return value


def kept(make: Callable[..., Tensor], most: int = MOST, tables: int = TABLES) -> Callable[..., Tensor]:
    """A function of hashable arguments that makes a table; one on the CPU is kept. Nobody may write into it.

    Under a compiler, a tracer, a mode or a transform it is made anew, for there a tensor may stand for another one.

    Args:
        make: the function.
        most: numbers of a table that is kept.
        tables: how many are.
    """

    @functools.lru_cache(tables)
    def remembered(*args: Any) -> Tensor | None:
        with torch.inference_mode(False):  # autograd may save it later
            table = make(*args)
        return table if table.is_cpu and table.numel() <= most else None

    @functools.wraps(make)
    def table(*args: Any) -> Tensor:
        found = remembered(*args) if is_idle() else None
        return make(*args) if found is None else found

    return table
