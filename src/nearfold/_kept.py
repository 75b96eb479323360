"""`kept`: tables of integers that depend on sizes alone are made once, not at every call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")
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


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A function that makes a table on the CPU from hashable arguments; whoever gets it must not write into it.

    Under a compiler, a tracer, a mode or a transform it is made anew, for there a tensor may stand for another one.
    """

    @functools.lru_cache(TABLES)
    def remembered(*args: P.args, **named: P.kwargs) -> Tensor | None:
        with torch.inference_mode(False):  # autograd may save it later
            table = make(*args, **named)
        return table if table.is_cpu and table.numel() <= MOST else None

    @functools.wraps(make)
    def table(*args: P.args, **named: P.kwargs) -> Tensor:
        if is_idle():
            found = remembered(*args, **named)  # type: ignore[arg-type]
            if found is not None:
                return found
        return make(*args, **named)

    return table
