"""What a mixing matrix says about a layer: how far it looks, at how much, by content or by place, in what form.

Every measure is one number for each image and group of heads; docs/xray.md has the formulas and the values that follow
for operators whose matrix is known. A group's matrix holds what R of the layer's outputs read of all its N inputs.

Shape legend: I images, G groups (heads), R rows (outputs that were asked), N inputs, a axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

WINDOWS = (3, 7, 15)
PLACED = (
    "distance", "reach", "itself", "window3", "window7", "window15", "before", "anisotropy", "translation"
)  # fmt: skip
"""The measures that ask where an output lies."""
RANKED = 4  # images whose rank is found: a singular value decomposition of every group


@dataclass(frozen=True)
class Measures:
    """The measures of one layer, float64; NaN where one is not defined.

    Attributes:
        distance: (I, G), mean distance between an output's place and what it reads, in positions of the input.
        reach: (I, G), distance by that of an output that reads every position alike: 0 looks at itself, 1 everywhere.
        spread: (I, G), effective number of inputs read, the exponential of the entropy of their shares.
        participation: (I, G), another effective number, one by the sum of the shares' squares.
        most95: (I, G), how many inputs, the most read ones of each output, hold 95 % of what is read, on the mean.
        itself: (I, G), share read at the output's own place.
        window3: (I, G), share read in the 3 positions a side around it.
        window7: (I, G), in the 7 positions a side.
        window15: (I, G), in the 15 positions a side.
        before: (I, G), share read from its own place and before it, in raster order: 1 is causal.
        beside: (I, G), share read of tokens that lie beside the map.
        negative: (I, G), share of negative weights, by size.
        anisotropy: (I, G), 0: as far along every direction; 1: along a line.
        rank: (I, G), effective rank of the rows asked, by the smaller side of their matrix; NaN of a single row.
        translation: (I, G), how much alike rows are when moved to one place: 1 for a convolution.
        content: (I, G), how much a row changes from one image to the next: 0 for a convolution.
        heads: (I,), how much the heads' rows differ, mean over pairs of heads; NaN of a single one.
    """

    distance: Tensor
    reach: Tensor
    spread: Tensor
    participation: Tensor
    most95: Tensor
    itself: Tensor
    window3: Tensor
    window7: Tensor
    window15: Tensor
    before: Tensor
    beside: Tensor
    negative: Tensor
    anisotropy: Tensor
    rank: Tensor
    translation: Tensor
    content: Tensor
    heads: Tensor

    def mean(self) -> dict[str, float]:
        """Every measure over images and groups, NaN left out.

        >>> matrix = torch.full((1, 1, 9, 9), 1 / 9)
        >>> found = measure(matrix, (3, 3)).mean()
        >>> round(found["reach"], 6), round(found["spread"], 6)
        (1.0, 9.0)
        """
        return {field.name: float(getattr(self, field.name).nanmean()) for field in fields(self)}


def measure(
    matrix: Tensor,
    grid: Sequence[int],
    rows: Tensor | None = None,
    out_grid: Sequence[int] | None = None,
    beside: int = 0,
    signed: bool = True,
) -> Measures:
    """Measure what outputs read.

    Args:
        matrix: (I, G, R, N), of `nearfold.look.mixing_matrix`.
        grid: of the inputs; N is its positions and ``beside``.
        rows: (R,), which outputs the rows are, in raster order; None: all, in order.
        out_grid: of the outputs, where it is another one; (): they lie beside the map, as a class token does: measures
            that ask for their place are not defined.
        beside: how many of the inputs, the first ones, lie beside the map, such as a class token.
        signed: whether the entries are weights; False where they are sizes, whose sign is not known.

    Raises:
        ValueError: the matrix has other positions than these.

    >>> eye = torch.eye(12)[None, None]
    >>> one = measure(eye, (3, 4))
    >>> [float(t) for t in (one.distance, one.spread, one.itself, one.translation, one.rank)]
    [0.0, 1.0, 1.0, 1.0, 1.0]
    """
    grid = tuple(grid)
    out_grid = grid if out_grid is None else tuple(out_grid)
    _require(matrix, grid, rows, out_grid, beside)
    if grid and not out_grid:
        found = measure(matrix, grid, torch.zeros(matrix.shape[2], dtype=torch.long), grid, beside, signed)
        return replace(found, **{name: torch.full_like(found.spread, float("nan")) for name in PLACED})
    rows = torch.arange(math.prod(out_grid)) if rows is None else rows.cpu()
    full_IGRN = matrix.double()
    size_IGR = full_IGRN.abs().sum(-1)
    there_IGR = size_IGR.isfinite() & (size_IGR > 0)
    share_IGRN = torch.where(there_IGR[..., None], full_IGRN / size_IGR[..., None], 0.0)
    part_IGRN = share_IGRN.abs()
    on_IGRN = part_IGRN[..., beside:]
    map_IGR = on_IGRN.sum(-1)

    places_Ra, positions_Na = _places(rows, out_grid, grid)
    offset_RNa = positions_Na[None] - places_Ra[:, None]
    apart_RN = offset_RNa.square().sum(-1).sqrt()
    uniform_R = apart_RN.mean(-1)
    most_RN = offset_RNa.abs().amax(-1)
    seen_IGR = there_IGR & (map_IGR > 0)

    def average(number_IGR: Tensor, there: Tensor = there_IGR) -> Tensor:
        return torch.where(there, number_IGR, 0.0).sum(-1) / there.sum(-1)

    def within(mask_RN: Tensor) -> Tensor:
        return average((on_IGRN * mask_RN).sum(-1))

    far_IGR = (on_IGRN * apart_RN).sum(-1) / map_IGR
    windows = [within(most_RN < side / 2) for side in WINDOWS]
    back_RN = torch.arange(math.prod(grid)) <= _raster(places_Ra, grid)[:, None]
    return Measures(
        distance=average(far_IGR, seen_IGR),
        reach=average(far_IGR, seen_IGR) / average(uniform_R.expand_as(far_IGR), seen_IGR),
        spread=average(torch.special.entr(part_IGRN).sum(-1).exp()),
        participation=average(1 / part_IGRN.square().sum(-1)),
        most95=_holding(part_IGRN, there_IGR, 0.95),
        itself=within(most_RN < 0.5),
        window3=windows[0],
        window7=windows[1],
        window15=windows[2],
        before=within(back_RN),
        beside=average(part_IGRN[..., :beside].sum(-1)),
        negative=average(share_IGRN.clamp(max=0).neg().sum(-1)) * (1.0 if signed else float("nan")),
        anisotropy=_anisotropy(on_IGRN, offset_RNa),
        rank=_rank(full_IGRN[:RANKED]),
        translation=_translation(full_IGRN[..., beside:], places_Ra, grid),
        content=_content(share_IGRN, there_IGR),
        heads=_heads(share_IGRN, there_IGR),
    )


def _require(matrix: Tensor, grid: tuple[int, ...], rows: Tensor | None, out: tuple[int, ...], beside: int) -> None:
    if matrix.dim() != 4 or matrix.shape[-1] != math.prod(grid) + beside:
        raise ValueError(
            f"matrix must be (images, groups, rows, {math.prod(grid) + beside}) on the grid {grid} with {beside} "
            f"tokens beside it, got {tuple(matrix.shape)}"
        )
    wanted = math.prod(out) if rows is None else len(rows)
    if matrix.shape[2] != wanted:
        raise ValueError(f"matrix must have {wanted} rows, one for each output asked, got {matrix.shape[2]}")
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < math.prod(out):
        raise ValueError(f"rows must be outputs of the grid {out}, got {int(rows.min())} to {int(rows.max())}")


def _places(rows_R: Tensor, out: tuple[int, ...], grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where outputs lie (R, a) among the inputs' positions (N, a): the grids' outer edges meet."""
    at_Ra = torch.stack(torch.unravel_index(rows_R, out), -1).double()
    scale_a = torch.tensor([n / m for n, m in zip(grid, out, strict=True)], dtype=torch.double)
    positions_Na = torch.stack(torch.unravel_index(torch.arange(math.prod(grid)), grid), -1).double()
    return (at_Ra + 0.5) * scale_a - 0.5, positions_Na


