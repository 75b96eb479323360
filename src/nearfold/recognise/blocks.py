"""Rules for what takes more than one layer to say: attention made of parts, layers whose meaning is with their parent.

Verified against torchvision 0.28, timm 1.0.31 and transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from nearfold.grammar import Basic, Weight
from nearfold.grammar.channels import CrossCovariance
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import All, Block, Box, Deformable, Dense, Modulated, Ones, Row, Softmax, Table, Window
from nearfold.recognise.foreign import RULES, Ints, Match, Rule, Unsaid, count, crossed, plain, window

CUT = "on maps that the block size divides; padding at the border takes part as zeros"
WIDE = "on maps with sides of a block or more"


def shifted_block(m: Any, size: Ints, shift: Ints, padded: bool = True) -> Match:
    """Attention in blocks with Swin's relative bias."""
    path = Block(plain(size), Scaled(bias="table"), shift=plain(shift), padded=padded)
    return Match(Basic(path, Box(), Weight(Softmax(m.num_heads))), count(m), axis=-1, note="" if padded else CUT)


def _swin(m: Any) -> Match:
    return shifted_block(m, tuple(m.window_size), tuple(m.shift_size))


def _window_attention(m: Any) -> Match:
    return shifted_block(m, tuple(m.window_size), 0, padded=False)


def _patch_merging(m: Any) -> Match:
    norm = "" if m.norm.normalized_shape[0] != m.reduction.in_features else "; a norm of the four comes first"
    path = Window(2, stride=2, padding=0)
    return Match(Basic(path, Box(), Weight(kernel=Dense())), axis=-1, note=f"on maps of even size{norm}")


def _cross_covariance(m: Any) -> Match:
    op = Basic(Window(1), Box(), Weight(kernel=CrossCovariance(m.num_heads)))
    return Match(op, count(m.qkv) + m.temperature.numel(), axis=-1, note="over the positions it is given")


BLOCK_RULES: dict[str, Rule] = {
    "timm.models.xcit.XCA": _cross_covariance,
    "timm.models.swin_transformer.WindowAttention": _window_attention,
    "timm.models.swin_transformer.PatchMerging": _patch_merging,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _swin,
    "torchvision.models.swin_transformer.PatchMerging": _patch_merging,
    "torchvision.models.swin_transformer.PatchMergingV2": _patch_merging,
}


# --- layers whose meaning is with their parent: child name to what it is


def _timm_swin_block(m: Any) -> dict[str, Match]:
    shift = tuple(m.shift_size)  # it shifts the map before it pads it: no block is then a block of the padded map
    return {"attn": shifted_block(m.attn, tuple(m.window_size), shift, padded=not any(shift))}


def token_table(*layers: nn.Linear) -> Match:
    """One or more nn.Linear over positions, with activations between: one operation.

    >>> print(token_table(nn.Linear(49, 96), nn.Linear(96, 49)).operation)
    all | row | table(49)
    """
    inputs, outputs = layers[0].in_features, layers[-1].out_features
    table = Table(inputs, None if outputs == inputs else outputs)
    note = "" if len(layers) == 1 else f"{len(layers)} tables with an activation between"
    return Match(Basic(All(), Row(), Weight(table)), axis=-1, note=note)


