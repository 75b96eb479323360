"""The layers of a model that can be replaced: what they are in the words, their weights, and how they are called."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from nearfold.grammar import Basic, Operation
from nearfold.grammar.words import Causal
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.recognise.attention import Attention, attention_of
from nearfold.recognise.blocks import PARENTS
from nearfold.recognise.foreign import Found, Unsaid, names_of, rule_of, uninitialized
from nearfold.recognise.layouts import CROSS, DROPOUTS, member
from nearfold.recognise.scans import REFUSAL, is_scan
from nearfold.recognise.walk import ALL_RULES, walk
from nearfold.surgery.adapters import CalledAttention, ChannelsLast, MultiheadAttention, SwinBlock, TokenSwinBlock
from nearfold.surgery.carry import Weights

STAGE = re.compile(r"(?:^|\.)[a-z_]*?(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Source:
    """What a rule of this module reads from a layer.

    Attributes:
        tensors: its weights, by the names of `nearfold.lower.parameters`.
        in_channels: of its input.
        out_channels: of its output.
        tokens: whether it maps (B, N, D) and not (B, C, *grid).
        channels_last: whether its input has the channels last, as tokens do.
        wrap: the module that stands in its place, around the new layer.
        note: what is not taken over.
        unlike: why the operation is not what the layer does on a grid, or on one that is not known; empty where it is.
        refuses: why an operation cannot stand in its place; empty where it can.
    """

    tensors: dict[str, Tensor]
    in_channels: int
    out_channels: int
    ndim: int = 1
    tokens: bool = True
    channels_last: bool = True
    wrap: Callable[[Any], nn.Module] = lambda mixer: mixer
    note: str = ""
    unlike: Callable[[tuple[int, ...] | None], str] = lambda grid: ""
    refuses: Callable[[Operation], str] = lambda op: ""


@dataclass(frozen=True)
class Site:
    """A layer that can be replaced, as a rule's conditions and notation see it.

    Attributes:
        name: dotted; the first one where a layer is registered several times.
        module: the layer.
        kind: "conv" or "attention", or "other" for operations of this library that are neither.
        operation: what it is in the words.
        in_channels: of its input.
        out_channels: of its output.
        stage: the first number in the name of what it is in, such as 3 in layer3.0.conv2; None where there is none.
        source: how to replace it.
        place: what is exchanged in the model: the layer, or the block that calls it.
        grid: of its input, where an input was given.
    """

    name: str
    module: nn.Module
    kind: str
    operation: Operation
    in_channels: int
    out_channels: int
    stage: int | None
    source: Source
    place: nn.Module
    grid: tuple[int, ...] | None = None

    @property
    def positions(self) -> int | None:
        """How many there are in its input's grid."""
        return None if self.grid is None else math.prod(self.grid)

    @property
    def words(self) -> dict[str, str]:
        """What may stand in braces in a rule's notation."""
        path = self.operation.path if isinstance(self.operation, Basic) else None
        found = {"self": self.operation, "heads": getattr(self.operation, "heads", None)}
        for name in ("size", "stride", "dilation", "padding"):
            found[name] = getattr(path, name, None)
        groups = getattr(getattr(getattr(self.operation, "weight", None), "kernel", None), "groups", None)
        found["groups"] = groups
        return {name: str(value) for name, value in found.items() if value is not None}

    @property
    def kernel_size(self) -> int | tuple[int, ...] | None:
        """Of a convolution; one number where all axes have the same."""
        return getattr(getattr(self.operation, "path", None), "size", None) if self.kind == "conv" else None

    @property
    def weights(self) -> Weights | None:
        """Its weights, where it is one operation."""
        if not isinstance(self.operation, Basic):
            return None
        s = self.source
        return Weights(self.operation, s.tensors, self.in_channels, self.out_channels, s.ndim)


def _conv(m: Any) -> Source:
    own = {"weight": m.weight} | ({} if m.bias is None else {"bias": m.bias})
    return Source(own, m.in_channels, m.out_channels, m.weight.dim() - 2, tokens=False, channels_last=False)


def _named(heads: dict[str, nn.Linear]) -> dict[str, Tensor]:
    found = {}
    for name, linear in heads.items():
        found[f"{name}_weight"] = linear.weight
        if linear.bias is not None:
            found[f"{name}_bias"] = linear.bias
    return found


def _packed(weight: Tensor, bias: Tensor | None, out: nn.Linear) -> dict[str, Tensor]:
    """Query, key and value that lie in one matrix; biases for all maps or none, as our layers have them."""
    names = ("query", "key", "value")
    found = {f"{n}_weight": w for n, w in zip(names, weight.chunk(3), strict=True)} | _named({"out": out})
    if bias is not None:
        found |= {f"{n}_bias": b for n, b in zip(names, bias.chunk(3), strict=True)}
    return found


