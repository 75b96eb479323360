"""What the caller of an attention lets its queries read, from the masks and flags of torch, timm and transformers.

Shape legend: B batch, M queries, T keys.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import All, Row, Softmax, Window
from nearfold.lower.plan import apply
from nearfold.nn.mixer import TokenMixer
from nearfold.recognise.attention import visible

FORBIDDEN = -1e4  # what is added to a score, in a mask of numbers, where a key must not be read: this or less


def readable(mask: Any, batch: int, queries: int, keys: int) -> Tensor:
    """A mask as bool (B|1, 1|H, M, T), True where a query may read a key.

    Args:
        mask: bool (True: may read), or numbers that are added to the scores: 0, or -10000 and less. (M, T) or four
            axes, of which the third may be 1; whole numbers or bools (B, T) say which keys there are.
        batch: B.
        queries: M.
        keys: T.

    Raises:
        ValueError: where it is none of these, such as a bias.

    >>> readable(torch.tensor([[1, 1, 0]]), 1, 2, 3).tolist()
    [[[[True, True, False], [True, True, False]]]]
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"the mask must be a tensor for the layer that stands here, got {type(mask).__name__}")
    if mask.dim() == 2 and mask.shape == (batch, keys) and (not mask.is_floating_point()) and batch != queries:
        mask = mask.bool()[:, None, None]
    elif mask.dim() == 2:
        mask = mask[None, None]
    if mask.dim() != 4 or mask.shape[-1] != keys or mask.shape[2] not in (1, queries):
        raise ValueError(f"a mask for {queries} queries and {keys} keys cannot have the shape {tuple(mask.shape)}")
    if mask.is_floating_point():
        free, hidden = mask == 0, mask <= FORBIDDEN
        if not bool((free | hidden).all()):
            raise ValueError(
                "the mask adds numbers to the scores, a bias for which there is no word: undo the conversion of this "
                "layer"
            )
        mask = free
    elif mask.dtype != torch.bool:
        raise ValueError(f"a mask of four axes must be bool or floating point, got {mask.dtype}")
    return mask.expand(-1, -1, queries, -1)


def masked(mixer: TokenMixer, x: Tensor, mask: Tensor | None, added: bool) -> Tensor:
    """A layer on (B, T, D) under a mask (B|1, 1|H, T, T), or none.

    A causal window is all positions under a mask. A query that may read nothing, such as one of the padding left of a
    text, reads nothing; where the mask was ``added`` to the scores, it reads the mean of all values, as a softmax of
    equal scores gives it.
    """
    op = mixer.operation
    if mask is None or not isinstance(op, Basic):
        return mixer(x) if mask is None else mixer(x, mask=mask)
    if isinstance(op.path, Window) and op.shape.causal and op.weight.kernel is None:
        op, mask = dataclasses.replace(op, path=All(op.path.similarity)), mask & visible(op, x.shape[1], x.device)
    if (keys := _keys(op, mask, x.shape[0])) is not None:
        return apply(op, mixer.tensors(), x.mT, backend=mixer.backend, mask=keys).mT
    y = apply(op, mixer.tensors(), x.mT, backend=mixer.backend, mask=mask)
    lost = ~mask.any(-1)
    rho = op.weight.rho
    if added and isinstance(rho, Softmax) and op.weight.kernel is None and bool(lost.any()):
        weight = dataclasses.replace(op.weight, rho=dataclasses.replace(rho, scale=0.0))
        mean = apply(Basic(All(), Row(), weight), mixer.tensors(), x.mT)
        y = torch.where(lost.any(1)[:, None], mean, y)
    return y.mT


def _keys(op: Basic, mask: Tensor, batch: int) -> Tensor | None:
    """Which keys there are (B, T), where that is all that the mask says beside the operation's own shape; else None.

    `nearest` is fast under such a mask, and positions that are not there ask nothing either. With as many neighbours as
    there are keys it is plain attention, in which they do.
    """
    few = getattr(op.path, "k", mask.shape[-1]) < mask.shape[-1]
    if not few or mask.shape[1] != 1 or torch.compiler.is_compiling():
        return None
    keys = mask[:, 0, -1]
    seen = keys[:, None].expand(-1, mask.shape[2], -1)
    seen = seen.tril() if op.shape.causal else seen
    alike = ((mask[:, 0] == seen) | ~keys[:, :, None]).all() if mask.shape[2] == mask.shape[3] else None
    return keys.expand(batch, -1) if alike is not None and bool(alike) else None


def records_weights(config: Any) -> bool:
    """Whether transformers was asked for attention weights, which it takes from the layers by their class."""
    if getattr(config, "output_attentions", False):
        return True
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    wanted = collector.get() if collector is not None else None
    return any("attentions" in key for key in wanted or ())
