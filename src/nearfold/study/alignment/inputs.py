"""Measures of the images alone: how well a position is predicted from others. See docs/alignment.md.

Shape legend: N images, P positions, D features, S slots, R rows (positions drawn from the images), Q regressors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.study.alignment.positions import BLOCKS, FOLDS, Positions, read, slots, window
from nearfold.study.alignment.ridge import by_block, explained

ROWS = 20_000
"""Positions drawn as targets, the same number from every image."""
COMPARED = 200
"""Images in which positions are compared with all others of the image."""
NEAREST = 9
LEADING, TOGETHER = 8, 1600
"""Features that have regressions for every place, those of the largest variance; and of all positions together."""
PENALTIES = (0.03, 0.3, 3.0, 30.0)
"""Of the regressions that every position has of its own, in shares of the images."""

WITHIN = {f"window({size})": window(size) for size in (3, 5, 7)}
LINES = {
    "row(7)": window((1, 7)),
    "column(7)": window((7, 1)),
    "distance 1": ((-1, 0), (1, 0), (0, -1), (0, 1)),
    "distance 2": ((-2, 0), (2, 0), (0, -2), (0, 2)),
    "distance 4": ((-4, 0), (4, 0), (0, -4), (0, 4)),
    "earlier": tuple(offset for offset in window(5) if offset < (0, 0)),
    "later": tuple(offset for offset in window(5) if offset > (0, 0)),
}
"""Regressors by their offsets; a position's own is left out everywhere."""


