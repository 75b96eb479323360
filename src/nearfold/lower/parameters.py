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
from nearfold.grammar.place import BANDS, LEARNED
from nearfold.grammar.word import as_tuple
from nearfold.lower.meaning import Sizes, meaning

MOST_NUMBERS = 2**40  # of one parameter
MOST_AXES = 8
LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out"}
SHARED = tuple(f"{LETTERS[c]}_{part}" for c in "qkv" for part in ("weight", "bias"))


@dataclass(frozen=True)
class Parameter:
    """Shape and initial values; ``fan_in`` sets the bound of uniform ones.

    ``decays``: whether an optimizer that decays weights should decay it. Rates, places, learned tokens and the
    constants of a recurrence do not: at zero they would say something, not nothing.
    """

    shape: tuple[int, ...]
    init: str
    fan_in: int = 1
    decays: bool = True

    def __post_init__(self) -> None:
        if math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(
                f"a parameter of shape {self.shape} would hold {math.prod(self.shape)} numbers; at most {MOST_NUMBERS}"
            )


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
        for i, (operand, channels) in enumerate(zip(op.operands, op.shares(out_channels), strict=True)):
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
    operands = [parameters(term, in_channels, out_channels, ndim, bias, context_channels) for term in op.operands]
    hoisted = {}
    for name in SHARED:
        owners = [o for o in operands if name in o]
        if len(owners) > 1 and len({o[name] for o in owners}) == 1:
            hoisted[name] = owners[0][name]
            for o in owners:
                del o[name]
    rates = {"rates": Parameter((op.learned,), f"constant:{1 / len(op.terms)}", decays=False)} if op.learned else {}
    if op.gates:
        rates["gate_weight"] = Parameter((op.gates, in_channels), "uniform", in_channels)
        if bias:
            rates["gate_bias"] = Parameter((op.gates,), "constant:0")
    return rates | hoisted | {f"{i}.{name}": p for i, operand in enumerate(operands) for name, p in operand.items()}


def _basic(
    op: Basic, in_channels: int, out_channels: int, ndim: int, bias: bool, context_channels: int
) -> dict[str, Parameter]:
    weight = op.weight
    path, rho, own = meaning(op.path), meaning(weight.rho), meaning(weight.kernel)
    for name in ("size", "stride", "dilation", "padding", "step", "shift", "halo"):
        if isinstance(value := getattr(op.path, name, None), tuple):
            as_tuple(value, ndim, name)
    inner = out_channels if "v" in weight.projections and not own.maps_channels else in_channels
    sizes = Sizes(in_channels, out_channels, inner, ndim, bias)
    require_divides(op, path.groups, op.heads, inner, "channels of the value")
    found: dict[str, Parameter] = {}
    for letter in weight.projections.replace("o", ""):
        made, read = inner, in_channels
        if letter in "kv":
            made = inner * (weight.rho.kv or weight.heads) // weight.heads
            read = context_channels if op.cross else in_channels
        found[f"{LETTERS[letter]}_weight"] = Parameter((made, read), "uniform", read)
        if bias:
            found[f"{LETTERS[letter]}_bias"] = Parameter((made,), "uniform", read)
    needed = {"k", "v"} if weight.rho.needs_score else {"v"}
    if op.cross and context_channels != inner and not needed <= set(weight.projections):
        what = "projections of key and value" if weight.rho.needs_score else "a projection of the value"
        raise ValueError(f"{op}: context_channels={context_channels} need {what} to {inner}")
    if ("q" in weight.projections) != ("k" in weight.projections) and inner != in_channels:
        raise ValueError(f"{op}: query and key have {inner} and {in_channels} channels; project both or none")
    found |= _compared(op, inner // weight.heads, ndim) | path.parameters(op, sizes) | rho.parameters(op, sizes)
    if op.path.similarity.relative and weight.rho.needs_score:
        found["position_weight"] = Parameter((inner // weight.heads, ndim), "uniform", ndim)
        found["position_bias"] = Parameter((inner // weight.heads,), "uniform", ndim)

    found |= own.parameters(op, sizes)
    made = out_channels if own.maps_channels else inner
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
    elif bias and own.bias_of:
        found["bias"] = Parameter((out_channels,), "uniform", found[own.bias_of].fan_in)
    return found


def _compared(op: Basic, head: int, ndim: int) -> dict[str, Parameter]:
    """What a similarity owns that knows positions; ``head`` features of one head."""
    near, found = op.path.similarity, {}
    if not (op.weight.rho.needs_score or op.path.searches):
        return {}
    if near.learned:
        lam = near.lam  # type: ignore[attr-defined]
        found["blend_logit"] = Parameter((op.weight.heads,), f"constant:{math.log(lam / (1 - lam))}", decays=False)
    if near.coordinates == "learned":
        found["encoding_weight"] = Parameter((LEARNED, 2 * BANDS * ndim), "uniform", 2 * BANDS * ndim)
    if near.rotary and (head < 2 * ndim or head % (2 * ndim)):
        raise ValueError(
            f"{op}: rotary turns pairs of features on each of {ndim} axes, so that a head's features must be a "
            f"multiple of {2 * ndim}, got {head}"
        )
    if near.bias == "table":
        offsets = tuple(2 * n - 1 for n in bias_reach(op, ndim))
        found["relative_bias"] = Parameter((op.weight.heads, *offsets), "normal:0.02", decays=False)
    return found


def bias_reach(op: Basic, ndim: int) -> tuple[int, ...]:
    """Per axis n, so that a query lies at most n - 1 steps from a key: a table of 2 n - 1 offsets holds all of them.

    >>> from nearfold import parse
    >>> bias_reach(parse("window(3, scaled(bias=table), mode=inside, step=(3, 8)) | box | softmax"), 2)
    (3, 6)
    """
    sizes = as_tuple(op.path.size, ndim, "size")  # type: ignore[attr-defined]
    steps = as_tuple(getattr(op.path, "step", 1), ndim, "step")
    halos = as_tuple(getattr(op.path, "halo", 0), ndim, "halo")
    ends = (op.shape.axes or (0,)) if op.shape.causal else ()
    # queries that share the window of the one in their middle may lie outside it
    return tuple(
        n if axis in ends else max(n + halo, step // 2 + n - n // 2, step - step // 2 + n // 2)
        for axis, (n, step, halo) in enumerate(zip(sizes, steps, halos, strict=True))
    )


def linear(
    name: str, made: int, read: int, bias: bool, tail: tuple[int, ...] = (), init: str = "uniform"
) -> dict[str, Parameter]:
    """A map from so many channels to so many, with its bias; ``tail``: the axes of a window."""
    found = {f"{name}_weight": Parameter((made, read, *tail), init, read)}
    return found | {f"{name}_bias": Parameter((made,), init, read)} if bias else found


def require_divides(op: Basic, name: str, parts: int, whole: int, what: str) -> None:
    """ValueError where channels do not part evenly."""
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
    if not first.isdigit() or int(first) >= len(op.operands):
        return False
    return (first == "1" and isinstance(op, Branch)) or _in_second(op.operands[int(first)], rest)


def operand(params: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """The parameters the i-th operand sees: its own, and the parent's shared projections."""
    return {mine: params[name] for mine, name in _operand_names(tuple(params), i)}


@once
def _operand_names(names: tuple[str, ...], i: int) -> tuple[tuple[str, str], ...]:
    """(What the i-th operand calls a parameter, what its parent calls it)."""
    prefix = f"{i}."
    shared = {name: name for name in SHARED if name in names}
    return tuple((shared | {n[len(prefix) :]: n for n in names if n.startswith(prefix)}).items())
