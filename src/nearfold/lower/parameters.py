"""Which parameters an operation owns: names, shapes and initial values, as data.

`Basic` owns query/key/value/out projections (Linear's layout), a kernel `weight` (torch's convolution layout),
`pointwise_weight`, `shift_weight`, `position_weight` and biases; what generates offsets, masks, kernels and state
spaces goes by the names of its papers' code (`x_proj`, `dt_proj`, `A_log`, `D` ...). `Sum` and `Branch` prefix their
operands' names with "0.", "1." ...; a sum hoists the query, key and value projections that operands ask for alike, so
that they share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nearfold._kept import once
from nearfold._numbers import MOST, integer
from nearfold.grammar import Basic, Branch, Operation, Sum
from nearfold.grammar.similarity import BANDS, LEARNED, Scaled, encoded_features
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import (
    Causal,
    Deformable,
    Dense,
    Depthwise,
    Experts,
    Generated,
    Modulated,
    Nearest,
    Selective,
    Separable,
    Shift,
    Softmax,
    Table,
)

MOST_NUMBERS = 2**40  # of one parameter
MOST_AXES = 8
LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out"}
SHARED = tuple(f"{LETTERS[c]}_{part}" for c in "qkv" for part in ("weight", "bias"))


@dataclass(frozen=True)
class Parameter:
    """Shape and initial values; ``fan_in`` sets the bound of uniform ones."""

    shape: tuple[int, ...]
    init: str
    fan_in: int = 1

    def __post_init__(self) -> None:
        if math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(
                f"a parameter of shape {self.shape} would hold {math.prod(self.shape)} numbers; at most {MOST_NUMBERS}"
            )


def inner_channels(op: Basic, in_channels: int, out_channels: int) -> int:
    """Channels of query, key and value after their projections."""
    own = isinstance(op.weight.kernel, (Dense, Separable, Experts))
    return out_channels if "v" in op.weight.projections and not own else in_channels


def parameters(
    op: Operation,
    in_channels: int,
    out_channels: int,
    ndim: int = 2,
    bias: bool = True,
    context_channels: int | None = None,
) -> dict[str, Parameter]:
    """Every parameter of an operation from in_channels to out_channels on ndim grid axes.

    ``context_channels`` (default in_channels) are those of the second input, which `cross` paths read.

    Raises:
        ValueError: when channels, heads and groups do not divide as the operation needs.

    >>> from nearfold import parse
    >>> parameters(parse("window(3) | box | kernel"), 4, 8)["weight"].shape
    (8, 4, 3, 3)
    """
    context_channels = in_channels if context_channels is None else context_channels
    named = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "ndim": ndim,
        "context_channels": context_channels,
    }
    for name, channels in named.items():
        integer(name, channels, most=MOST_AXES if name == "ndim" else MOST)
    if isinstance(op, Basic):
        return _basic(op, in_channels, out_channels, ndim, bias, context_channels)
    if isinstance(op, Branch):
        found: dict[str, Parameter] = {}
        for i, (operand, channels) in enumerate(zip((op.first, op.second), op.shares(out_channels), strict=True)):
            if channels:
                read = op.shares(in_channels)[i] if op.split else in_channels
                if not read:
                    raise ValueError(f"in_channels={in_channels} leave none for an operand of {op}; leave split out")
                own = parameters(operand, read, channels, ndim, bias, context_channels)
                found |= {f"{i}.{name}": p for name, p in own.items()}
        if op.mix:
            found["mix_weight"] = Parameter((out_channels, out_channels), "uniform", out_channels)
            if bias:
                found["mix_bias"] = Parameter((out_channels,), "uniform", out_channels)
        return found
    assert isinstance(op, Sum)
    operands = [parameters(term, in_channels, out_channels, ndim, bias, context_channels) for _, term in op.terms]
    hoisted = {}
    for name in SHARED:
        owners = [o for o in operands if name in o]
        if len(owners) > 1 and len({o[name] for o in owners}) == 1:
            hoisted[name] = owners[0][name]
            for o in owners:
                del o[name]
    learnable = sum(isinstance(rate, str) for rate, _ in op.terms)
    rates = {"rates": Parameter((learnable,), f"constant:{1 / len(op.terms)}")} if learnable else {}
    return rates | hoisted | {f"{i}.{name}": p for i, operand in enumerate(operands) for name, p in operand.items()}


def _basic(
    op: Basic, in_channels: int, out_channels: int, ndim: int, bias: bool, context_channels: int
) -> dict[str, Parameter]:
    weight, kernel = op.weight, op.weight.kernel
    for name in ("size", "stride", "dilation", "padding", "step", "shift"):
        if isinstance(value := getattr(op.path, name, None), tuple):
            as_tuple(value, ndim, name)
    inner = inner_channels(op, in_channels, out_channels)
    _divides(op, "groups" if isinstance(op.path, Deformable) else "heads", op.heads, inner, "channels of the value")
    found: dict[str, Parameter] = {}
    for letter in weight.projections.replace("o", ""):
        made, read = inner, in_channels
        if letter in "kv":
            made = inner * (kv_heads(op) or weight.heads) // weight.heads
            read = context_channels if op.cross else in_channels
        found[f"{LETTERS[letter]}_weight"] = Parameter((made, read), "uniform", read)
        if bias:
            found[f"{LETTERS[letter]}_bias"] = Parameter((made,), "uniform", read)
    if op.cross and context_channels != inner and not {"k", "v"} <= set(weight.projections):
        raise ValueError(f"{op}: context_channels={context_channels} need projections of key and value to {inner}")
    if ("q" in weight.projections) != ("k" in weight.projections) and inner != in_channels:
        raise ValueError(f"{op}: query and key have {inner} and {in_channels} channels; project both or none")
    found |= _compared(op, inner // weight.heads, ndim) | _generating(op, in_channels, inner, ndim, bias)
    if getattr(op.path.similarity, "relative", False) and weight.rho.needs_score:
        found["position_weight"] = Parameter((inner // weight.heads, ndim), "uniform", ndim)
        found["position_bias"] = Parameter((inner // weight.heads,), "uniform", ndim)

    values, made = inner, inner  # channels the kernel reads, and makes
    if kernel is not None:
        slots = op.path.slot_shape(ndim)
        count = math.prod(slots)
        if isinstance(kernel, (Dense, Separable)):
            made = out_channels
            if kernel.coordinates:
                values = inner + op.heads * encoded_features(kernel.coordinates, ndim)
                if kernel.coordinates == "learned":
                    found["value_encoding_weight"] = Parameter((LEARNED, 2 * BANDS * ndim), "uniform", 2 * BANDS * ndim)
            _divides(op, "groups", kernel.groups, values, "value channels")
            _divides(op, "groups", kernel.groups, out_channels, "out_channels")
        if isinstance(kernel, Dense):
            fan_in = values // kernel.groups * count
            found["weight"] = Parameter((out_channels, values // kernel.groups, *slots), "uniform", fan_in)
        elif isinstance(kernel, (Depthwise, Separable)):
            # next to softmax the kernel starts as ones: exactly k-NN attention
            plain = "uniform" if not weight.rho.needs_score else "constant:1"
            found["weight"] = Parameter((values, 1, *slots), plain, count)
            if isinstance(kernel, Separable):
                shape = (out_channels, values // kernel.groups, *(1 for _ in slots))
                found["pointwise_weight"] = Parameter(shape, "uniform", values // kernel.groups)
        elif isinstance(kernel, Experts):
            made, hidden = out_channels, max(1, values // kernel.reduction)
            found["weight"] = Parameter((kernel.count * out_channels, values, *slots), "uniform", values * count)
            found["router_reduce_weight"] = Parameter((hidden, values), "uniform", values)
            found["router_weight"] = Parameter((kernel.count, hidden), "uniform", hidden)
            found["router_bias"] = Parameter((kernel.count,), "constant:0")
        elif isinstance(kernel, Shift):
            _divides(op, "heads", kernel.heads, inner, "channels of query, key and value")
            found["weight"] = Parameter((count, 3 * kernel.heads), "uniform", 3 * kernel.heads)
            found["shift_weight"] = Parameter((inner, count, *slots), "shift")
            if kernel.bias:
                found["slot_bias"] = Parameter((count,), "uniform", 3 * kernel.heads)
    last = out_channels if "o" in weight.projections else made
    if last != out_channels:
        raise ValueError(
            f"{op}: makes {made} channels, but out_channels={out_channels}; add an output projection (project=...o)"
            " or a dense kernel, or let in_channels equal out_channels"
        )
    if "o" in weight.projections:
        found["out_weight"] = Parameter((out_channels, made), "uniform", made)
        if bias:
            found["out_bias"] = Parameter((out_channels,), "uniform", made)
    elif bias and kernel is not None and not isinstance(kernel, Shift):
        kernel_fan = found["pointwise_weight" if isinstance(kernel, Separable) else "weight"].fan_in
        found["bias"] = Parameter((out_channels,), "uniform", kernel_fan)
    return found


def kv_heads(op: Basic) -> int | None:
    """Heads of key and value where they are fewer than the queries'."""
    return op.weight.rho.kv if isinstance(op.weight.rho, Softmax) else None


