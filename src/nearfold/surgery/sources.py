"""How layers are replaced: their weights by the names of this library, what stands in their place, and their calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.recognise.attention import Attention, visible
from nearfold.recognise.foreign import Unsaid
from nearfold.recognise.layouts import DROPOUTS, QKV, divided, member, named
from nearfold.surgery.adapters import CalledAttention, ChannelsLast, MultiheadAttention, SwinBlock, TokenSwinBlock


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
        call: the plain call with a map (B, C, *grid), or (B, *grid, C).
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
    call: Callable[[Tensor], Trial] = lambda x: Trial((x,))


def _conv(m: Any) -> Source:
    own = {"weight": m.weight} | ({} if m.bias is None else {"bias": m.bias})
    return Source(own, m.in_channels, m.out_channels, m.weight.dim() - 2, tokens=False, channels_last=False)


def _own(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def _dropped(rate: float) -> str:
    return f"the dropout of {rate:g} on attention weights is not taken over" if rate else ""


def _mask(queries: int, keys: int) -> Tensor:
    """Some pairs, so that every query sees a key."""
    return (torch.arange(keys) <= torch.arange(queries)[:, None]) | (torch.arange(keys) % 3 == 0)


def _multihead(m: nn.MultiheadAttention) -> Source:
    if m.in_proj_weight is None:
        raise Unsaid("keys and values of another width than the queries")
    own = named(divided(QKV, m.in_proj_weight, m.in_proj_bias) | {"out": _own(m.out_proj)})
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
    height, width = block.window_size

    def unlike(grid: tuple[int, ...] | None) -> str:
        if grid is None:
            return f"the same only on maps that {height} x {width} divides; with input_size it is seen"
        fits = not (grid[0] % height or grid[1] % width)
        return "" if fits else f"{height} x {width} does not divide the map {grid}: what the old layer padded took part"

    made = _in_blocks(m, block.window_size, lambda mixer: SwinBlock(mixer, block), (m.attn_drop.p, m.proj_drop.p))
    return replace(made, unlike=unlike) if any(block.shift_size) else made


def _hugging_face_swin(block: Any) -> Source:
    m, size = block.attention, block.window_size
    table = m.relative_position_bias.relative_position_bias_table.T.reshape(-1, 2 * size - 1, 2 * size - 1)
    maps = {name: _own(getattr(m, f"{name[0]}_proj")) for name in (*QKV, "out")}
    own = named(maps) | {"relative_bias": table}
    channels = m.q_proj.in_features

    def unlike(grid: tuple[int, ...] | None) -> str:
        if grid is None:
            return f"the same only on maps with sides larger than {size}; with input_size it is seen"
        if block.shift_size and min(grid) <= size < max(grid):
            return f"the old layer shifts nothing on the map {grid}, one side of which a block covers"
        return ""

    wrap = lambda mixer: TokenSwinBlock(mixer, block)  # noqa: E731
    note = _dropped(m.attention_dropout)
    call = lambda x: Trial((x.flatten(1, 2), tuple(x.shape[1:3])))  # noqa: E731
    return Source(own, channels, channels, 2, tokens=False, wrap=wrap, note=note, unlike=unlike, call=call)


def _in_blocks(m: Any, size: Sequence[int], wrap: Callable[[Any], nn.Module], dropout: tuple[float, float]) -> Source:
    """Attention in blocks with Swin's relative bias, on maps with the channels last."""
    height, width = size
    table = m.relative_position_bias_table.T.reshape(-1, 2 * height - 1, 2 * width - 1)
    own = named(divided(QKV, *_own(m.qkv)) | {"out": _own(m.proj)}) | {"relative_bias": table}
    channels = m.qkv.in_features
    note = _dropped(dropout[0]) or _dropped(dropout[1]).replace("attention weights", "its output")
    return Source(own, channels, channels, 2, tokens=False, wrap=wrap, note=note)


def attention_source(m: nn.Module, read: Attention) -> Source:
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
    causal = read.operation.shape.causal

    def refuses(op: Operation) -> str:
        if op.needs_context:
            return f"it is called with one input, and {op} reads two"
        if causal and not all(part.shape.causal for part in op.parts):
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
    seen = _mask(n, n) & visible(read.operation, n, x.device) if read.operation.shape.causal else _mask(n, n)
    if "attention_mask" in read.arguments:
        hidden = torch.zeros(1, 1, n, n, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        yield Trial((x,), given | {"attention_mask": hidden}, "attention_mask")
    if "attn_mask" in read.arguments:
        yield Trial((x,), given | {"attn_mask": seen}, "attn_mask")
    if "is_causal" in read.arguments:
        yield Trial((x,), given | {"is_causal": True}, "is_causal")


def mixer_source(m: Mixer) -> Source:
    """A layer of this library."""
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
