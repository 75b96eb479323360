"""Weight: scores -> alpha, one number per slot. Shared by the oracle and the fast backends.

Shape legend: B batch, H heads, M outputs, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearfold.grammar.words import Identity, Inverse, Mean, Normalized, Ones, Rho, Softmax


def _softmax(rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
    assert isinstance(rho, Softmax)
    # finite in invalid slots: -inf * a negative scale, or a row without any valid slot, would give NaN
    masked = (score.masked_fill(~valid, 0) * rho.scale).masked_fill(~valid, torch.finfo(score.dtype).min)
    return torch.softmax(masked, -1).masked_fill(~valid, 0)


def _ones(rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
    return valid.to(score.dtype)


def _identity(rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
    return score.masked_fill(~valid, 0)


def _inverse(rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
    return (1 / (1e-8 - score.masked_fill(~valid, 0))).masked_fill(~valid, 0)


def _mean(rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
    return mean_of(valid, score.dtype)


def _normalized(rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
    score = score.masked_fill(~valid, 0)
    total = score.sum(-1, keepdim=True)
    return score / total.masked_fill(total == 0, 1)


Rule = Callable[[Any, Tensor, Tensor], Tensor]
RULES: dict[type[Rho], Rule] = {
    Ones: _ones,
    Identity: _identity,
    Softmax: _softmax,
    Inverse: _inverse,
    Mean: _mean,
    Normalized: _normalized,
}


def mean_of(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the number of valid slots (.., M, S), zero in the others."""
    return valid.to(dtype) / valid.sum(-1, keepdim=True).clamp(min=1)


def alpha_of(rho: Rho, score: Tensor, valid: Tensor) -> Tensor:
    """Alpha (B, H, M, S): zero in slots that are not valid, NaN where the score is."""
    alpha = RULES[type(rho)](rho, score, valid)
    # a query that was NaN has no valid slot, and its output is NaN all the same
    return alpha.masked_fill(score.isnan(), float("nan"))
