"""A rho of somebody's own: every head forgets the slots at a rate that it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from nearfold.extend import Parameter, Rho, RhoMeaning, positive, register


@dataclass(frozen=True)
class Fading(Rho):
    """alpha[h, s] = exp(-rate[h] * s), the slots counted from zero."""

    word = "fading"
    needs_score = False
    default_projections = ""
    primitive = ("FADING", 1)
    examples: ClassVar[dict[str, str]] = {
        "fading": "window(3) | box | fading(2)",
        "fading_kernel": "window(3, stride=2) | box | fading(4)*kernel",
        "fading_block": "block(2) | box | fading",
    }
    heads: int = field(default=1, metadata={"positional": True})
    project: str | None = None

    def __post_init__(self):
        positive(self, heads=self.heads)


class FadingMeaning(RhoMeaning):
    def parameters(self, op, sizes):
        return {"fading_rate": Parameter((op.weight.rho.heads,), "constant:1")}

    def constant(self, call, valid, index):
        rate_H11 = call.params["fading_rate"][:, None, None]
        return torch.exp(-rate_H11 * torch.arange(valid.shape[-1], device=valid.device)) * valid


register(Fading, FadingMeaning())