def _compared(op: Basic, head: int, ndim: int) -> dict[str, Parameter]:
    """What a similarity owns that knows positions; ``head`` features of one head."""
    near, found = op.path.similarity, {}
    if not (op.weight.rho.needs_score or isinstance(op.path, Nearest)):
        return {}
    if getattr(near, "learned", False):
        lam = near.lam  # type: ignore[attr-defined]
        found["blend_logit"] = Parameter((op.weight.heads,), f"constant:{math.log(lam / (1 - lam))}")
    if near.coordinates == "learned":
        found["encoding_weight"] = Parameter((LEARNED, 2 * BANDS * ndim), "uniform", 2 * BANDS * ndim)
    if isinstance(near, Scaled):
        if near.rotary and (head < 2 * ndim or head % (2 * ndim)):
            raise ValueError(
                f"{op}: rotary turns pairs of features on each of {ndim} axes, so that a head's features must be a "
                f"multiple of {2 * ndim}, got {head}"
            )
        if near.bias == "table":
            offsets = tuple(2 * n - 1 for n in bias_reach(op, ndim))
            found["relative_bias"] = Parameter((op.weight.heads, *offsets), "normal:0.02")
    return found


def bias_reach(op: Basic, ndim: int) -> tuple[int, ...]:
    """Per axis n, so that a query lies at most n - 1 steps from a key: a table of 2 n - 1 offsets holds all of them.

    >>> from nearfold import parse
    >>> bias_reach(parse("window(3, scaled(bias=table), mode=inside, step=(3, 8)) | box | softmax"), 2)
    (3, 6)
    """
    sizes = as_tuple(op.path.size, ndim, "size")  # type: ignore[attr-defined]
    steps = as_tuple(getattr(op.path, "step", 1), ndim, "step")
    ends = (op.shape.axes or (0,)) if isinstance(op.shape, Causal) else ()
    # queries that share the window of the one in their middle may lie outside it
    return tuple(
        n if axis in ends else max(n, step // 2 + n - n // 2, step - step // 2 + n // 2)
        for axis, (n, step) in enumerate(zip(sizes, steps, strict=True))
    )


def _generating(op: Basic, in_channels: int, inner: int, ndim: int, bias: bool) -> dict[str, Parameter]:
    """What makes offsets, masks, kernels and state spaces from the input."""
    path, rho = op.path, op.weight.rho
    found = {}

    def linear(name: str, made: int, read: int, tail: tuple[int, ...] = (), init: str = "uniform") -> None:
        found[f"{name}_weight"] = Parameter((made, read, *tail), init, read)
        if bias:
            found[f"{name}_bias"] = Parameter((made,), init, read)

    if isinstance(path, Deformable):
        if ndim > 3:
            raise ValueError(f"{op}: deformable goes with one to three grid axes, got ndim={ndim}")
        slots = as_tuple(path.size, ndim, "size")
        points = path.groups * math.prod(slots)
        linear("offset", ndim * points, in_channels, slots, "constant:0")
        if isinstance(rho, Modulated):
            linear("mask", points, in_channels, slots, "constant:0")
    if isinstance(rho, Generated):
        numbers = math.prod(op.path.slot_shape(ndim)) * rho.heads
        hidden = max(1, in_channels // rho.reduction) if rho.reduction else in_channels
        if rho.reduction:
            linear("reduce", hidden, in_channels)
        linear("span", numbers, hidden)
    if isinstance(rho, Table):
        made = rho.outputs or rho.inputs
        if made != rho.inputs and ndim != 1:
            raise ValueError(f"{op}: {made} outputs of {rho.inputs} inputs are for sequences, got ndim={ndim}")
        linear("table", made, rho.inputs)
    if isinstance(rho, Selective):
        found |= _state_space(op, inner)
    return found


def _state_space(op: Basic, channels: int) -> dict[str, Parameter]:
    """Mamba's parameters in its layout: x_proj makes (dt, B, C)."""
    rho, state = op.weight.rho, op.path.state  # type: ignore[attr-defined]
    assert isinstance(rho, Selective)
    if rho.scan_heads is not None:
        heads = rho.scan_heads
        _divides(op, "heads", heads, channels, "channels of the value")
        return {
            "x_proj_weight": Parameter((heads + 2 * state, channels), "uniform", channels),
            "dt_bias": Parameter((heads,), "step"),
            "A_log": Parameter((heads,), "decay"),
            "D": Parameter((heads,), "constant:1"),
        }
    rank = rho.rank or -(-channels // 16)
    return {
        "x_proj_weight": Parameter((rank + 2 * state, channels), "uniform", channels),
        "dt_proj_weight": Parameter((channels, rank), "uniform", rank),
        "dt_proj_bias": Parameter((channels,), "step"),
        "A_log": Parameter((channels, state), "decay"),
        "D": Parameter((channels,), "constant:1"),
    }


def _divides(op: Basic, name: str, parts: int, whole: int, what: str) -> None:
    if whole % parts:
        raise ValueError(f"{op}: {name}={parts} must divide the {whole} {what}")


def part_of(op: Operation, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The part of a larger parameter that an operation reads: the first slots and channels of each axis.

    The second operand of a branch reads the last channels instead: those it makes when its share is smaller.

    >>> import torch
    >>> from nearfold import parse
    >>> hybrid = parse("branch(0.5, window(3) | box | kernel, window(3) | box | kernel)")
    >>> part_of(hybrid, "1.bias", torch.arange(4), (2,)), part_of(hybrid, "0.bias", torch.arange(4), (2,))
    (tensor([2, 3]), tensor([0, 1]))
    """
    last = _in_second(op, name)
    index = [
        slice(have - want, None) if last and axis < 2 else slice(want)
        for axis, (have, want) in enumerate(zip(tensor.shape, shape, strict=True))
    ]
    if name.endswith("relative_bias"):  # by offset: zero stays in the middle
        middle = zip(tensor.shape[1:], shape[1:], strict=True)
        index[1:] = [slice((have - want) // 2, (have + want) // 2) for have, want in middle]
    return tensor[tuple(index)]


def _in_second(op: Operation, name: str) -> bool:
    """Whether a parameter belongs to the second operand of a branch; the numbers in names count a sum's terms, too."""
    first, _, rest = name.partition(".")
    if isinstance(op, Basic) or not first.isdigit():
        return False
    if isinstance(op, Branch):
        return first == "1" or _in_second(op.first, rest)
    assert isinstance(op, Sum)
    return int(first) < len(op.terms) and _in_second(op.terms[int(first)][1], rest)


def operand(params: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """The parameters the i-th operand sees: its own, and the parent's shared projections."""
    return {mine: params[name] for mine, name in _operand_names(tuple(params), i)}


@once
def _operand_names(names: tuple[str, ...], i: int) -> tuple[tuple[str, str], ...]:
    """(What the i-th operand calls a parameter, what its parent calls it)."""
    prefix = f"{i}."
    shared = {name: name for name in SHARED if name in names}
    return tuple((shared | {n[len(prefix) :]: n for n in names if n.startswith(prefix)}).items())
