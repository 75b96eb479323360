"""Ridge regression in closed form, and how well it predicts what it was not fitted to.

Shape legend: N images or rows, Q regressors, D targets, M features, K classes, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfold.study.alignment.positions import BLOCKS, FOLDS

PENALTIES = (1e-4, 1e-2, 1e-1, 1.0, 10.0)
"""Of a regression, in shares of the rows: regressors have about unit variance."""
KEPT = 192
"""Features of a group that a classifier keeps."""
SHARES = (0.4, 2.0)
"""What a second group of features is multiplied by."""


def explained(z_NQ: Tensor, y_ND: Tensor, block_N: Tensor) -> Tensor:
    """Share of the variance of y that ridge regression on z explains in images it was not fitted to, by the block.

    Fitted `FOLDS` times, each without a fold, for every penalty of `PENALTIES`; the penalty with the least error in all
    counts. The values' mean over the blocks is ``1 - sum of squared errors / sum of squares``; y and z are centred.

    Args:
        z_NQ: regressors.
        y_ND: targets.
        block_N: the block of every row, int64.

    Returns:
        float64 (BLOCKS,).

    >>> z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    >>> bool(explained(z, 2 * z, torch.arange(4000) % BLOCKS).mean() > 0.999)
    True
    """
    z, y = z_NQ.float(), y_ND.float()
    members = [(block_N == block).nonzero()[:, 0] for block in range(BLOCKS)]
    zz = torch.stack([(z[rows].T @ z[rows]).double() for rows in members])
    zy = torch.stack([(z[rows].T @ y[rows]).double() for rows in members])
    yy = torch.stack([y[rows].double().square().sum() for rows in members])
    return _least(zz, zy, yy, len(z))


def _least(zz_BQQ: Tensor, zy_BQD: Tensor, yy_B: Tensor, rows: int) -> Tensor:
    """`explained` from the sums of products of every block."""
    errors = torch.empty(len(PENALTIES), BLOCKS, dtype=torch.float64)
    eye = torch.eye(zz_BQQ.shape[1], dtype=torch.float64)
    fold_B = torch.arange(BLOCKS) % FOLDS
    for fold in range(FOLDS):
        out = fold_B == fold
        zz, zy = zz_BQQ[~out].sum(0), zy_BQD[~out].sum(0)
        for n, penalty in enumerate(PENALTIES):
            w = torch.linalg.solve(zz + penalty * rows * eye, zy)
            fit = ((zz_BQQ[out] @ w) * w).sum((1, 2)) - 2 * (zy_BQD[out] * w).sum((1, 2))
            errors[n, out] = yy_B[out] + fit
    best = errors.sum(1).argmin()
    return (yy_B - errors[best]) / yy_B.mean()


def by_block(error_N: Tensor, square_N: Tensor, block_N: Tensor) -> Tensor:
    """`explained` from the squared error and the square of every row."""
    zero = torch.zeros(BLOCKS, dtype=torch.float64)
    error, square = (zero.index_add(0, block_N, values.double()) for values in (error_N, square_N))
    return (square - error) / square.mean()


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be told from features: labels int64 (N,), how many classes, and the fold of every image."""

    labels: Tensor
    classes: int
    folds: Tensor

    @property
    def truth_NK(self) -> Tensor:
        """The labels, one-hot: float64 (N, K)."""
        return torch.nn.functional.one_hot(self.labels, self.classes).double()