def _dropped(rate: float) -> str:
    return f"the dropout of {rate:g} on attention weights is not taken over" if rate else ""


def _multihead(m: nn.MultiheadAttention) -> Source:
    if m.in_proj_weight is not None:
        own = _packed(m.in_proj_weight, m.in_proj_bias, m.out_proj)
    else:
        raise Unsaid("keys and values of another width than the queries")
    wrap = lambda mixer: MultiheadAttention(mixer, m)  # noqa: E731
    return Source(own, m.embed_dim, m.embed_dim, wrap=wrap, note=_dropped(m.dropout))


def _swin(m: Any) -> Source:
    return _in_blocks(m, m.window_size, ChannelsLast, (m.attention_dropout, m.dropout))


def _timm_swin(block: Any) -> Source:
    m = block.attn
    return _in_blocks(m, block.window_size, lambda mixer: SwinBlock(mixer, block), (m.attn_drop.p, m.proj_drop.p))


def _hugging_face_swin(block: Any) -> Source:
    m, size = block.attention, block.window_size
    table = m.relative_position_bias.relative_position_bias_table.T.reshape(-1, 2 * size - 1, 2 * size - 1)
    own = _named({"query": m.q_proj, "key": m.k_proj, "value": m.v_proj, "out": m.o_proj}) | {"relative_bias": table}
    channels = m.q_proj.in_features

    def unlike(grid: tuple[int, ...] | None) -> str:
        if grid is not None and block.shift_size and min(grid) <= size < max(grid):
            return f"the old layer shifts nothing on the map {grid}, one side of which a block covers"
        return _unlike(grid, size, size)

    wrap = lambda mixer: TokenSwinBlock(mixer, block)  # noqa: E731
    note = _dropped(m.attention_dropout)
    return Source(own, channels, channels, 2, tokens=False, wrap=wrap, note=note, unlike=unlike)


def _unlike(grid: tuple[int, ...] | None, height: int, width: int) -> str:
    """Why attention in blocks is not Swin's on a grid: what it pads takes part."""
    if grid is None:
        return f"the same only on maps that {height} x {width} divides; with input_size it is seen"
    fits = not (grid[0] % height or grid[1] % width)
    return "" if fits else f"{height} x {width} does not divide the map {grid}: what the old layer padded took part"


def _in_blocks(m: Any, size: Sequence[int], wrap: Callable[[Any], nn.Module], dropout: tuple[float, float]) -> Source:
    """Attention in blocks with Swin's relative bias, on maps with the channels last."""
    height, width = size
    table = m.relative_position_bias_table.T.reshape(-1, 2 * height - 1, 2 * width - 1)
    own = _packed(m.qkv.weight, m.qkv.bias, m.proj) | {"relative_bias": table}
    channels = m.qkv.in_features
    note = _dropped(dropout[0]) or _dropped(dropout[1]).replace("attention weights", "its output")

    unlike = lambda grid: _unlike(grid, height, width)  # noqa: E731
    return Source(own, channels, channels, 2, tokens=False, wrap=wrap, note=note, unlike=unlike)


def _attention(m: nn.Module, read: Attention) -> Source:
    """Attention that was read from its members."""
    if read.operation.cross:
        raise Unsaid("cross-attention: keys and values of another input")
    if read.added:
        raise Unsaid("positions that its caller gives are added to what makes queries and keys, and not to the values")
    own = read.tensors(m)
    width = own["query_weight"].shape[1]
    core = member(m, read.layout.core)
    rate = next((getattr(core, name) for name in DROPOUTS if hasattr(core, name)), 0.0)
    rate = getattr(rate, "p", rate)
    causal = isinstance(read.operation.shape, Causal)

    def refuses(op: Operation) -> str:
        if op.needs_context:
            return f"it is called with one input, and {op} reads two"
        if causal and not all(isinstance(part.shape, Causal) for part in op.parts):
            return (
                f"it is causal, and {op} is not: write the shape causal, such as nearest(8, scaled) | causal | softmax"
            )
        return ""

    wrap = lambda mixer: CalledAttention(mixer, m, read)  # noqa: E731
    note = _dropped(float(rate)) if isinstance(rate, int | float) else ""
    return Source(own, width, width, wrap=wrap, note=note, refuses=refuses)


def _mixer(m: Mixer) -> Source:
    if getattr(m, "shuffle", "none") != "none":
        raise Unsaid(f"it shuffles pixels (shuffle={m.shuffle})")
    tokens = isinstance(m, TokenMixer)
    return Source(m.tensors(), m.in_channels, m.out_channels, m.ndim, tokens, channels_last=tokens)