def deformable(m: Any, parent: nn.Module) -> Match:
    """A DeformConv2d, with the sibling convolutions that make its offsets and mask: known by their channels."""
    size = tuple(m.kernel_size)
    slots = math.prod(size)
    nets: dict[int, list[nn.Conv2d]] = {}
    for child in parent.children():
        if type(child) is nn.Conv2d and child.out_channels in (slots, 2 * slots, 3 * slots):
            nets.setdefault(child.out_channels // slots, []).append(child)
    path = window(size, tuple(m.stride), tuple(m.dilation), tuple(m.padding))
    plan = Deformable(path.size, path.stride, path.dilation, path.padding)
    kernel = Dense(m.groups)
    chosen = nets.get(3) or (nets.get(2, []) + nets.get(1, []) if nets.get(2) else [])
    if any(len(some) > 1 for some in nets.values()) or not chosen:
        op = Basic(plan, Box(), Weight(kernel=kernel))
        return Match(op, note="offsets are given from outside; what makes them is not among its siblings")
    rho = Ones() if len(chosen) == 1 and not nets.get(3) else Modulated()
    op = Basic(plan, Box(), Weight(rho, kernel))
    makers = "offsets" if rho == Ones() else "offsets and mask"
    return Match(op, count(*chosen), nets=tuple(chosen), note=f"{makers} from {len(chosen)} sibling convolution")


def deformable_children(m: nn.Module) -> dict[str, Match]:
    """Every DeformConv2d among the children, by name."""
    return {name: deformable(child, m) for name, child in m.named_children() if is_deformable(child)}


def is_deformable(module: nn.Module) -> bool:
    """Whether a module is torchvision's DeformConv2d."""
    own = type(module)
    return (own.__module__, own.__qualname__) == ("torchvision.ops.deform_conv", "DeformConv2d")


RELATIVE = {"RelPosBias": "", "RelPosBiasTf": "", "RelPosMlp": "; an MLP makes the table"}
"""timm's biases that are one number for every relative position and head, and what the words leave open."""


def _partition(m: Any, attention: Any, spread: bool, axis: int) -> Match:
    """MaxViT's attention: in blocks, or among positions a block's number apart (the parent cuts the map)."""
    own = attention.rel_pos
    if own is not None and type(own).__name__ not in RELATIVE:
        raise Unsaid(f"no word for its bias {type(own).__name__}")
    note = CUT if own is None else CUT + RELATIVE[type(own).__name__]
    path = Block(plain(tuple(m.partition_size)), Scaled(bias="table") if own is not None else Scaled(), spread=spread)
    op = Basic(path, Box(), Weight(Softmax(attention.num_heads)))
    return Match(op, count(attention), axis=axis, note=note)


def _partitioned(axis: int) -> Callable[[Any], dict[str, Match]]:
    return lambda m: {"attn": _partition(m, m.attn, not m.partition_block, axis)}


def _partitioned_twice(m: Any) -> dict[str, Match]:
    return {f"attn_{name}": _partition(m, getattr(m, f"attn_{name}"), name == "grid", -1) for name in ("block", "grid")}


def _hugging_face_swin(m: Any) -> dict[str, Match]:
    path = Block(plain(m.window_size), Scaled(bias="table"), shift=m.shift_size, padded=True)
    op = Basic(path, Box(), Weight(Softmax(m.attention.num_attention_heads)))
    return {"attention": Match(op, count(m.attention), axis=-1, note=WIDE)}


def _pooling_head(m: Any) -> dict[str, Match]:
    return {"attention": crossed(RULES[MULTIHEAD](m.attention))}


MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"
PARENTS: dict[str, Callable[[Any], dict[str, Match]]] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _timm_swin_block,
    "timm.models.maxxvit.PartitionAttentionCl": _partitioned(-1),
    "timm.models.maxxvit.PartitionAttention2d": _partitioned(1),
    "timm.models.maxxvit.ParallelPartitionAttention": _partitioned_twice,
    "timm.models.mlp_mixer.MixerBlock": lambda m: {"mlp_tokens": token_table(m.mlp_tokens.fc1, m.mlp_tokens.fc2)},
    "timm.models.mlp_mixer.ResBlock": lambda m: {"linear_tokens": token_table(m.linear_tokens)},
    "transformers.models.swin.modeling_swin.SwinLayer": _hugging_face_swin,
    **{
        f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}MultiheadAttentionPoolingHead": _pooling_head
        for name in ("Siglip", "Siglip2")
    },
}


# --- what only a call shows: replaces the match, from (module, match, positional and named arguments)


def _multihead_call(m: Any, match: Match, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Match:
    given = (
        dict(zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), args, strict=False))
        | kwargs
    )
    if any(given.get(name) is not None for name in ("key_padding_mask", "attn_mask")) or given.get("is_causal"):
        raise Unsaid("it is called with a mask")
    if given["key"] is given["query"]:
        return match
    return crossed(match)


def _swin_call(m: Any, match: Match, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Match:
    x = args[0] if args else kwargs["x"]
    grid = x.shape[1:3]  # a block that covers the padded map is not shifted
    shift = tuple(0 if size >= n else s for n, size, s in zip(grid, m.window_size, m.shift_size, strict=True))
    return shifted_block(m, tuple(m.window_size), shift)


AT_CALL: dict[str, Callable[[Any, Match, tuple[Any, ...], dict[str, Any]], Match]] = {
    MULTIHEAD: _multihead_call,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _swin_call,
}
