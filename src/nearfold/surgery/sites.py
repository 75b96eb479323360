"""The layers of a model that can be replaced: what they are in the words, their weights, and how they are called."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearfold.grammar import Basic, Operation
from nearfold.grammar.words import Causal
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.recognise.attention import Attention, attention_of, visible
from nearfold.recognise.blocks import PARENTS
from nearfold.recognise.foreign import Found, Unsaid, names_of, rule_of, uninitialized
from nearfold.recognise.layouts import CROSS, DROPOUTS, member
from nearfold.recognise.scans import REFUSAL, is_scan
from nearfold.recognise.walk import ALL_RULES, walk
from nearfold.surgery.adapters import CalledAttention, ChannelsLast, MultiheadAttention, SwinBlock, TokenSwinBlock
from nearfold.surgery.carry import Weights
from nearfold.surgery.obstacles import Surroundings, made_of, own_ways, tracked

LARGEST = 65  # side of a grid that is tried
STAGE = re.compile(r"(?:^|\.)[a-z_]*?(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Trial:
    """A call of a layer; ``what`` it asks for beyond the plain one: a mask, another memory ..."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    what: str = ""


Make = Callable[..., Tensor]
"""From sizes to a random tensor in float64."""


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
        note: what is not the same in training.
        unlike: why the operation is not what the layer does on a grid, or on one that is not known; empty where it is.
            None: it is on every grid.
        refuses: why an operation cannot stand in its place; empty where it can.
        calls: calls beyond the plain ones, on so many positions and width; how it is compared with what replaces it.
    """

    tensors: dict[str, Tensor]
    in_channels: int
    out_channels: int
    ndim: int = 1
    tokens: bool = True
    channels_last: bool = True
    wrap: Callable[[Any], nn.Module] = lambda mixer: mixer
    note: str = ""
    unlike: Callable[[tuple[int, ...] | None], str] | None = None
    calls: Callable[[Make, int], Iterator[Trial]] | None = None
    refuses: Callable[[Operation], str] = lambda op: ""

    def trials(self, site: Site, generator: torch.Generator, old: nn.Module, limit: int | None) -> Iterator[Trial]:
        """Calls to compare on: the smallest grid that the layer takes, odd and larger ones; then special arguments."""

        def make(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        if self.unlike is not None:
            if site.grid is not None and not self.unlike(site.grid):
                yield Trial((make(2, *site.grid, self.in_channels),))
            return
        if self.tokens:
            lengths = [n for n in (1, 4, 7) if limit is None or n <= limit]
            for n in lengths:
                yield from (self.calls or _plain_tokens(site))(make, n)
            return
        least = _least(old, make, self.in_channels, self.ndim)
        if least is None:
            return
        for grid in ([least] * 3, [least + 1, least + 4, least + 2], [least + 7, least + 5, least + 6]):
            yield Trial((make(2, self.in_channels, *grid[: self.ndim]),))
        yield Trial((make(self.in_channels, *[least + 2] * self.ndim),), what="inputs without a batch axis")


def _least(layer: nn.Module, make: Make, channels: int, ndim: int) -> int | None:
    """The smallest side of a grid that a layer takes."""
    for n in range(1, LARGEST):
        try:
            layer(make(1, channels, *[n] * ndim))
        except (RuntimeError, ValueError):
            continue
        return n
    return None


def _plain_tokens(site: Site) -> Callable[[Make, int], Iterator[Trial]]:
    def calls(make: Make, n: int) -> Iterator[Trial]:
        x = make(2, n, site.in_channels)
        yield Trial((x, make(2, n + 2, site.module.context_channels)) if site.operation.needs_context else (x,))

    return calls


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


def _mask(queries: int, keys: int) -> Tensor:
    """Some pairs, so that every query sees a key."""
    return (torch.arange(keys) <= torch.arange(queries)[:, None]) | (torch.arange(keys) % 3 == 0)


def _multihead(m: nn.MultiheadAttention) -> Source:
    if m.in_proj_weight is not None:
        own = _packed(m.in_proj_weight, m.in_proj_bias, m.out_proj)
    else:
        raise Unsaid("keys and values of another width than the queries")
    wrap = lambda mixer: MultiheadAttention(mixer, m)  # noqa: E731
    width = m.embed_dim

    def calls(make: Make, n: int) -> Iterator[Trial]:
        x, other = (make(2, length, width).transpose(0, 0 if m.batch_first else 1) for length in (n, n))
        memory = make(2, max(n - 1, 1), width).transpose(0, 0 if m.batch_first else 1)
        padded, seen = torch.zeros(2, n, dtype=torch.bool), ~_mask(n, n)
        padded[1, 1:] = True
        alone = make(n, width)
        yield Trial((x, x, x), {"need_weights": False})
        yield Trial((x, x, x), {"key_padding_mask": padded, "need_weights": False}, "key_padding_mask")
        yield Trial((x, x, x), {"attn_mask": seen, "need_weights": False}, "attn_mask")
        yield Trial((x, x, x), {"attn_mask": make(n, n), "key_padding_mask": padded.double() * -1e9}, "attn_mask")
        yield Trial((x, memory, memory), {"need_weights": False}, "keys of another input")
        yield Trial((x, x, other), {"need_weights": False}, "other values than keys")
        yield Trial((x, x, x), {}, "attention weights")
        yield Trial((x, x, x), {"average_attn_weights": False}, "attention weights")
        yield Trial((alone, alone, alone), {"need_weights": False}, "inputs without a batch axis")

    return Source(own, width, width, wrap=wrap, note=_dropped(m.dropout), calls=calls)


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
    calls = functools.partial(_calls, m, read)
    return Source(own, width, width, wrap=wrap, note=note, refuses=refuses, calls=calls)


def _calls(m: nn.Module, read: Attention, make: Make, n: int) -> Iterator[Trial]:
    """The plain call of an attention that was read, and those with each mask that it takes."""
    x = make(2, n, next(iter(read.tensors(m).values())).shape[1])
    given = read.call(m, x)
    yield Trial((x,), given)
    seen = (
        _mask(n, n) & visible(read.operation, n, x.device) if isinstance(read.operation.shape, Causal) else _mask(n, n)
    )
    if "attention_mask" in read.arguments:
        hidden = torch.zeros(1, 1, n, n, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        yield Trial((x,), given | {"attention_mask": hidden}, "attention_mask")
    if "attn_mask" in read.arguments:
        yield Trial((x,), given | {"attn_mask": seen}, "attn_mask")
    if "is_causal" in read.arguments:
        yield Trial((x,), given | {"is_causal": True}, "is_causal")


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


class Obstacle(NamedTuple):
    """A layer that cannot be replaced, and why; ``known`` where another of its class could be."""

    name: str
    module: nn.Module
    reason: str
    known: bool = False


def sites(model: nn.Module) -> Iterator[Site | Obstacle]:
    """The layers that mix positions, and can be replaced or not.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    >>> conv, pool = sites(model)
    >>> conv.kernel_size, pool.reason
    (3, 'no rule to replace a MaxPool2d')
    """
    inside: set[nn.Module] = set()
    around = Surroundings(model)
    others = {layer.modules[0]: layer for layer in walk(model) if layer.mixes or layer.reason}
    crossed = {m for m, layer in others.items() if layer.found and layer.found.operation.needs_context}
    for name, module in model.named_modules():
        if module in inside:
            continue
        if is_scan(module):  # it reads its parts' weights itself
            inside.update(module.modules())
            yield Obstacle(name, module, REFUSAL)
            continue
        if module in crossed and not isinstance(module, Mixer | nn.MultiheadAttention):
            inside.update(module.modules())
            yield Obstacle(name, module, "cross-attention: keys and values of another input")
            continue
        try:
            known = _rule(module, name)
        except Unsaid as why:
            yield Obstacle(name, module, str(why), known=True)
            continue
        if known is None:
            if module in others:
                own = own_ways(module) if _derived(module) else ""
                why = others[module].reason or f"no rule to replace a {type(module).__name__}"
                yield Obstacle(name, module, f"it {own}" if own else why, known=bool(own))
            continue
        part, find, read, ran = known
        place, module = module, module.get_submodule(part)
        name = f"{name}.{part}".strip(".")
        inside.update(module.modules())
        try:
            yield _site(name, module, place, find, read, around, ran)
        except Unsaid as reason:
            yield Obstacle(name, module, str(reason), known=True)
        except AttributeError as error:
            why = f"its attributes are not those of the version the rule was written for: {error}"
            yield Obstacle(name, module, why, known=True)


class Known(NamedTuple):
    """How a layer is replaced.

    Attributes:
        part: its name in what is exchanged; empty: it is the layer.
        find: reads its operation.
        read: reads its weights.
        ran: whether it is known by what it computed and not by its class.
    """

    part: str
    find: Callable[[Any], Found]
    read: Callable[[Any], Source]
    ran: bool = False


def _rule(module: nn.Module, at: str) -> Known | None:
    if isinstance(module, Mixer):
        return Known("", ALL_RULES["nearfold.nn.mixer.Mixer"], _mixer)
    for name in names_of(module):
        if name in SOURCES:
            return Known("", ALL_RULES[name], SOURCES[name])
        if name in BLOCKS:
            part, read = BLOCKS[name]
            return Known(part, functools.partial(_inside, name, part), read)
    if rule_of(module, ALL_RULES) is None:
        attention = attention_of(module, cross=at.rpartition(".")[2] in CROSS)
        if attention is not None:
            return Known("", attention.found, functools.partial(_attention, read=attention), ran=True)
    return None


def _derived(module: nn.Module) -> bool:
    """Whether a layer is of a class that can be replaced, or of one made from it."""
    return any(f"{cls.__module__}.{cls.__qualname__}" in SOURCES for cls in type(module).__mro__)


def _inside(block: str, part: str, module: Any) -> Found:
    return PARENTS[block](module)[part]


def _site(
    name: str,
    module: nn.Module,
    place: nn.Module,
    find: Callable[[Any], Found],
    read: Callable[[Any], Source],
    around: Surroundings,
    ran: bool,
) -> Site:
    if uninitialized(module):
        raise Unsaid("lazy, and not initialised yet: run the model once")
    if reason := around.obstacle(module, place, ran):
        raise Unsaid(reason)
    operation = find(place).operation
    with tracked(module):
        source = read(place)
        source = replace(source, tensors={name: t.view_as(t) for name, t in source.tensors.items()})
    used = set().union(*map(made_of, source.tensors.values()))
    used |= set(source.wrap(nn.Identity()).parameters())  # parts that go on in what stands in its place
    unread = [name for name, parameter in module.named_parameters() if parameter not in used]
    if unread:
        raise Unsaid(f"its {unread[0]} has no place in the words, and would be lost")
    kind = "conv" if any(k in type(module).__name__ for k in ("Conv1d", "Conv2d", "Conv3d")) else "attention"
    if isinstance(module, Mixer):
        kind = _kind(operation)
    stage = STAGE.search(name.rpartition(".")[0])
    at = int(stage[1]) if stage else None
    return Site(name, module, kind, operation, source.in_channels, source.out_channels, at, source, place)


def _kind(op: Operation) -> str:
    words = {type(part.path).word for part in op.parts} | {part.weight.rho.needs_score for part in op.parts}
    if words == {"window", False}:
        return "conv"
    return "attention" if all(part.weight.rho.needs_score for part in op.parts) else "other"


def at(site: Site, operation: Operation | None, grid: tuple[int, ...] | None) -> Site:
    """The site as a run has shown it."""
    return replace(site, operation=operation or site.operation, grid=grid)
