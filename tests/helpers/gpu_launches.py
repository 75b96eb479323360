"""What the GPU's benchmark and the GPU's tests launch, asked for on the meta device: every specialisation of a kernel.

Integers that are 1 or multiples of 16 and pointers that 16 does not divide are compiled anew, and a fault of a compiler
may be in one of these alone. Imports tests/test_gpu.py, which needs no device for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import test_gpu
import test_torch_stack as stack
import torch

from benchmarks.case import Case
from benchmarks.gpu import cases, contact, model
from nearfold.kernels.triton import launches
from nearfold.testing import CASES, backends_of, context_for, make

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
META = torch.device("meta")
Found = list[launches.Launch]


def benchmark() -> Iterator[Found]:
    """Of the benchmark's rows, and of the first calls."""
    for name in model.ROWS:
        yield model.asked(name, backward=bool(model.TARGETS[name].both))[0]
    for name in sorted(contact.CONTACTS.keys() - {contact.COMPILED} - cases.CASES.keys()):
        forward, inputs = contact.CONTACTS[name](META, torch.bfloat16, False)
        with launches.asked() as found:
            forward(*(x.requires_grad_() for x in inputs)).sum().backward()
        yield found


def tests() -> Iterator[Found]:
    """Of tests/test_gpu.py: sizes of many tiles, conformance, torch's own machinery."""
    absent = mock.Mock(side_effect=ImportError("not asked for"))
    for build, arguments in test_gpu.SIZES.values():
        for dtype in DTYPES:
            with (
                mock.patch.object(cases, "_flex", absent),
                mock.patch.object(cases.optional, "natten_neighbourhood", absent),
            ):
                yield _case(build(META, dtype, **arguments).case)
    for name in stack.LAYERS:
        layer, x = stack.made(name, "meta")
        with launches.asked() as found:
            layer(x.requires_grad_()).sum().backward()
        yield found
    for op in CASES.values():
        for dtype in DTYPES:
            layer, x = make(op, (7, 6), dtype, device="meta")
            for backend in backends_of(layer.operation, x.dim() - 2, dtype, "meta"):
                layer.backend = backend
                yield _conformance(layer, x)


def _case(case: Case) -> Found:
    inputs = tuple(x.detach().requires_grad_(case.backward) for x in case.inputs)
    with launches.asked() as found:
        y = case.ours(*inputs)
        if case.backward:
            y.sum().backward()
    return found


def _conformance(layer: Any, x: torch.Tensor) -> Found:
    context = context_for(layer, torch.zeros(x.shape, dtype=x.dtype))
    more = () if context is None else (context.detach().to(META).requires_grad_(),)
    with launches.asked() as found:
        try:
            layer(x.detach().requires_grad_(), *more).sum().backward()
        except RuntimeError as error:  # a search that has no kernel looks at numbers; what was launched before counts
            if "meta tensors" not in str(error):
                raise
    return found


def distinct(found: Iterator[Found], whole: bool = False) -> list[dict[str, Any]]:
    """One variant of every kernel and specialisation; ``whole``: also of every type and size of its tiles."""
    kept: dict[Any, dict[str, Any]] = {}
    for each in found:
        for launch in each:
            variant = launch.variant()
            kept.setdefault(launches.key(variant) if whole else _specialisation(variant), variant)
    return list(kept.values())


def _specialisation(variant: dict[str, Any]) -> Any:
    """Of which arguments the compiler knows what, and what the kernel is told to leave out."""
    known = {name: (t.partition(":")[2] or t[:1] == "*") for name, t in variant["signature"].items()}
    told = {n: v for n, v in variant["constexprs"].items() if type(v) is bool or v in (None, 1) or n.startswith("M")}
    return variant["fn"].__module__, variant["fn"].__name__, *sorted(known.items()), *sorted(told.items(), key=str)
