"""C_P: the parameters that generate behaviour, in millions; C_D, the other half, lives in the grammar."""

from __future__ import annotations

import math

from nearfold.grammar import Basic, Operation, parse
from nearfold.grammar.complexity import content_share
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import LETTERS, SHARED, parameters

MILLION = 1e6
# These decide how positions compare, whatever the words around them say.
COMPARING = ("relative_bias", "position", "encoding", "blend_logit")
# These make something only where features are compared or generate: around a static operation they are plain maps.
PROJECTIONS = tuple(LETTERS.values())


def generates(op: Operation, name: str) -> bool:
    """Whether a parameter, by its name in `nearfold.lower.parameters`, generates behaviour.

    >>> generates(parse("all | row | softmax"), "query_weight"), generates(parse("window(3) | box | kernel"), "weight")
    (True, False)
    """
    index, dot, rest = name.partition(".")
    if isinstance(op, Basic):
        stem = name.removesuffix("_weight").removesuffix("_bias")
        words = (op.path, op.weight.rho, op.weight.kernel)
        always = COMPARING + tuple(made for word in words for made in meaning(word).generating)
        return stem in always or name in always or (stem in PROJECTIONS and content_share(op) > 0)
    if dot:
        return generates(op.operands[int(index)], rest)
    if name in ("gate_weight", "gate_bias"):
        return True
    return name in SHARED and any(generates(operand, name) for operand in op.operands)  # never rates and mix


def c_p(
    op: Operation | str,
    in_channels: int,
    out_channels: int,
    ndim: int = 2,
    bias: bool = True,
    context_channels: int | None = None,
) -> float:
    """Parameters that generate behaviour, in millions.

    They are the nets of offsets, masks, generated kernels and expert shares, what makes a state space's B, C, delta and
    decay, learned encodings and relative biases, the gates of a sum, and the projections of an operation that compares
    features (query, key, value and output: for attention this is the whole layer). Static kernels, tables, rates, a
    mixing map and the state space's skip D are the same for every input: they are no part of it.

    >>> c_p("all | row | softmax(heads=2)", 64, 64) == 4 * (64 * 64 + 64) / 1e6
    True
    >>> c_p("window(3) | box | kernel", 64, 64)
    0.0
    """
    op = parse(op) if isinstance(op, str) else op
    specs = parameters(op, in_channels, out_channels, ndim, bias, context_channels)
    return sum(math.prod(spec.shape) for name, spec in specs.items() if generates(op, name)) / MILLION
