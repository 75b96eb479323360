"""`explain`: which backend runs an operation, why the others do not, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nearfold._numbers import integer, plain, shown
from nearfold.grammar import Basic, Operation
from nearfold.kernels import engine
from nearfold.kernels.long_conv import TRANSFORMS
from nearfold.lower.extent import unfilled
from nearfold.lower.parameters import MOST_NUMBERS, parameters
from nearfold.lower.plan import Context, apply, lower, operation, verdicts
from nearfold.lower.verdict import Facts, Verdict

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST = 1 << 40
"""Numbers of an input, at most: 4 TiB in float32."""


@dataclass(frozen=True)
class Part:
    """One `Basic` operation: the backend that runs it and every verdict."""

    operation: Basic
    backend: str
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; ``str()`` is a table.

    FLOPs count a multiply and an add as two, in evaluation (random candidates are not drawn); of a part that runs
    on the oracle they count the projections only. ``bytes`` is the least traffic: input, parameters, output, once.
    ``notes``: what was asked for that this grid cannot give.
    """

    operation: Operation
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    parts: tuple[Part, ...]
    parameters: int
    forward_flops: int
    backward_flops: int
    bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            str(self.operation),
            f"{'x'.join(map(str, self.shape))} -> {'x'.join(map(str, self.out_shape))}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
            + (f", kernels in {engine.describe()}" if self.device == "cpu" else ""),
        ]
        for part in self.parts:
            if len(self.parts) > 1:
                lines.append(f"\n  {part.operation}")
            for name, verdict in part.verdicts.items():
                mark = "->" if name == part.backend else "  "
                can = verdict.exactness if verdict.ok else "no"
                lines.append(f"  {mark} {name:<7} {can:<9} {verdict.reason}")
        lines.append(
            f"\n  parameters {self.parameters:,}   FLOPs forward {_si(self.forward_flops)}, backward "
            f"{_si(self.backward_flops)}   least traffic {_si(self.bytes)}B"
        )
        if any(part.backend == "oracle" for part in self.parts):
            lines.append("  (FLOPs of parts on the oracle are not counted)")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}".strip() + ("" if unit else " ")
        number /= 1000
    return f"{number:.3g} P"


def input_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape (batch, channels, *grid) as Python's own integers; ValueError unless it is one."""
    sizes = plain(tuple(shape)) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) < 3 or any(type(n) is not int or n < 1 for n in sizes):
        raise ValueError(f"shape must be (batch, channels, *grid), positive integers, got {shown(plain(shape))}")
    if math.prod(sizes) > MOST_NUMBERS:
        raise ValueError(f"shape {shown(sizes)} holds more than {MOST_NUMBERS} numbers")
    return sizes


def backend(op: Operation | str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    """Names of the backends that run an operation on CPU, joined by "+" where its parts differ.

    >>> backend("window(3) | box | kernel", (1, 8, 4, 4))
    'conv'
    """
    op, shape = operation(op), input_shape(shape)
    names = [lower(Facts(part, len(shape) - 2, dtype, "cpu", True)) for part in op.parts]
    return "+".join(dict.fromkeys(names))


def _context(op: Operation, x: Tensor) -> Context | None:
    """A second input like the first, where one is read; a list of them where several maps are."""
    levels = max(getattr(part.path, "levels", 1) for part in op.parts)
    own = x.detach()
    return [own] * levels if levels > 1 else own if op.needs_context else None


def explain(
    op: Operation | str,
    shape: tuple[int, ...],
    out_channels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    grad: bool = True,
) -> Explanation:
    """Why an operation runs the way it does, and what one call costs.

    Args:
        op: an operation or its notation.
        shape: of the input, (B, C, *grid); of the context too, where the operation reads one.
        out_channels: default C.
        dtype: of the input.
        device: type of the device it would run on; nothing is run there.
        grad: whether gradients are wanted.

    Raises:
        ValueError: when the shape does not fit the operation.

    >>> print(explain("window(3) | box | kernel", (1, 8, 4, 4)).parts[0].backend)
    conv
    """
    op, shape = operation(op), input_shape(shape)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {shown(dtype)}")
    if math.prod(shape) > MOST:
        raise ValueError(f"shape must be of at most {MOST:,} numbers, got {tuple(shape)}, {math.prod(shape):,} numbers")
    ndim, channels = len(shape) - 2, shape[1]
    out_channels = channels if out_channels is None else integer("out_channels", out_channels)
    parts = []
    for part in op.parts:
        facts = Facts(part, ndim, dtype, device, grad)
        parts.append(Part(part, lower(facts), verdicts(facts)))
    specs = parameters(op, channels, out_channels, ndim)
    params = {
        name: torch.empty(spec.shape, dtype=dtype, device="meta", requires_grad=grad) for name, spec in specs.items()
    }
    x = torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)
    with FlopCounterMode(display=False, custom_mapping=TRANSFORMS) as forward:
        y = apply(op, params, x, out_channels=out_channels, context=_context(op, x))
    with FlopCounterMode(display=False, custom_mapping=TRANSFORMS) as backward:
        if grad and y.requires_grad:
            y.sum().backward()
    count = sum(math.prod(spec.shape) for spec in specs.values())
    traffic = (x.numel() + y.numel() + count) * x.element_size()
    return Explanation(
        op,
        shape,
        tuple(y.shape),
        dtype,
        device,
        tuple(parts),
        count,
        forward.get_total_flops(),
        backward.get_total_flops(),
        traffic,
        tuple(unfilled(op, shape[2:], shape[2:])),
    )
