"""Ridge regression in closed form, and how well it predicts what it was not fitted to.

Shape legend: N images or rows, Q regressors, D targets, M features, K classes, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nearfold.study.alignment.positions import BLOCKS, FOLDS

PENALTIES = (1e-4, 1e-2, 1e-1, 1.0, 10.0)
"""Of a regression, in shares of the rows: regressors have about unit variance."""
KEPT = 256
"""Features of a group that a classifier keeps."""
SHARES = (0.3, 1.0, 3.0)
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
    >>> bool((explained(z, 2 * z, torch.arange(4000) % BLOCKS) > 0.999).all())
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


def right(groups: Sequence[Tensor], labels_N: Tensor, classes: int, fold_N: Tensor) -> Tensor:
    """Which images a ridge classifier on features names correctly when their fold is left out: bool (N,).

    In every fold, from the other folds alone: features are standardised; of each group the `KEPT` are kept whose means
    differ most between the classes, by the F statistic (sure independence screening, Fan and Lv 2008); one ridge
    regression on the labels, one-hot and centred, with the penalty of the least leave-one-out error, which has a closed
    form (Rifkin and Lippert, Notes on regularized least squares, 2007).

    How much a second group counts beside the first, one of `SHARES`, nothing among them, is chosen for every fold by
    the images of the other folds: a group that does not help does not hurt.

    Args:
        groups: features (N, M), one or two.
        labels_N: int64.
        classes: how many.
        fold_N: the fold of every image.

    >>> labels = torch.arange(400) % 2
    >>> shown = torch.cat([labels[:, None].float(), torch.randn(400, 50)], 1)
    >>> bool(right([shown], labels, 2, torch.arange(400) // 2 % FOLDS).all())
    True
    """
    shares = (0.0, *SHARES) if len(groups) > 1 else (0.0,)
    good = torch.zeros(len(shares), len(labels_N), dtype=torch.bool)
    truth_NK = torch.nn.functional.one_hot(labels_N, classes).double()
    for fold in range(FOLDS):
        out = fold_N == fold
        rows = (~out).nonzero()[:, 0]
        parts = [_screened(group, rows, truth_NK[rows]).double() for group in groups]
        mean = truth_NK[rows].mean(0)
        for n, share in enumerate(shares):
            z = torch.cat([parts[0], share * parts[1]], 1) if share else parts[0]
            weights = _fitted(z[rows], truth_NK[rows] - mean)
            good[n, out] = (z[out] @ weights + mean).argmax(1) == labels_N[out]
    found = torch.zeros(len(labels_N), dtype=torch.bool)
    for fold in range(FOLDS):
        out = fold_N == fold
        found[out] = good[good[:, ~out].sum(1).argmax(), out]
    return found


def _screened(features_NM: Tensor, rows: Tensor, truth_nK: Tensor) -> Tensor:
    """The features that tell the classes apart best in these rows, standardised by them: (N, at most `KEPT`)."""
    x = features_NM[rows]
    mean, deviation = x.mean(0), x.std(0)
    count_K = truth_nK.sum(0).float().clamp_min(1)
    classes_KM = truth_nK.float().T @ (x - mean)
    between = (classes_KM.square() / count_K[:, None]).sum(0) / (deviation.square() * len(rows)).clamp_min(1e-12)
    between[deviation < 1e-6] = 0
    best = between.topk(min(KEPT, len(between))).indices.sort().values
    return (features_NM[:, best] - mean[best]) / deviation[best].clamp_min(1e-6)


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
