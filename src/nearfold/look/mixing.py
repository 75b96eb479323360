"""`mixing_matrix`: by how much every output position of a layer reads every input position.

A layer of this library says so itself, from its Selection and its weights; any other is asked by differentiation.

Shape legend: B batch, G groups of channels, H heads, M outputs, N positions, S slots, O output channels, C channels,
P output channels of a group, c channels that a group reads, L cells (channels of one head in one group).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nearfold._numbers import shown
from nearfold.grammar import Branch, Operation
from nearfold.look.derivative import differentiated, require_room, require_rows
from nearfold.lower import oracle
from nearfold.lower.call import Call, count_positions
from nearfold.lower.execute import execute, factors
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import operand
from nearfold.lower.selection import Selection, select
from nearfold.lower.weighting import wide_dtype
from nearfold.nn.mixer import Mixer, TokenMixer


def mixing_matrix(
    layer: nn.Module,
    x: Tensor,
    *,
    context: Tensor | None = None,
    groups: int = 1,
    tokens: bool | None = None,
    rows: Sequence[int] | Tensor | None = None,
    limit_gib: float = 4.0,
) -> Tensor:
    """The effective matrix (B, G, M, N) by which a layer mixes positions: row m is what output m reads.

    For a `Mixer` (every layer of `nearfold.nn`) it comes from the operation itself, and G depends on the weight:

    - without a kernel it is alpha of every head (of every channel for max; of every channel or head for a scan), and
      ``matrix @ value`` is what the layer makes of its projected values: exactly, and signed where alpha is;
    - `depthwise` and `separable`: alpha times the channel's own weight, G channels, exact and signed;
    - a dense kernel (`kernel`, `experts`, `shift`) has no single number for a pair of positions but a block K of P
      output by c input channels. The entry is its size, sqrt(sum of K^2 / P): the root mean square of an output
      channel when position n holds white noise. It is never negative, one for each group (each head for `shift`), and
      alpha itself where K is alpha times the identity;
    - `branch`: the groups of its operands side by side;
    - a sum: the sum of the operands' matrices times their rates, groups repeated to a common number. Where one operand
      has a dense kernel all of them count by their size (an upper bound; only sizes are known).

    The pointwise maps before (query, key, value) and after (out, the second half of `separable`, a branch's mix) are
    not part of it, nor are biases. N counts the grid without the border that ``nearest(padding=...)`` adds; where the
    layer unshuffles its input, both count the unshuffled grid. Random candidates are not drawn: all are searched.

    Zeros that an operation adds around or behind its input (`nearest(padding)`, `block(padded)`) have no column, though
    a bias on the values makes them count: the rows are then what is left of the sum.

    Any other layer is differentiated: the entry is sqrt(sum over o and c of (dy[o, m] / dx[c, n])^2 / P) over the
    channels o and c of one of ``groups`` equal groups, or the signed derivative itself where a group is one channel to
    one channel. For a linear layer this is the definition above; for others it is the matrix around x, with what x
    changes in the weights included. Pairs of different groups are left out. It runs in evaluation mode, image by
    image, with O x M backward passes an image, in blocks of bounded memory: slow for large grids.

    Args:
        layer: a `Mixer`, or a module (B, C, *grid) -> (B, O, *out), or (B, *grid, D) -> (B, *out, D').
        x: an input of it.
        context: the second input, for a layer that reads one; N then counts its positions.
        groups: of channels, for a layer of another library; must divide C and O.
        tokens: whether the channels come last, for a layer of another library. A 3-D x could be both: say which.
        rows: these outputs only, by their numbers in raster order; None: all.
        limit_gib: refuse matrices larger than this, and scores of which they would be made.

    Returns:
        (B, G, M, N), or (B, G, rows, N), positions in raster order, float32 at least, without gradients.

    Raises:
        ValueError: what is not a layer of positions, a row that it does not make, or a matrix above the limit.

    >>> mean = Mixer("window(3) | box | mean", 4, ndim=1)
    >>> mixing_matrix(mean, torch.randn(1, 4, 3))[0, 0].mul(6).round().tolist()
    [[3.0, 3.0, 0.0], [2.0, 2.0, 2.0], [0.0, 3.0, 3.0]]
    >>> pool = nn.AvgPool1d(3, 1, padding=1, count_include_pad=False)
    >>> mixing_matrix(pool, torch.randn(1, 1, 3), tokens=False)[0, 0].mul(6).round().tolist()
    [[3.0, 3.0, 0.0], [2.0, 2.0, 2.0], [0.0, 3.0, 3.0]]
    """
    if not isinstance(layer, nn.Module):
        raise ValueError(f"layer must be a module that maps positions to positions, got {type(layer).__name__}")
    if not isinstance(x, Tensor) or x.dim() < 3 or not x.is_floating_point() or min(x.shape) == 0:
        shape = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be floating point, (batch, channels, *grid) or (batch, *grid, channels), got {shape}")
    if isinstance(layer, Mixer):
        own = isinstance(layer, TokenMixer)
        if groups != 1 or tokens not in (None, own):
            raise ValueError(
                f"groups and tokens are for layers of other libraries; {type(layer).__name__} knows its own (tokens="
                f"{own}): leave them out"
            )
        return own_mixing(layer, x, context, limit_gib, rows=_listed(rows)).matrix
    return differentiated(layer, x, context, groups, tokens, limit_gib, _listed(rows))


def _listed(rows: Sequence[int] | Tensor | None) -> Tensor | None:
    """The rows as a tensor (R,) of whole numbers."""
    if rows is None:
        return None
    found = torch.as_tensor(rows)
    if found.dim() != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(f"rows must be whole numbers, at least one, such as [0, 17]; got {shown(rows)}")
    return found.long()


@dataclass(frozen=True)
class Mixing:
    """The matrix (B, G, M, N) of an operation; ``exact``: signed and multiplied with values, not a size."""

    matrix: Tensor
    exact: bool


def triangle(blocks_BLpS: Tensor) -> Tensor:
    """R (B, L, q, S) of W = QR: R a is as long as W a for every a, and has fewer rows."""
    return torch.linalg.qr(blocks_BLpS, mode="r").R


@torch.no_grad()
def own_mixing(
    layer: Mixer,
    x: Tensor,
    context: Tensor | None = None,
    limit_gib: float = 4.0,
    factor: Callable[[Tensor], Tensor] = triangle,
    rows: Tensor | None = None,
) -> Mixing:
    """`mixing_matrix` of a layer of the library, and whether it is exact.

    ``factor`` is asked for the `triangle` of every dense kernel, in order.
    """
    op = layer.operation
    if isinstance(layer, TokenMixer):
        x = layer.prepare(x)
        context = None if context is None else layer.prepare(context)
    layer._require(x)
    x = x if isinstance(layer, TokenMixer) else layer.prepare(x)
    if context is not None and not op.needs_context:
        raise ValueError(f"{op}: reads one input; leave context out")
    if context is not None and (context.dim() < 3 or context.shape[:2] != (x.shape[0], layer.context_channels)):
        raise ValueError(
            f"context must have the batch of x and {layer.context_channels} channels, got {tuple(context.shape)}"
        )
    parts: list[Mixing] = []

    def spy(call: Call) -> Tensor:
        parts.append(_part(call, limit_gib, factor, rows))
        return call.value.new_zeros(x.shape[0], meaning(call.op.weight.kernel).made(call), *call.out_grid)

    params = layer.tensors()
    execute(op, params, x, lambda *_: spy, out_channels=layer.made_channels, context=context)
    return _combined(op, params, x, layer.made_channels, iter(parts), rows)


def _part(call: Call, limit_gib: float, factor: Callable[[Tensor], Tensor], rows: Tensor | None) -> Mixing:
    """The matrix of one `Basic` operation, or these rows of it."""
    inner = call.at.inner or call.grid
    made = inner if call.at.inner else call.out_grid
    at = torch.arange(math.prod(made)) if rows is None else rows
    if rows is not None:
        require_rows(rows, math.prod(made))
    if call.at.inner:  # outputs of the map, among those of the whole blocks
        at = _raster(torch.unravel_index(at, inner), call.out_grid)
    whole = rows is None and not call.at.inner
    rho, kernel = call.op.weight.rho, meaning(call.op.weight.kernel).blocks(call)
    heads = meaning(rho).looks(rho, call.heads, call.value.shape[1])
    groups = heads if kernel is None else kernel.shape[1]
    B, M, N = call.value.shape[0], count_positions(call.out_grid), count_positions(call.padded)
    shape = (B, groups, len(at), N)
    require_room(str(call.op), shape, wide_dtype(call), limit_gib)
    if not meaning(call.op.path).is_table(call.op.path):
        require_room(f"{call.op}: scores", (B, heads, M, N), wide_dtype(call), limit_gib)
    chosen = select(call)
    alpha = oracle.weights(call, chosen)
    if not whole:
        at = at.to(alpha.device)
        index, valid = (t[..., at, :] for t in (chosen.index, chosen.valid))
        chosen, alpha = replace(chosen, index=index, valid=valid, score=None, coefficient=None), alpha[..., at, :]
    alpha = alpha.expand(shape[0], max(heads, alpha.shape[1]), *alpha.shape[2:])
    if kernel is None:
        word = call.op.weight.kernel
        # a kernel of pairs brings what it makes of two values: the matrix says which, not by how much each of the two
        part = Mixing(_scattered(alpha, chosen), word is None or not word.edges)
    else:
        part = _with_kernel(alpha, chosen, kernel.to(alpha.dtype), factor)
    border = call.at.padding
    matrix = part.matrix
    if border or call.at.inner:
        matrix = matrix.unflatten(-1, call.padded)[(..., *(slice(border, border + n) for n in inner))].flatten(3)
    return Mixing(matrix, part.exact)


def _raster(at: tuple[Tensor, ...], grid: tuple[int, ...]) -> Tensor:
    """Coordinates -> numbers in raster order on a grid."""
    number = torch.zeros_like(at[0])
    for a, n in zip(at, grid, strict=True):
        number = number * n + a
    return number


def _scattered(alpha_BHMS: Tensor, chosen: Selection) -> Tensor:
    """Numbers of slots -> numbers of positions (B, H, M, N). A row with NaN is NaN: its output would be."""
    B, H, M, S = alpha_BHMS.shape
    gone = alpha_BHMS.isnan().any(-1, keepdim=True)
    if chosen.in_order:  # slots that are not valid have no weight
        return alpha_BHMS.masked_fill(gone, float("nan"))
    index = chosen.index
    if index.shape[1] not in (1, H):  # channels of one head read alike
        index = index.repeat_interleave(H // index.shape[1], 1)
    matrix = alpha_BHMS.new_zeros(B, H, M, chosen.positions)
    matrix.scatter_add_(3, index.expand(B, H, M, S), alpha_BHMS)
    return matrix.masked_fill_(gone, float("nan"))


def _with_kernel(
    alpha_BHMS: Tensor, chosen: Selection, kernel_BGPcS: Tensor, factor: Callable[[Tensor], Tensor]
) -> Mixing:
    """Alpha and a kernel: exact where its blocks are single numbers, their sizes otherwise."""
    heads, (_, groups, out, read, _) = alpha_BHMS.shape[1], kernel_BGPcS.shape
    if chosen.entries > 1:
        kernel_BGPcS = kernel_BGPcS.repeat_interleave(chosen.entries, -1)
    cells = math.lcm(heads, groups)
    alpha_BLMS = alpha_BHMS.repeat_interleave(cells // heads, 1)
    if out * read == 1:
        return Mixing(_scattered(alpha_BLMS * kernel_BGPcS[:, :, 0], chosen), True)
    split = cells // groups
    blocks = kernel_BGPcS.unflatten(3, (split, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    total = alpha_BHMS.new_zeros(alpha_BHMS.shape[0], groups, alpha_BHMS.shape[2], chosen.positions)
    if factor is triangle and _apart(chosen):  # a graph that is exported cannot ask
        scattered = _scattered(alpha_BLMS * (blocks.square().sum(2) / out).sqrt()[:, :, None], chosen)
        return Mixing(total.add_(scattered.square_().unflatten(1, (groups, split)).sum(2)).sqrt_(), False)
    # slots may read one position, where their blocks add up. With W = QR as a matrix (P c, S) the size of sum a_s W_s
    # is that of R a: S scatters of numbers instead of P c
    factor_BLqS = factor(blocks) / math.sqrt(out)
    for q in range(factor_BLqS.shape[2]):
        scattered = _scattered(alpha_BLMS * factor_BLqS[:, :, q, None], chosen)
        total += scattered.square_().unflatten(1, (groups, split)).sum(2)
    return Mixing(total.sqrt_(), False)


def _apart(chosen: Selection) -> bool:
    """Whether no two slots of an output read the same position."""
    S = chosen.index.shape[-1]
    alone = -1 - torch.arange(S, device=chosen.index.device)  # a slot that reads nothing meets no other
    read = torch.where(chosen.valid, chosen.index, alone).sort(-1).values
    return not bool((read.diff(dim=-1) == 0).any())


def _combined(
    op: Operation, params: dict[str, Tensor], x: Tensor, channels: int, parts: Iterator[Mixing], rows: Tensor | None
) -> Mixing:
    """The matrix of an operation from those of its `Basic` parts, in the order in which they ran."""
    if not op.operands:
        return next(parts)
    each = zip(op.operands, op.shares(channels), strict=True)
    reads = op.inputs(x.shape[1]) if isinstance(op, Branch) else (slice(None),) * len(op.operands)
    operands = [
        _combined(term, operand(params, i), x[:, reads[i]], made, parts, rows)
        for i, (term, made) in enumerate(each)
        if made
    ]
    _same_positions(op, operands)
    exact = all(m.exact for m in operands)
    if isinstance(op, Branch):
        return Mixing(torch.cat([m.matrix for m in operands], 1), exact)
    groups = math.lcm(*(m.matrix.shape[1] for m in operands))
    total: Tensor | float = 0.0
    for factor, part in zip(factors(op, params, x), operands, strict=True):
        if isinstance(factor, Tensor) and factor.dim():  # a gate: the outputs' positions are rows
            factor = factor.flatten(2)[..., None].to(part.matrix.dtype)
            factor = factor if rows is None else factor[..., rows.to(factor.device), :]
        matrix = part.matrix.repeat_interleave(groups // part.matrix.shape[1], 1) * (1.0 if factor is None else factor)
        total = total + (matrix if exact else matrix.abs())
    assert isinstance(total, Tensor)
    return Mixing(total, exact)


def _same_positions(op: Operation, operands: list[Mixing]) -> None:
    shapes = [tuple(m.matrix.shape[2:]) for m in operands]
    if len(set(shapes)) > 1:
        listed = " and ".join(map(str, shapes))
        raise ValueError(f"the operands mix {listed} positions (outputs, inputs); ask for one operand alone: {op}")
