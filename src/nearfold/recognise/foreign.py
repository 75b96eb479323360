"""Rules: what a layer of torch, torchvision, timm or transformers is, as an Operation.

A rule reads attributes and answers with `Match`, or raises `Unsaid` with the reason: nothing is guessed. Classes are
matched by their qualified name, so that none of these libraries is imported, and a subclass only as long as it keeps
its base's forward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from nearfold.grammar import Basic, Operation, Weight
from nearfold.grammar.words import All, Box, Dense, Depthwise, Max, Mean, Ones, Row, Softmax, Window
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.recognise.generating import generates

Ints = int | tuple[int, ...]


class Unsaid(ValueError):
    """Why a layer cannot be said in the words."""


@dataclass(frozen=True)
class Match:
    """A layer, said in the words.

    Attributes:
        operation: what it does.
        generating: how many of its parameters generate behaviour (C_P).
        scaffold: why it is described, but no part of a model's C_D; empty where it is one.
        axis: where channels are in its output: 1 or -1.
        nets: other layers that belong to it, such as the convolution that makes its offsets.
        note: what the words leave open.
        beside: parts that are layers of their own, by name, with what they are where this layer knows it.
        followed: whether the words leave open where it reads, so that a run follows its operators instead.
    """

    operation: Operation
    generating: int = 0
    scaffold: str = ""
    axis: int = 1
    nets: tuple[nn.Module, ...] = ()
    note: str = ""
    beside: tuple[tuple[str, Match | None], ...] = ()
    followed: bool = False


Rule = Callable[[nn.Module], Match]


def count(*modules: nn.Module) -> int:
    """Parameters of modules; those that a lazy layer does not have yet are none."""
    own = (p for module in modules for p in module.parameters())
    return sum(p.numel() for p in own if not isinstance(p, UninitializedParameter))


def names_of(module: nn.Module) -> Iterator[str]:
    """Qualified names of the classes a module behaves as: its own, and bases whose forward it keeps.

    >>> next(names_of(nn.Conv2d(1, 1, 1)))
    'torch.nn.modules.conv.Conv2d'
    """
    own = type(module)
    if "forward" in vars(module):  # replaced on this one object
        return
    for cls in own.__mro__[:-1]:
        if all(getattr(own, name, None) is getattr(cls, name, None) for name in ("forward", "_conv_forward")):
            yield f"{cls.__module__}.{cls.__qualname__}"


def plain(sizes: Ints) -> Ints:
    """One number where every axis has the same.

    >>> plain((3, 3)), plain((3, 5))
    (3, (3, 5))
    """
    if isinstance(sizes, int):
        return sizes
    return int(sizes[0]) if len(set(sizes)) == 1 else tuple(int(n) for n in sizes)


def _axes(value: Ints, like: Ints) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * (1 if isinstance(like, int) else len(like))
    return tuple(value)


def window(size: Ints, stride: Ints, dilation: Ints, padding: Ints | str, mode: str = "zeros") -> Window:
    """The path of a convolution's arguments, in the shortest spelling.

    >>> print(window((3, 3), (2, 2), (1, 1), (1, 1)))
    window(3, stride=2)
    """
    if padding == "valid":
        padding = 0
    if not isinstance(padding, str):
        sizes = _axes(size, size if isinstance(size, tuple) else padding)
        pads = _axes(padding, sizes)
        reach = [d * (k - 1) for d, k in zip(_axes(dilation, sizes), sizes, strict=True)]
        same = all(2 * p == r for p, r in zip(pads, reach, strict=True))
        padding = "same" if same else plain(pads)
    return Window(plain(size), stride=plain(stride), dilation=plain(dilation), padding=padding, mode=mode)


def _conv(m: nn.Module) -> Match:
    assert isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if m.padding_mode not in ("zeros", "reflect"):
        raise Unsaid(f"no word for padding_mode={m.padding_mode}")
    path = window(m.kernel_size, m.stride, m.dilation, m.padding, m.padding_mode)
    each = m.groups == m.in_channels == m.out_channels > 1
    return Match(Basic(path, Box(), Weight(kernel=Depthwise() if each else Dense(m.groups))))


def _unsaid(why: str) -> Rule:
    def rule(m: nn.Module) -> Match:
        raise Unsaid(why)

    return rule


_transposed = _unsaid("spreads every input over a window of outputs; the words say what an output reads")
_recurrent = _unsaid("a recurrence that is not linear; scan | causal | selective is")


def _mean_pool(m: nn.Module) -> Match:
    assert isinstance(m, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d)
    size = _axes(m.kernel_size, m.kernel_size if isinstance(m.kernel_size, tuple) else (0,) * int(type(m).__name__[-2]))
    divisor = getattr(m, "divisor_override", None)
    counts = m.count_include_pad and any(_axes(m.padding, m.padding))
    if m.ceil_mode and counts and not divisor:
        raise Unsaid("no word for a mean that counts the padding, and less of it in a last window (ceil_mode)")
    path = window(m.kernel_size, m.stride, 1, m.padding)
    fixed = divisor or (math.prod(size) if counts else None)
    notes = [f"divided by {fixed}" + ", as if the zeros around the map were positions" * (not divisor)] if fixed else []
    op = Basic(path, Box(), Weight(Ones() if fixed else Mean()))
    return _ceiled(m, Match(op, scaffold=_shrinking(m.stride), note="; ".join(notes)))


def _ceiled(m: Any, match: Match) -> Match:
    """The same with ceil_mode, if it is on: a last window that the border cuts."""
    if not m.ceil_mode:
        return match
    note = "where its windows leave a rest of the map, one more window that the border cuts (ceil_mode)"
    return dataclasses.replace(match, note="; ".join(filter(None, (match.note, note))), followed=True)


def _max_pool(m: nn.Module) -> Match:
    assert isinstance(m, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d)
    if m.return_indices:
        raise Unsaid("no word for return_indices")
    path = window(m.kernel_size, m.stride, m.dilation, m.padding)
    return _ceiled(m, Match(Basic(path, Box(), Weight(Max())), scaffold=_shrinking(m.stride)))


POOLING = "pooling that shrinks the map counts 0"


def _shrinking(stride: Ints) -> str:
    return POOLING if any(s > 1 for s in _axes(stride, stride)) else ""


GLOBAL_MEAN = Basic(All(), Row(), Weight(Mean()))


def _adaptive_mean(m: nn.Module) -> Match:
    if any(n != 1 for n in _axes(m.output_size, m.output_size)):  # type: ignore[arg-type]
        raise Unsaid(f"no word for bins whose size follows from the input's (output_size={m.output_size})")
    return Match(GLOBAL_MEAN, scaffold=POOLING, note="one output for the map")


def _fast_mean(m: nn.Module) -> Match:
    axis = -1 if tuple(getattr(m, "dim", (2, 3))) == (1, 2) else 1  # channels last
    return Match(GLOBAL_MEAN, scaffold=POOLING, axis=axis, note="one output for the map")


def attention_rule(heads: int, *modules: nn.Module, project: str | None = None, note: str = "") -> Match:
    """Self-attention over all positions, made by these layers.

    >>> print(attention_rule(2, nn.Linear(4, 12), nn.Linear(4, 4)).operation)
    all | row | softmax(heads=2)
    """
    op = Basic(All(), Row(), Weight(Softmax(heads, project=project)))
    return Match(op, count(*modules), axis=-1, note=note)


def _multihead(m: nn.Module) -> Match:
    assert isinstance(m, nn.MultiheadAttention)
    if m.bias_k is not None or m.bias_v is not None or m.add_zero_attn:
        raise Unsaid("no word for the extra positions of add_bias_kv and add_zero_attn")
    if m.kdim != m.vdim:
        raise Unsaid(f"no word for keys of {m.kdim} and values of {m.vdim} channels")
    match = attention_rule(m.num_heads, m, note="self-attention without a mask, unless the caller gives one")
    return match if m.kdim == m.embed_dim else crossed(match)


def crossed(match: Match) -> Match:
    """The same attention with keys and values of another input."""
    assert isinstance(match.operation, Basic)
    op = dataclasses.replace(match.operation, path=All(cross=True))
    return dataclasses.replace(match, operation=op, note="keys and values of another input")


def _mixer(m: nn.Module) -> Match:
    assert isinstance(m, Mixer)
    own = sum(t.numel() for name, t in m.tensors().items() if generates(m.operation, name))
    shuffled = getattr(m, "shuffle", "none")
    note = "" if shuffled == "none" else f"on the pixel-unshuffled map (shuffle={shuffled})"
    return Match(m.operation, own, axis=-1 if isinstance(m, TokenMixer) else 1, note=note)


_TORCH = "torch.nn.modules"
RULES: dict[str, Rule] = {
    **{f"{_TORCH}.conv.Conv{n}d": _conv for n in (1, 2, 3)},
    **{f"{_TORCH}.conv.ConvTranspose{n}d": _transposed for n in (1, 2, 3)},
    **{f"{_TORCH}.pooling.AvgPool{n}d": _mean_pool for n in (1, 2, 3)},
    **{f"{_TORCH}.pooling.MaxPool{n}d": _max_pool for n in (1, 2, 3)},
    **{f"{_TORCH}.pooling.AdaptiveAvgPool{n}d": _adaptive_mean for n in (1, 2, 3)},
    **{f"{_TORCH}.rnn.{name}": _recurrent for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")},
    f"{_TORCH}.activation.MultiheadAttention": _multihead,
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool": _fast_mean,
    "nearfold.nn.mixer.Mixer": _mixer,
}


def rule_of(module: nn.Module, rules: dict[str, Rule]) -> Rule | None:
    """The rule for a module, where there is one.

    >>> rule_of(nn.Conv2d(1, 1, 1), RULES) is _conv, rule_of(nn.ReLU(), RULES)
    (True, None)
    """
    if isinstance(module, Mixer):  # subclasses shuffle around the same operation
        return _mixer
    return next((rules[name] for name in names_of(module) if name in rules), None)


def uninitialized(module: nn.Module) -> bool:
    """Whether a lazy layer has not seen its first input."""
    return any(isinstance(p, UninitializedParameter) for p in module.parameters())
