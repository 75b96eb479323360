"""Weight: alpha, one number per slot, from scores or without. Shared by the oracle and the fast backends.

Shape legend: B batch, H heads, M outputs, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearfold.grammar.words import Rho
from nearfold.lower.call import Call
from nearfold.lower.meaning import RhoMeaning, meaning

Rule = Callable[[Any, Tensor, Tensor], Tensor]
"""(rho, score, valid) -> alpha, as `RhoMeaning.weigh` says."""


class OwnRule(RhoMeaning):
    """A rho from outside, by what it makes of the scores."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def weigh(self, rho: Any, score: Tensor, valid: Tensor) -> Tensor:
        return self.rule(rho, score, valid)


def wide_dtype(call: Call) -> torch.dtype:
    """The dtype of alpha: float32 at least."""
    return torch.promote_types(call.value.dtype, torch.float32)


def alpha_of(rho: Rho, score: Tensor, valid: Tensor, fast: bool = True) -> Tensor:
    """Alpha (B, H, M, S): zero in slots that are not valid, NaN where the score is. ``fast``: as the backends do it."""
    means = meaning(rho)
    alpha = (means.weigh_fast if fast else means.weigh)(rho, score, valid)
    # a query that was NaN has no valid slot, and its output is NaN all the same
    return alpha.masked_fill(score.isnan(), float("nan"))


def constant_alpha(call: Call, valid: Tensor, index: Tensor) -> Tensor | None:
    """Alpha (B|1, H|1, M, S) of a rho that looks at no score; None for those that do. ``valid`` (B|1, H|1, M, S)."""
    return meaning(call.op.weight.rho).constant(call, valid, index)