SOURCES: dict[str, Callable[[Any], Source]] = {
    **{f"torch.nn.modules.conv.Conv{n}d": _conv for n in (1, 2, 3)},
    "torch.nn.modules.activation.MultiheadAttention": _multihead,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _swin,
}
"""How the layers that `nearfold.describe` knows are replaced, by qualified name."""
BLOCKS: dict[str, tuple[str, Callable[[Any], Source]]] = {
    "timm.models.swin_transformer.SwinTransformerBlock": ("attn", _timm_swin),
    "transformers.models.swin.modeling_swin.SwinLayer": ("attention", _hugging_face_swin),
}
"""Blocks that cut the map for the attention inside them: its name there, and how both are replaced."""


def sites(model: nn.Module) -> Iterator[Site | tuple[str, nn.Module, str]]:
    """The layers that mix positions: a `Site`, or (name, layer, why it cannot be replaced).

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    >>> conv, pool = sites(model)
    >>> conv.kernel_size, pool[2]
    (3, 'no rule to replace a MaxPool2d')
    """
    inside: set[nn.Module] = set()
    others = {layer.modules[0]: layer for layer in walk(model) if layer.mixes or layer.reason}
    crossed = {m for m, layer in others.items() if layer.found and layer.found.operation.needs_context}
    for name, module in model.named_modules():
        if module in inside:
            continue
        if is_scan(module):  # it reads its parts' weights itself
            inside.update(module.modules())
            yield name, module, REFUSAL
            continue
        if module in crossed and not isinstance(module, Mixer):
            inside.update(module.modules())
            yield name, module, "cross-attention: keys and values of another input"
            continue
        try:
            known = _rule(module, name)
        except Unsaid as why:
            yield name, module, str(why)
            continue
        if known is None:
            if module in others:
                yield name, module, others[module].reason or f"no rule to replace a {type(module).__name__}"
            continue
        part, find, read = known
        place, module = module, module.get_submodule(part)
        name = f"{name}.{part}".strip(".")
        inside.update(module.modules())
        try:
            yield _site(name, module, place, find, read)
        except Unsaid as why:
            yield name, module, str(why)
        except AttributeError as error:
            yield name, module, f"its attributes are not those of the version the rule was written for: {error}"


def _rule(module: nn.Module, at: str) -> tuple[str, Callable[[Any], Found], Callable[[Any], Source]] | None:
    """Name of the layer in what is exchanged (empty: it is the layer), and what reads its operation and its weights."""
    if isinstance(module, Mixer):
        return "", ALL_RULES["nearfold.nn.mixer.Mixer"], _mixer
    for name in names_of(module):
        if name in SOURCES:
            return "", ALL_RULES[name], SOURCES[name]
        if name in BLOCKS:
            part, read = BLOCKS[name]
            return part, functools.partial(_inside, name, part), read
    if rule_of(module, ALL_RULES) is None:
        attention = attention_of(module, cross=at.rpartition(".")[2] in CROSS)
        if attention is not None:
            return "", attention.found, functools.partial(_attention, read=attention)
    return None


def _inside(block: str, part: str, module: Any) -> Found:
    return PARENTS[block](module)[part]


def _site(
    name: str, module: nn.Module, place: nn.Module, find: Callable[[Any], Found], read: Callable[[Any], Source]
) -> Site:
    if uninitialized(module):
        raise Unsaid("lazy, and not initialised yet: run the model once")
    for what, there in _obstacles({module, place, *module.modules()}).items():
        if there:
            raise Unsaid(f"it has {what}, which would be lost")
    operation, source = find(place).operation, read(place)
    kind = "conv" if any(k in type(module).__name__ for k in ("Conv1d", "Conv2d", "Conv3d")) else "attention"
    if isinstance(module, Mixer):
        kind = _kind(operation)
    stage = STAGE.search(name.rpartition(".")[0])
    at = int(stage[1]) if stage else None
    return Site(name, module, kind, operation, source.in_channels, source.out_channels, at, source, place)


def _obstacles(every: set[nn.Module]) -> dict[str, bool]:
    return {
        "hooks": any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in every),
        "parametrizations": any(parametrize.is_parametrized(m) for m in every),
    }


def _kind(op: Operation) -> str:
    words = {type(part.path).word for part in op.parts} | {part.weight.rho.needs_score for part in op.parts}
    if words == {"window", False}:
        return "conv"
    return "attention" if all(part.weight.rho.needs_score for part in op.parts) else "other"


def at(site: Site, operation: Operation | None, grid: tuple[int, ...] | None) -> Site:
    """The site as a run has shown it."""
    return replace(site, operation=operation or site.operation, grid=grid)
