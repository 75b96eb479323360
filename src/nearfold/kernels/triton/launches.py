"""What our kernels are launched with: seen while they run, or asked for on the meta device, where nothing runs.

A launch is written as a variant of `compiled`: the types of its arguments, those that the compiler makes constants of,
and its options. Triton compiles anew for integers that are 1 (constants) or multiples of 16 (":16"), and for pointers
that 16 does not divide (":1").
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from nearfold.kernels import aggregate_torch, cuda, operator

DEFAULTS = {"num_warps": 4, "num_stages": 3}  # of a launch on NVIDIA's devices that says nothing
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, its grid and its options."""

    fn: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Module and kernel.

        >>> from nearfold.kernels.triton.corners import _corners_kernel
        >>> Launch(_corners_kernel, {}, (1,), {}).name
        'corners._corners_kernel'
        """
        return f"{self.fn.fn.__module__.rpartition('.')[2]}.{self.fn.fn.__name__}"

    def variant(self) -> dict[str, Any]:
        """What `compiled.compile_variant` takes, as the launch would have it compiled."""
        parameters = inspect.signature(self.fn.fn).parameters
        unknown = getattr(self.fn, "do_not_specialize", None) or ()  # what interprets a kernel knows no such thing
        signature, constexprs = {}, {}
        for name, parameter in parameters.items():
            given = self.arguments[name]
            if "constexpr" in str(parameter.annotation) or given is None:
                constexprs[name] = given
            elif name in unknown:
                signature[name] = _type(given).partition(":")[0]
            elif type(given) is int and given == 1:
                constexprs[name] = given
            else:
                signature[name] = _type(given)
        return {"fn": self.fn, "signature": signature, "constexprs": constexprs, **self.options}


def _type(given: Any) -> str:
    """An argument's type in Triton's words: ":16" where 16 divides an integer, ":1" where it divides no pointer."""
    if isinstance(given, Tensor):
        even = given.storage_offset() * given.element_size() % 16 == 0  # an allocation starts at a multiple of 512
        return f"*{TYPES[given.dtype]}{'' if even else ':1'}"
    if isinstance(given, bool):
        return "i1"
    if isinstance(given, float):
        return "fp32"
    return f"{'i32' if -(2**31) <= given < 2**31 else 'i64'}{':16' if given % 16 == 0 else ''}"


def key(variant: dict[str, Any]) -> tuple[Any, ...]:
    """What two launches have in common that are served by one compilation."""
    named = {n: getattr(v, "__name__", v) for n, v in variant["constexprs"].items()}
    options = {n: v for n, v in variant.items() if n not in ("fn", "signature", "constexprs")}
    parts = (variant["signature"], named, options)
    return (variant["fn"].__module__, variant["fn"].__name__, *(tuple(sorted(p.items(), key=str)) for p in parts))


@contextlib.contextmanager
def _watched(see: Callable[[Launch], None], run: bool) -> Iterator[None]:
    real = KernelInterface.__getitem__

    def launched(fn: Any, grid: Any) -> Callable[..., Any]:
        start = real(fn, grid)
        if not fn.fn.__module__.startswith("nearfold."):
            return start

        def call(*given: Any, **named: Any) -> Any:
            parameters = inspect.signature(fn.fn).parameters
            ours = {n: v for n, v in named.items() if n in parameters}
            bound = inspect.signature(fn.fn).bind(*given, **ours)
            bound.apply_defaults()
            options = DEFAULTS | {n: v for n, v in named.items() if n not in parameters}
            see(Launch(fn, dict(bound.arguments), tuple(grid) if not callable(grid) else (), options))
            return start(*given, **named) if run else None

        return call

    with mock.patch.object(KernelInterface, "__getitem__", launched):
        yield


@contextlib.contextmanager
def seen() -> Iterator[list[Launch]]:
    """The launches made within it, which run as ever; some microseconds more each, so not while a clock runs."""
    found: list[Launch] = []
    with _watched(found.append, run=True):
        yield found


@contextlib.contextmanager
def asked() -> Iterator[list[Launch]]:
    """The launches that calls on meta tensors would make: of any size, for nothing is computed and no device needed.

    A result's numbers are nobody's, so this sees the launches of code that looks at no number on the host.
    """
    found: list[Launch] = []
    direct = mock.patch.object(operator, "unwatched", lambda args: True)  # the operator itself, not its shapes
    plain = mock.patch.object(torch, "autocast", lambda *given, **named: contextlib.nullcontext())  # meta has none
    # PyTorch's path, tile by tile, launches nothing of ours, and looks at indices
    untiled = mock.patch.object(aggregate_torch, "tiles", lambda *given, **named: iter(()))
    with cuda.recorded(), direct, plain, untiled, _watched(found.append, run=False):
        yield found
