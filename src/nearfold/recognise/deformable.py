"""Deformable attention, ours and that of transformers' Deformable DETR, in the words.

Verified against transformers 5.24.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from nearfold.grammar import Basic, Weight
from nearfold.grammar.words import Box, Modulated, Points
from nearfold.recognise.foreign import Match, Rule, Unsaid, count, names_of

_MODEL = "transformers.models.deformable_detr.modeling_deformable_detr"
LAYER, CORE = f"{_MODEL}.DeformableDetrMultiscaleDeformableAttention", f"{_MODEL}.MultiScaleDeformableAttention"
OURS = "nearfold.nn.deformable.MultiScaleDeformableAttention"
QUICK = "nearfold.compat.deformable_detr.DeformableCore"  # stands for the core in networks that were quickened
NETS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def require_deformable(layer: nn.Module) -> Any:
    """The layer itself, whose forward and maps are those of Deformable DETR.

    Raises:
        ValueError: for any other.
    """
    if LAYER not in names_of(layer):
        raise ValueError(
            "layer must be transformers' DeformableDetrMultiscaleDeformableAttention, or a subclass that keeps its "
            f"forward, got {type(layer).__module__}.{type(layer).__qualname__}"
        )
    for name in NETS:
        net = getattr(layer, name, None)
        if type(net) is not nn.Linear or parametrize.is_parametrized(net) or "forward" in vars(net):
            raise ValueError(f"layer: its {name} must be a plain nn.Linear, got {type(net).__name__}")
    return layer


def _said(heads: int, levels: int, points: int, *nets: nn.Module) -> Match:
    path = Points(points, groups=heads, levels=levels, cross=True)
    op = Basic(path, Box(), Weight(Modulated("softmax", "vo")))
    return Match(op, count(*nets), axis=-1, note="around reference points that the caller gives")


def _foreign(m: Any) -> Match:
    try:
        require_deformable(m)
    except ValueError as error:
        raise Unsaid(str(error)) from error
    if not {CORE, QUICK} & set(names_of(m.attn)):
        raise Unsaid(f"its attn is a {type(m.attn).__name__} that computes something of its own")
    return _said(m.n_heads, m.n_levels, m.n_points, m)


def _own(m: Any) -> Match:
    return _said(m.num_heads, m.levels, m.points, m)


DEFORMABLE_RULES: dict[str, Rule] = {LAYER: _foreign, OURS: _own}
