"""Learned keys, queries and weights that belong to no position.

Shape legend: B batch, H heads, M queries or seeds, N positions, P mixtures, a latents or landmarks, e embedded
features, d features of a head.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Latents, Nystrom, Projected, Seeds, Synthesized
from nearfold.lower.call import Call, count_positions, pointwise, split_heads
from nearfold.lower.meaning import Lengths, PathMeaning, RhoMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.selection import Selection, metric_scores
from nearfold.lower.weighting import wide_dtype
from nearfold.lower.words.pooled import block_means, block_positions, masked_softmax

STEPS = 6  # of the iteration for a pseudo-inverse (arXiv 2102.03902, 3.2)


def require_inputs(call: Call, inputs: int) -> None:
    """ValueError where the grid has another number of positions than the word's tables."""
    if count_positions(call.grid) != inputs:
        raise ValueError(
            f"{call.op}: its tables are for {inputs} positions, got a grid of {call.grid} = "
            f"{count_positions(call.grid)}"
        )


@means(Projected)
class ProjectedMeaning(PathMeaning):
    """A slot for every mixture, which reads all positions by its own coefficients."""

    everywhere = True

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        path = cast(Projected, op.path)
        table = Parameter((path.n, path.inputs), "uniform", path.inputs)
        return {"key_table": table, "value_table": table}

    def select(self, call: Call) -> Selection:
        path, N = cast(Projected, call.op.path), count_positions(call.grid)
        require_inputs(call, path.inputs)
        q_BHMe, k_BHNe = call.embedded()
        key_PN, value_PN = (call.params[name].to(k_BHNe.dtype) for name in ("key_table", "value_table"))
        score = metric_scores("dot", False, q_BHMe, metric_scores("dot", False, key_PN, k_BHNe.mT))
        index = torch.arange(N, device=score.device).repeat(path.n).expand(1, 1, N, -1)
        valid = torch.ones_like(index, dtype=torch.bool)
        return Selection(index, valid, score, N, value_PN.flatten().expand(1, 1, N, -1), N)


def keys_of(call: Call) -> Tensor:
    """The keys (B, H, N, d)."""
    assert call.key is not None
    return split_heads(call.key, call.heads)


def learned(call: Call, name: str, rho: Seeds | Latents) -> Tensor:
    """Learned vectors (1, H, a, d) of all heads, of a parameter (a, channels)."""
    return call.params[name].unflatten(1, (rho.heads, -1)).transpose(0, 1)[None]


class _OfKeys(RhoMeaning):
    """A rho that compares keys with something else than queries."""

    takes_mask = False


@means(Seeds)
class SeedsMeaning(_OfKeys):
    """Learned queries, whose answers are the output."""

    generating = ("seed",)

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        return {"seed_weight": Parameter((cast(Seeds, op.weight.rho).n, sizes.inner), "normal:1", decays=False)}

    def output(self, op: Basic, grid: Lengths, out: Lengths) -> Lengths:
        return (1,) * (len(grid) - 1) + (cast(Seeds, op.weight.rho).n,)

    def queries(self, call: Call) -> Tensor:
        return torch.zeros(cast(Seeds, call.op.weight.rho).n, dtype=torch.long, device=call.value.device)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        rho, wide = cast(Seeds, call.op.weight.rho), wide_dtype(call)
        seed_1HMd, k_BHNd = learned(call, "seed_weight", rho).to(wide), keys_of(call).to(wide)
        score = metric_scores("dot", False, seed_1HMd, k_BHNd) * k_BHNd.shape[-1] ** -0.5
        return competed(score, valid) if rho.competing else masked_softmax(score, valid)


def competed(score_BHMN: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the seeds, divided by the sums over the positions that are there."""
    share = torch.softmax(score_BHMN, 2).masked_fill(~valid, 0)
    return share / share.sum(-1, keepdim=True).clamp(min=1e-30)


@means(Latents)
class LatentsMeaning(_OfKeys):
    """Two softmaxes of one matrix of scores, along its two axes."""

    generating = ("latent",)

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        return {"latent_weight": Parameter((cast(Latents, op.weight.rho).n, sizes.inner), "normal:1", decays=False)}

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        rho, wide = cast(Latents, call.op.weight.rho), wide_dtype(call)
        score = metric_scores("dot", False, learned(call, "latent_weight", rho).to(wide), keys_of(call).to(wide))
        return torch.softmax(score.mT, -1) @ masked_softmax(score, valid[:, :, :1])


@means(Nystrom)
class NystromMeaning(_OfKeys):
    """Landmarks, and the pseudo-inverse between them."""

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        assert call.query is not None
        rho = cast(Nystrom, call.op.weight.rho)
        q_BHNd, k_BHNd = (t.to(wide_dtype(call)) for t in (split_heads(call.query, call.heads), keys_of(call)))
        at_Ps = block_positions(as_tuple(rho.size, call.ndim, "size"), True, call.grid, q_BHNd.device)
        q_BHad, k_BHad = (block_means(call, t, at_Ps)[0] for t in (q_BHNd, k_BHNd))
        scale = q_BHNd.shape[-1] ** -0.5
        to_Na, between_aa, from_aN = (
            torch.softmax(metric_scores("dot", False, q, k) * scale, -1)
            for q, k in ((q_BHNd, k_BHad), (q_BHad, k_BHad), (q_BHad, k_BHNd))
        )
        return to_Na @ pseudo_inverse(between_aa) @ from_aN


def pseudo_inverse(a: Tensor) -> Tensor:
    """Of square matrices (..., n, n) with rows that add up to one, by an iteration of third order."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    # over the largest sums of a column and of a row: this starts within reach
    z = a.mT / (a.sum(-2).amax(-1) * a.sum(-1).amax(-1))[..., None, None]
    for _ in range(STEPS):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


@means(Synthesized)
class SynthesizedMeaning(RhoMeaning):
    """A table's softmax, or that of numbers which a query makes of itself."""

    generating = ("reduce", "span")
    takes_mask = False

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        rho = cast(Synthesized, op.weight.rho)
        if rho.hidden is None:
            return {"table_weight": Parameter((rho.heads, rho.inputs, rho.inputs), "normal:1")}
        return linear("reduce", rho.hidden, sizes.in_channels, sizes.bias) | linear(
            "span", rho.heads * rho.inputs, rho.hidden, sizes.bias
        )

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        rho, params = cast(Synthesized, call.op.weight.rho), call.params
        require_inputs(call, rho.inputs)
        if rho.hidden is None:
            return masked_softmax(params["table_weight"].to(wide_dtype(call))[None], valid)
        hidden = F.relu(pointwise(call.x, params["reduce_weight"], params.get("reduce_bias")))
        made = pointwise(hidden, params["span_weight"], params.get("span_bias"))
        return masked_softmax(split_heads(made, rho.heads).to(wide_dtype(call)), valid)