def of_inputs(at: Positions) -> dict[str, Tensor]:
    """Shares of the variance of a position's features that others explain, in images left out: float64 (BLOCKS,) each.

    A measure that has no slots on this grid, such as columns on one row, is left out.

    >>> import torch
    >>> noise = torch.randn(200, 36, 1, generator=torch.Generator().manual_seed(0))
    >>> found = of_inputs(Positions(noise, torch.ones(1), (6, 6), torch.arange(200) % 2, 2))
    >>> abs(float(found["window(3)"].mean())) < 0.02
    True
    """
    x_NPD = at.x_NPD * at.scale_D
    x_NPD = x_NPD / x_NPD.square().mean().sqrt()
    count, places, size = x_NPD.shape
    draws = torch.Generator().manual_seed(0)
    each = max(1, min(places, ROWS // count))
    at_NR = torch.rand(count, places, generator=draws).argsort(1)[:, :each]
    block_R = at.blocks[:, None].expand(-1, each).flatten()
    y_RD = x_NPD.gather(1, at_NR[..., None].expand(-1, -1, size)).flatten(0, 1)

    def around(offsets: tuple[tuple[int, int], ...]) -> Tensor | None:
        table_PS = slots(at.grid, [offset for offset in offsets if offset != (0, 0)])
        if not table_PS.shape[1]:
            return None
        padded = F.pad(x_NPD, (0, 0, 0, 1))
        index_NRS = table_PS[at_NR]
        found = padded[torch.arange(count)[:, None, None], index_NRS]
        return found.flatten(2).flatten(0, 1)

    found: dict[str, Tensor] = {}
    for name, offsets in (WITHIN | LINES).items():
        z = around(offsets)
        if z is not None:
            found[name] = explained(z, y_RD, block_R)
    others_NRD = (x_NPD.sum(1, keepdim=True) - x_NPD).gather(1, at_NR[..., None].expand(-1, -1, size)) / (places - 1)
    found["everywhere"] = explained(_unit(others_NRD.flatten(0, 1)), y_RD, block_R)
    return found | _by_place(x_NPD, at) | _by_content(x_NPD, at)


def _unit(z_RQ: Tensor) -> Tensor:
    """Divided by the deviation of each regressor: penalties are for regressors of unit variance."""
    return z_RQ / z_RQ.square().mean(0).sqrt().clamp_min(1e-6)


def _by_place(x_NPD: Tensor, at: Positions) -> dict[str, Tensor]:
    """What the place alone explains; what regressions of every position's own add to one for all; all by place.

    Position means are those of the fitted images. A position's own regression on its window of 3 corrects the shared
    one. `table`: each position from all others, all at once by the inverse of the covariance (a ridge regression of
    x_p on the rest is minus the row of the inverse over its diagonal block).
    """
    most = min(LEADING, max(1, TOGETHER // x_NPD.shape[1]))
    x_NPD = x_NPD[..., x_NPD.square().mean((0, 1)).argsort(descending=True, stable=True)[:most]]
    count, places, size = x_NPD.shape
    zz_table = slots(at.grid, [offset for offset in window(3) if offset != (0, 0)])
    names = ("place", "shared", "own", "table")
    trials = {name: torch.zeros(1 if name in names[:2] else len(PENALTIES), count) for name in names}
    for fold in range(FOLDS):
        out = at.folds == fold
        mean_PD = x_NPD[~out].mean(0)
        y = x_NPD - mean_PD
        trials["place"][0, out] = y[out].square().sum((1, 2))
        z = read(y, zz_table).flatten(2)
        n, q = int((~out).sum()), z.shape[2]
        eye = torch.eye(q)
        zz_Pqq = torch.einsum("npq,npr->pqr", z[~out], z[~out])
        zy_PqD = torch.einsum("npq,npd->pqd", z[~out], y[~out])
        shared = torch.linalg.solve(zz_Pqq.sum(0) + 1e-3 * n * places * eye, zy_PqD.sum(0))
        left = y - z @ shared
        trials["shared"][0, out] = left[out].square().sum((1, 2))
        flat = y.flatten(1)
        for trial, penalty in enumerate(PENALTIES):
            own = torch.linalg.solve(zz_Pqq + penalty * n * eye, zy_PqD - zz_Pqq @ shared)
            trials["own"][trial, out] = (left[out] - torch.einsum("npq,pqd->npd", z[out], own)).square().sum((1, 2))
            inverse = torch.linalg.inv(flat[~out].T @ flat[~out] + penalty * n * torch.eye(places * size))
            block_PDD = inverse.view(places, size, places, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            missed = torch.linalg.solve(block_PDD, (flat[out] @ inverse).view(-1, places, size).permute(1, 2, 0))
            trials["table"][trial, out] = missed.square().sum((0, 1))
    square = x_NPD.square().sum((1, 2))
    best = {name: errors[errors.sum(1).argmin()] for name, errors in trials.items()}
    found = {name: by_block(error, square, at.blocks) for name, error in best.items()}
    gain = found["own"] - found["shared"]
    return {"place": found["place"], "own": gain, "table": found["table"] - found["place"]}


def _by_content(x_NPD: Tensor, at: Positions) -> dict[str, Tensor]:
    """What the positions that look most alike tell of a position: those with the same surroundings, or other features.

    `nearest`: the mean over the `NEAREST` positions of the image whose windows of 3, their middles left out, are most
    alike, weighed by nothing: that alone. `content`: what that mean, and one over all positions weighed by a softmax of
    the same comparison, add to the window itself. `similar`, with two or more features: each feature in turn from the
    mean over the positions most alike in the others, beyond what the others tell at the position itself.
    """
    x_NPD = x_NPD[:COMPARED]
    count, places, size = x_NPD.shape
    block_R = at.blocks[:count, None].expand(-1, places).flatten()
    around_NPQ = read(x_NPD, slots(at.grid, [offset for offset in window(3) if offset != (0, 0)])).flatten(2)
    alike_NPP = -torch.cdist(around_NPQ, around_NPQ).square()
    y_RD = x_NPD.flatten(0, 1)
    near = _unit(_nearest(alike_NPP, x_NPD).flatten(0, 1))
    warm = -alike_NPP.mean()
    soft = (
        torch.softmax((4 * alike_NPP / warm).masked_fill(torch.eye(places, dtype=torch.bool), -torch.inf), -1) @ x_NPD
    )
    fixed = around_NPQ.flatten(0, 1)
    found = {"nearest": explained(near, y_RD, block_R)}
    both = torch.cat([fixed, near, _unit(soft.flatten(0, 1))], 1)
    found["content"] = explained(both, y_RD, block_R) - explained(fixed, y_RD, block_R)
    if size > 1:
        alone, beyond = torch.zeros(BLOCKS, dtype=torch.float64), torch.zeros(BLOCKS, dtype=torch.float64)
        weight_D = x_NPD.square().mean((0, 1)).double()
        for d in range(size):
            rest_NPQ = x_NPD[..., [e for e in range(size) if e != d]]
            mean = _nearest(-torch.cdist(rest_NPQ, rest_NPQ), x_NPD[..., d : d + 1])
            rest, y = rest_NPQ.flatten(0, 1), y_RD[:, d : d + 1]
            alone += weight_D[d] * explained(rest, y, block_R)
            beyond += weight_D[d] * explained(torch.cat([rest, mean.flatten(0, 1)], 1), y, block_R)
        found["similar"] = (beyond - alone) / weight_D.sum()
    return found


def _nearest(alike_NPP: Tensor, x_NPD: Tensor) -> Tensor:
    """The mean over the positions that are most alike, the position itself left out: (N, P, D)."""
    places = alike_NPP.shape[1]
    own = torch.eye(places, dtype=torch.bool)
    index = alike_NPP.masked_fill(own, -torch.inf).topk(min(NEAREST, places - 1), dim=-1).indices
    return torch.stack([x[rows].mean(1) for x, rows in zip(x_NPD, index, strict=True)])
