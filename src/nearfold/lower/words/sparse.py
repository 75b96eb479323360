"""Sparsemax and entmax: the closed form over sorted scores, and the operator that finds the threshold without a sort.

Shape legend: B batch, H heads, M outputs, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Entmax, Shares, Sparsemax
from nearfold.kernels.entmax import entmax
from nearfold.lower.meaning import RhoMeaning, means


class _Thresholded(RhoMeaning):
    """max(score / power - tau, 0) ** power, with the tau under which it adds up to one."""

    adds = True

    shares = True
    power = 1

    def weigh(self, rho: Shares, score: Tensor, valid: Tensor) -> Tensor:
        # finite in invalid slots, as softmax: their gradient would be NaN
        z = (score.masked_fill(~valid, 0) * (rho.scale / self.power)).masked_fill(~valid, torch.finfo(score.dtype).min)
        z = z - z.detach().amax(-1, keepdim=True)  # tau moves along
        with torch.no_grad():
            inside = z > self._tau(z)
        tau = self._level(z, inside)
        alpha = (z - tau).masked_fill(~inside, 0) ** self.power
        return alpha.masked_fill(z.isnan().any(-1, keepdim=True), float("nan")).masked_fill(~valid, 0)

    def weigh_fast(self, rho: Shares, score: Tensor, valid: Tensor) -> Tensor:
        masked = (score.masked_fill(~valid, 0) * rho.scale).masked_fill(~valid, float("-inf"))
        return entmax(masked, self.power)

    def _tau(self, z: Tensor) -> Tensor:
        """That of the most sorted scores which all are above their own (arXiv 1905.05702, algorithm 2)."""
        # the largest is 0, and what is below -1 has no share: any other number there is as good, and sums up better
        ranked = z.clamp(min=-2).sort(dim=-1, descending=True).values
        n = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        total = ranked.cumsum(-1)
        if self.power == 1:
            tau = (total - 1) / n
        else:
            mean = total / n
            spread = ranked.square().cumsum(-1) - n * mean.square()
            tau = mean - ((1 - spread) / n).clamp(min=0).sqrt()
        many = (ranked > tau).sum(-1, keepdim=True)
        return tau.gather(-1, (many - 1).clamp(min=0))

    def _level(self, z: Tensor, inside: Tensor) -> Tensor:
        """Tau again, from the slots that have a share alone: this one has a gradient."""
        n = inside.sum(-1, keepdim=True).clamp(min=1).to(z.dtype)
        mean = z.masked_fill(~inside, 0).sum(-1, keepdim=True) / n
        if self.power == 1:
            return mean - 1 / n
        spread = (z - mean).masked_fill(~inside, 0).square().sum(-1, keepdim=True)
        return mean - ((1 - spread) / n).sqrt()


@means(Sparsemax)
class SparsemaxMeaning(_Thresholded):
    """The projection onto the simplex (arXiv 1602.02068)."""


@means(Entmax)
class EntmaxMeaning(_Thresholded):
    """Entmax of order 1.5 (arXiv 1905.05702)."""

    power = 2
