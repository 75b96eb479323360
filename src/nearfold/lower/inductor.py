"""A repair of torch's own compiler, needed wherever a layer stands between convolutions on the CPU.

With open sizes, Inductor orders the strides of views that the backward will read, and makes two mistakes (pytorch issue
185510; any attention between two convolutions is enough, without this library):

- it asks for the order of symbolic expressions without the sizes at hand, which it has: `TypeError: cannot determine
  truth value of Relational` (torch 2.13 and 2.14);
- it asks whether one symbolic stride divides another in a form whose range it cannot bound: `ValueRangeError` (2.13).

docs/decisions/0023 says what else was tried.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch


def _sized(order: Callable[..., Sequence[int]], graph: Any) -> Callable[..., Sequence[int]]:
    """The function that orders strides, given the sizes at hand where its caller forgot them."""

    @functools.wraps(order)
    def with_sizes(seq: Sequence[Any], shape_env: Any = None) -> Sequence[int]:
        if shape_env is None and any(getattr(n, "free_symbols", None) for n in seq):
            shape_env = getattr(getattr(graph(), "sizevars", None), "shape_env", None)
        return order(seq, shape_env)

    return with_sizes


def _or_false(ask: Callable[[Any, Any], bool], unknown: type[Exception]) -> Callable[[Any, Any], bool]:
    """A question that is answered False where it cannot be told, as its name says; it raises instead."""

    @functools.wraps(ask)
    def told(left: Any, right: Any) -> bool:
        try:
            return ask(left, right)
        except unknown:
            return False

    return told


@functools.cache
def _repair() -> None:
    try:
        from torch._inductor import ir
        from torch._inductor.virtualized import V
        from torch.utils._sympy.value_ranges import ValueRangeError

        arranged = list(inspect.signature(ir.get_fill_order).parameters)
        if arranged != ["seq", "shape_env"]:
            raise AttributeError(f"ir.get_fill_order takes {arranged}")
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"torch {torch.__version__} arranges its compiler otherwise ({error}): nearfold leaves it alone (pytorch "
            "issue 185510). Should torch.compile say `cannot determine truth value of Relational`, compile with "
            "dynamic=False or options={'layout_optimization': False}",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    ir.get_fill_order = _sized(ir.get_fill_order, lambda: V.graph)
    name = "_stride_expr_ge_or_false"
    if hasattr(ir.Layout, name):  # the second mistake came with it, and is not in torch 2.9
        setattr(ir.Layout, name, staticmethod(_or_false(getattr(ir.Layout, name), ValueRangeError)))


@torch.compiler.assume_constant_result
def repaired() -> bool:
    """Called while torch.compile traces a layer, before anything of it is lowered: True."""
    _repair()
    return True
