"""Rhos that weigh every score by itself: `sigmoid` and `relu`."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Rectified, Sigmoid
from nearfold.lower.meaning import RhoMeaning, means


def _many(score: Tensor, valid: Tensor) -> Tensor:
    """How many slots there are, one at least."""
    return valid.sum(-1, keepdim=True).clamp(min=1).to(score.dtype)


@means(Sigmoid)
class SigmoidMeaning(RhoMeaning):
    """The sigmoid of every score, less the logarithm of their number."""

    adds = True

    def weigh(self, rho: Sigmoid, score: Tensor, valid: Tensor) -> Tensor:
        moved = score.masked_fill(~valid, 0) - _many(score, valid).log()
        return torch.sigmoid(moved).masked_fill(~valid, 0)


@means(Rectified)
class RectifiedMeaning(RhoMeaning):
    """What is positive of every score, over their number."""

    adds = True

    def weigh(self, rho: Rectified, score: Tensor, valid: Tensor) -> Tensor:
        shared = torch.relu(score.masked_fill(~valid, 0) / _many(score, valid))
        return shared if rho.power == 1 else shared**rho.power
