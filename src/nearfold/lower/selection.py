"""Path with Shape -> Selection: for every output position an ordered list of slots and what they read.

This is the meaning, for the oracle and for pictures; fast backends never build the dense scores.

Shape legend: B batch, H heads, M outputs, N positions, S slots, e embedded features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nearfold.lower.call import Call, is_transformed
from nearfold.lower.meaning import meaning


@dataclass(frozen=True)
class Selection:
    """``index`` (B|1, H|1, M, S) into the input positions, ``valid`` the same shape, ``score`` or None.

    A slot that is not valid reads nothing; its index is 0 and its score -inf. A NaN score marks a query that
    was NaN: its output is NaN. A slot at a fractional position, or one that is a mean, reads ``entries`` positions next
    to one another in S, each by its ``coefficient`` (B|1, H|1, M, S); `score` still has one number for each slot.
    With `in_order` slot n reads position n wherever it is valid.
    """

    index: Tensor
    valid: Tensor
    score: Tensor | None
    positions: int
    coefficient: Tensor | None = None
    entries: int = 1
    in_order: bool = False

    def __post_init__(self) -> None:
        assert self.index.dtype == torch.long and self.valid.dtype == torch.bool
        assert self.index.shape[-2:] == self.valid.shape[-2:], (self.index.shape, self.valid.shape)
        unknown = torch.compiler.is_compiling() or self.index.is_meta or is_transformed(self.index)
        if not unknown and self.index.numel():
            low, high = self.index.min().item(), self.index.max().item()
            assert low >= 0 and high < self.positions, (low, high, self.positions)

    def per_slot(self, valid: Tensor) -> Tensor:
        """Whether a slot is there (..., slots), of whether its entries are (..., slots * entries).

        One that moves by itself is there wherever its entries are, one that is compared where one of them is.
        """
        if self.entries == 1:
            return valid
        return valid.unflatten(-1, (-1, self.entries)).any(-1) | (self.score is None)


def metric_scores(metric: str, squared: bool, q: Tensor, k: Tensor) -> Tensor:
    """Scores (B, H, M, N) of embedded queries (B, H, M, e) and keys (B, H, N, e), in their dtype under autocast too."""
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return metric_scores(metric, squared, q, k)
    if metric == "dot":
        return q @ k.transpose(-1, -2)
    if metric == "cosine":
        return (q @ k.transpose(-1, -2)).clamp(-1, 1)
    if metric == "chebyshev":
        return -torch.cdist(q, k, p=float("inf"))
    if metric == "gram":
        square = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :] - 2 * (q @ k.transpose(-1, -2))
        square = square.clamp(min=0)
    else:
        square = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
    return -square if squared else distance_score(-square)


def distance_score(rank: Tensor) -> Tensor:
    """Minus the squared distance -> minus the distance, whose gradient at zero is zero."""
    zero = rank == 0
    return -(-rank.masked_fill(zero, -1)).sqrt().masked_fill(zero, 0)


def select(call: Call) -> Selection:
    """The selection of one call, from dense scores."""
    chosen = meaning(call.op.path).select(call)
    return chosen if call.keep is None else _present(chosen, call.keep)


def _present(chosen: Selection, keep: Tensor) -> Selection:
    """The selection, in which a slot that reads a position that is not there is not valid."""
    there = present(keep, chosen.index)
    valid, score = chosen.valid & there, chosen.score
    if score is not None:
        score = torch.where(
            chosen.per_slot(there) | score.isnan(), score, float("-inf")
        )  # the mark of a query that was NaN stays
    index = chosen.index.expand_as(valid).masked_fill(~valid, 0)
    return replace(chosen, index=index, valid=valid, score=score)


def present(keep: Tensor, index: Tensor) -> Tensor:
    """Whether the position that a slot reads (B|1, H|1, M, S), 0 or above, is there (B, H|1, M, S); keep (B, N)."""
    index = index.expand(keep.shape[0], -1, -1, -1)
    return keep.gather(1, index.flatten(1)).view(index.shape)


def readable(mask: Tensor) -> Tensor:
    """Which keys a mask, of bools or of numbers that are added to the scores, lets a query read."""
    return mask > float("-inf") if mask.is_floating_point() else mask


def added(call: Call, query_M: Tensor, key_N: Tensor | None = None, index_MS: Tensor | None = None) -> Tensor | None:
    """What a call's mask adds to the scores (B|1, H|1, M, N), or by slots (B|1, H|1, M, S); None where nothing."""
    if call.mask is None or not call.mask.is_floating_point():
        return None
    found = masked_pairs(call.mask, query_M, key_N, index_MS)
    return found.masked_fill(found == float("-inf"), 0)  # such a key is not read at all


def masked_pairs(mask: Tensor, query_M: Tensor, key_N: Tensor | None, index_MS: Tensor | None) -> Tensor:
    """The entries of a mask (B|1, H|1, N, N') for queries with keys (M, N), or with what their slots read (M, S)."""
    rows = mask[:, :, query_M]
    if index_MS is None:
        return rows if key_N is None else rows[..., key_N]
    return rows.gather(-1, index_MS.expand(*rows.shape[:2], -1, -1))


def allowed(call: Call, query_M: Tensor, key_N: Tensor) -> Tensor | None:
    """Which keys a query may read at all (M, N), by shape and similarity; None for every one.

    Under the call's own mask it is (B|1, H|1, M, N).
    """
    found = meaning(call.op.path).allowed(call, query_M, key_N)
    for given in (
        None if call.mask is None else readable(call.mask[:, :, query_M][..., key_N]),
        None if call.keep is None else call.keep[:, None, None, key_N].expand(-1, -1, len(query_M), -1),
    ):
        if given is not None:
            found = given if found is None else given & found
    return found