def right(z_FNM: Sequence[Tensor], task: Task) -> Tensor:
    """Which images a ridge classifier names correctly when their fold is left out: bool (N,).

    One ridge regression on the labels, one-hot and centred, for every fold; its penalty is that of the least
    leave-one-out error in the other folds, which has a closed form (Rifkin and Lippert, Notes on regularized least
    squares, 2007).

    Args:
        z_FNM: features (N, M) for every fold, chosen and standardised by the others: `screened`.
        task: the labels.

    >>> labels = torch.arange(400) % 2
    >>> task = Task(labels, 2, torch.arange(400) // 2 % FOLDS)
    >>> bool(right(screened(torch.cat([labels[:, None].float(), torch.randn(400, 50)], 1), task), task).all())
    True
    """
    found = torch.zeros(len(task.labels), dtype=torch.bool)
    for fold, z_NM in enumerate(z_FNM):
        out = task.folds == fold
        mean = task.truth_NK[~out].mean(0)
        weights = _fitted(z_NM[~out], task.truth_NK[~out] - mean)
        found[out] = (z_NM[out] @ weights + mean).argmax(1) == task.labels[out]
    return found


def beside(own_FNM: Sequence[Tensor], more_FNM: Sequence[Tensor], alone_N: Tensor, task: Task) -> Tensor:
    """`right` with more features beside some, whose answers alone are given: bool (N,).

    How much the second count beside the first, one of `SHARES` or nothing, is chosen for every fold by the images of
    the other folds: features that do not help do not hurt.
    """
    joined = ([torch.cat([a, s * b], 1) for a, b in zip(own_FNM, more_FNM, strict=True)] for s in SHARES)
    good = torch.stack([alone_N, *(right(z_FNM, task) for z_FNM in joined)])
    found = torch.zeros_like(alone_N)
    for fold in range(FOLDS):
        out = task.folds == fold
        found[out] = good[good[:, ~out].sum(1).argmax(), out]
    return found


def screened(features_NM: Tensor, task: Task) -> list[Tensor]:
    """For every fold, the `KEPT` features that tell the classes apart best in the others, standardised by them.

    By the F statistic of each feature alone (sure independence screening, Fan and Lv 2008): float64 (N, at most KEPT).
    """
    x = features_NM - features_NM.mean(0)
    scale = x.square().mean(0).sqrt()
    x = x / scale.clamp_min(1e-6)
    cell_N = task.folds * task.classes + task.labels
    cells = torch.nn.functional.one_hot(cell_N, FOLDS * task.classes).float()
    sums_FKM = (cells.T @ x).unflatten(0, (FOLDS, task.classes)).double()
    squares_FM = torch.stack([x[task.folds == fold].square().sum(0) for fold in range(FOLDS)]).double()
    count_FK = cells.sum(0).unflatten(0, (FOLDS, task.classes)).double()
    found = []
    for fold in range(FOLDS):
        count_K, sums_KM = count_FK.sum(0) - count_FK[fold], sums_FKM.sum(0) - sums_FKM[fold]
        rows = count_K.sum()
        mean = sums_KM.sum(0) / rows
        variance = (squares_FM.sum(0) - squares_FM[fold]) / rows - mean.square()
        apart = (sums_KM.square() / count_K.clamp_min(1)[:, None]).sum(0) - rows * mean.square()
        statistic = torch.where((variance > 1e-6) & (scale > 1e-6), apart / variance.clamp_min(1e-6), 0.0)
        best = statistic.topk(min(KEPT, len(mean))).indices.sort().values
        found.append((x[:, best].double() - mean[best]) / variance[best].clamp_min(1e-6).sqrt())
    return found


def _fitted(z_nM: Tensor, y_nK: Tensor) -> Tensor:
    """Weights (M, K) of the ridge regression with the least leave-one-out error."""
    value, vector = torch.linalg.eigh(z_nM.T @ z_nM)
    value = value.clamp_min(0)
    turned = z_nM @ vector
    projected = turned.T @ y_nK
    best, least = None, float("inf")
    for penalty in (1e-3, 1e-2, 1e-1, 1.0):
        shrunk = 1 / (value + penalty * len(z_nM))
        leverage = (turned.square() * shrunk).sum(1) + 1 / len(z_nM)  # and the mean's
        missed = (y_nK - turned @ (shrunk[:, None] * projected)) / (1 - leverage).clamp_min(1e-6)[:, None]
        error = float(missed.square().sum())
        if error < least:
            best, least = vector @ (shrunk[:, None] * projected), error
    assert best is not None
    return best