def _raster(places_Ra: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The input in whose cell an output lies (R,); the later one where it lies between two."""
    number_R = torch.zeros(len(places_Ra))
    for a, n in enumerate(grid):
        number_R = number_R * n + (places_Ra[:, a] + 0.5).floor().clamp(0, n - 1)
    return number_R


def _holding(part_IGRN: Tensor, there_IGR: Tensor, share: float) -> Tensor:
    """The smallest k of which the k largest shares of a row add up to so much, on the mean over rows."""
    held_IGN = part_IGRN.sort(-1, descending=True).values.cumsum(-1).sum(2) / there_IGR.sum(-1, keepdim=True)
    k_IG = 1 + (held_IGN < share - 1e-12).sum(-1)
    return torch.where(there_IGR.any(-1), k_IG.double(), float("nan"))


def _anisotropy(on_IGRN: Tensor, offset_RNa: Tensor) -> Tensor:
    """1 - smallest by largest second moment of what is read, about the outputs' places."""
    if offset_RNa.shape[-1] < 2:
        return on_IGRN.new_full(on_IGRN.shape[:2], float("nan"))
    moments = torch.einsum("igrn,rna,rnb->igab", on_IGRN, offset_RNa, offset_RNa)
    sides = torch.linalg.eigvalsh(moments).clamp(min=0)
    return 1 - sides[..., 0] / sides[..., -1]


def _rank(full_IGRN: Tensor) -> Tensor:
    """Effective rank (Roy and Vetterli 2007) by the smaller side; rows that are not finite count as zero.

    Of one row it says nothing.
    """
    if min(full_IGRN.shape[-2:]) == 1:
        return full_IGRN.new_full(full_IGRN.shape[:2], float("nan"))
    values = torch.linalg.svdvals(full_IGRN.nan_to_num(0.0, 0.0, 0.0))
    share = values / values.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp() / min(full_IGRN.shape[-2:])


def _translation(on_IGRN: Tensor, places_Ra: Tensor, grid: tuple[int, ...]) -> Tensor:
    """1 - the difference of rows that are moved to one place, by their size, where both are on the map."""
    on = on_IGRN.unflatten(-1, grid)
    order = torch.randperm(len(places_Ra), generator=torch.Generator().manual_seed(0))
    nan = on_IGRN.new_full(on_IGRN.shape[:2], float("nan"))
    total, pairs = torch.zeros_like(nan), torch.zeros_like(nan)
    for one, other in zip(order.tolist(), order.roll(1).tolist(), strict=True):
        step = places_Ra[other] - places_Ra[one]
        if not bool((step == step.round()).all()):
            return nan
        here, there = [], []
        for n, by in zip(grid, step.int().tolist(), strict=True):
            here.append(slice(max(0, -by), n - max(0, by)))
            there.append(slice(max(0, by), n - max(0, -by)))
        a, b = on[:, :, one][(..., *here)].flatten(2), on[:, :, other][(..., *there)].flatten(2)
        size = a.abs().sum(-1) + b.abs().sum(-1)
        good = size.isfinite() & (size > 0) if one != other else torch.zeros_like(size, dtype=torch.bool)
        total += torch.where(good, (a - b).abs().sum(-1) / size, 0.0)
        pairs += good
    return torch.where(pairs > 0, 1 - total / pairs, nan)


def _content(share_IGRN: Tensor, there_IGR: Tensor) -> Tensor:
    """Half the difference of a row's shares in one image and the next."""
    if len(share_IGRN) < 2:
        return share_IGRN.new_full(share_IGRN.shape[:2], float("nan"))
    both = there_IGR & there_IGR.roll(1, 0)
    change = (share_IGRN - share_IGRN.roll(1, 0)).abs().sum(-1) / 2
    return torch.where(both, change, 0.0).sum(-1) / both.sum(-1)


def _heads(share_IGRN: Tensor, there_IGR: Tensor) -> Tensor:
    """Half the difference of two heads' shares, over neighbouring pairs in a fixed order of the heads."""
    groups = share_IGRN.shape[1]
    if groups < 2:
        return share_IGRN.new_full(share_IGRN.shape[:1], float("nan"))
    total, count = torch.zeros(len(share_IGRN), dtype=torch.double), torch.zeros(len(share_IGRN), dtype=torch.double)
    for by in range(1, groups // 2 + 1):
        both = there_IGR & there_IGR.roll(by, 1)
        total += torch.where(both, (share_IGRN - share_IGRN.roll(by, 1)).abs().sum(-1) / 2, 0.0).sum((1, 2))
        count += both.sum((1, 2))
    return total / count
