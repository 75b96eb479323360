"""Rhos that make alpha of scores and valid slots alone.

Shape legend: B batch, H heads, M outputs, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Identity, Inverse, Mean, Normalized, Ones, Rho, Softmax
from nearfold.lower.call import Call
from nearfold.lower.meaning import RhoMeaning, means
from nearfold.lower.weighting import wide_dtype


@means(Ones)
class OnesMeaning(RhoMeaning):
    """One in every valid slot."""

    apart = True
    first = 1.0

    def weigh(self, rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
        return valid.to(score.dtype)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        return valid.to(wide_dtype(call))


@means(Mean)
class MeanMeaning(RhoMeaning):
    """One over the number of valid slots."""

    apart = True

    def weigh(self, rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
        return _mean(valid, score.dtype)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        return _mean(valid, wide_dtype(call))


def _mean(valid: Tensor, dtype: torch.dtype) -> Tensor:
    return valid.to(dtype) / valid.sum(-1, keepdim=True).clamp(min=1)


@means(Identity)
class IdentityMeaning(RhoMeaning):
    """The scores."""

    adds = True

    def weigh(self, rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
        return score.masked_fill(~valid, 0)


@means(Softmax)
class SoftmaxMeaning(RhoMeaning):
    """Softmax of the scores times a scale."""

    adds = True

    shares = True

    def weigh(self, rho: Softmax, score: Tensor, valid: Tensor) -> Tensor:
        # finite in invalid slots: -inf * a negative scale, or a row without any valid slot, would give NaN
        masked = (score.masked_fill(~valid, 0) * rho.scale).masked_fill(~valid, torch.finfo(score.dtype).min)
        return torch.softmax(masked, -1).masked_fill(~valid, 0)


@means(Inverse)
class InverseMeaning(RhoMeaning):
    """One over the distance, which is minus the score."""

    def weigh(self, rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
        return (1 / (1e-8 - score.masked_fill(~valid, 0))).masked_fill(~valid, 0)


@means(Normalized)
class NormalizedMeaning(RhoMeaning):
    """The scores over their sum."""

    def weigh(self, rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
        score = score.masked_fill(~valid, 0)
        total = score.sum(-1, keepdim=True)
        return score / total.masked_fill(total == 0, 1)
