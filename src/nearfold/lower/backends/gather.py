"""`gather`: any table of positions: windows that move at the border, scores with a bias, generated kernels, fractions.

What a slot reads is the same for every input and head, or made by a few numbers per slot: scores, weights and sums
touch the rows of channels that they need, and nothing of size slots x channels x positions exists.

Shape legend: B batch, H heads, N positions, M outputs, S slots, E entries of a slot, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Deformable, Dense, Depthwise, Experts, Max, Shift, Softmax
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.corners import corners
from nearfold.kernels.deformed import DeformedWindow
from nearfold.kernels.names import DOT_LIKE, INVALID
from nearfold.kernels.slot_scores import slot_scores
from nearfold.kernels.weigh import slot_softmax
from nearfold.kernels.whole import whole
from nearfold.lower.bias import score_bias
from nearfold.lower.call import Call, Run, autocast_dtype, count_positions, is_transformed, refuse_derivatives
from nearfold.lower.frame import Frame
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.meaning import meaning
from nearfold.lower.selection import present
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.weighting import alpha_of, constant_alpha
from nearfold.lower.windows import home_index, is_table, window_index
from nearfold.lower.words.deformable import moved, window_of

NAME = "gather"


def supports(facts: Facts) -> Verdict:
    """Windows, blocks and deformable windows; scores of a dot product only."""
    op = facts.op
    if not (isinstance(op.path, Deformable) or is_table(op.path)):
        return Verdict.no(f"path is {op.path.word}: its slots are not known beforehand")
    if isinstance(op.weight.rho, Max) or isinstance(op.weight.kernel, (Experts, Shift)):
        return Verdict.no(f"weight {op.weight} is another one for every channel or input")
    if op.weight.rho.needs_score and op.path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {op.path.similarity} is not a dot product")
    if isinstance(op.path, Deformable):
        return Verdict.yes("corners of every moved slot, blended by tiles, times the kernel", "roundoff")
    return Verdict.yes("scores and sums over a table of positions", "roundoff")


def takes_keys(op: Basic) -> bool:
    """Whether it heeds a mask of the keys."""
    return True


def _rows(x: Tensor) -> Tensor:
    """(B, H, N, e) -> (B, N, H * e)."""
    return x.transpose(1, 2).flatten(2)


CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def _fractional(call: Call) -> tuple[Tensor, Tensor]:
    """Index and alpha (B, M, S * E, G) of a deformable window."""
    if call.ndim in CHANNELS_LAST and call.value is call.x and not is_transformed(call.x):
        # the convolution of the offsets is twice as fast on it, backward, and `rows` are then a view of it
        call.x = call.value = call.x.contiguous(memory_format=CHANNELS_LAST[call.ndim])
    offset, mask, frame = moved(call)
    alpha, index = corners(offset, mask, frame.grid, frame.out, frame.size, frame.stride, frame.dilation, frame.before)
    groups = (call.value.shape[0], call.heads)
    return index.unflatten(0, groups).permute(0, 2, 3, 1), alpha.unflatten(0, groups).permute(0, 2, 3, 1)


def _whole(call: Call) -> tuple[Tensor, Tensor]:
    """Index and alpha (B, M, S, H) of slots that read one position each."""
    op, B, heads = call.op, call.value.shape[0], call.heads
    index_MS, valid_MS = window_index(op, call.grid, call.value.device, INVALID)
    index_BHMS, valid = index_MS[None, None], valid_MS[None, None]
    if call.keep is not None:
        valid = valid & present(call.keep, index_BHMS.clamp(min=0))
        index_BHMS = index_BHMS.masked_fill(~valid, INVALID)
    index = index_BHMS.expand(B, heads, -1, -1).permute(0, 2, 3, 1)
    rho = op.weight.rho
    if not rho.needs_score:
        alpha = constant_alpha(call, valid, index_BHMS)
        assert alpha is not None
        return index, alpha.expand(B, heads, -1, -1).permute(0, 2, 3, 1)
    query, key = (t.expand(B, heads, -1, -1) for t in call.embedded())
    home_M = home_index(op, call.grid, query.device)
    if home_M.shape[0] != query.shape[2] or any(s != 1 for s in call.stride):
        query = query[:, :, home_M]
    score = slot_scores(_rows(query), _rows(key), index).permute(0, 3, 1, 2)
    bias = score_bias(op, call.params, call.grid, home_M, score)
    score = score if bias is None else score + bias
    if isinstance(rho, Softmax):
        alpha = slot_softmax(score, index.permute(0, 3, 1, 2), float(rho.scale))
    else:
        lost = query.isnan().any(-1)[..., None]
        score = score.masked_fill(~valid, float("-inf")).masked_fill(lost, float("nan"))
        alpha = alpha_of(rho, score, valid)
    return index, alpha.permute(0, 2, 3, 1)


# positions of a map beyond which torch's convolution of the offsets is faster than ours, and little lies between
LARGEST_WHOLE = 1024


def prepare(at: Frame) -> Run:
    """What runs on this frame: a small deformable window is one call of the compiled engine."""
    settled = _settled(at)
    if settled is None:
        return run
    names = ("offset_weight", "offset_bias", "mask_weight", "mask_bias", "weight", "bias")

    def at_once(call: Call) -> Tensor:
        params = call.params

        def again(x: Tensor | None, value: Tensor, *others: Tensor | None) -> Tensor:
            given = zip(names, others, strict=True)
            own = params | {name: tensor for name, tensor in given if tensor is not None}
            return run(Call(at, own, value, None, None, value if x is None else x, call.draw))

        x = None if call.x is call.value else call.x
        return whole(settled, (x, call.value, *map(params.get, names)), again)

    return at_once


def _settled(at: Frame) -> DeformedWindow | None:
    """The layer as the engine takes it; None where it does not know all of it, or the map is large."""
    op, kernel, ndim = at.op, at.op.weight.kernel, len(at.grid)
    placed = kernel is not None and getattr(kernel, "coordinates", False) is not False
    if not isinstance(op.path, Deformable) or ndim > 3 or count_positions(at.out_grid) > LARGEST_WHOLE:
        return None
    if placed or not (kernel is None or isinstance(kernel, (Dense, Depthwise))):
        return None
    groups = 0 if isinstance(kernel, Depthwise) else kernel.groups if isinstance(kernel, Dense) else 1
    return DeformedWindow(at.heads, groups, window_of(op, at.grid, at.out_grid))


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    fractional = isinstance(call.op.path, Deformable)
    index, alpha = _fractional(call) if fractional else _whole(call)
    kernel = kernel_weight(call)
    weight, groups = (None, 1) if kernel is None else (kernel[0].flatten(2), kernel[1])
    dtype = autocast_dtype(call.value) or call.value.dtype
    own = call.op.weight.kernel
    plain = values(call) if meaning(own).reads_more(own) else None
    value = call.rows() if plain is None else plain.transpose(1, 2)
    y = aggregate(
        value.to(dtype).contiguous(),
        index,
        alpha.to(dtype),
        None if weight is None else weight.to(dtype),
        groups,
        2**call.ndim if fractional else 1,
    )
    bias = call.params.get("bias")
    later = meaning(call.op.weight.kernel).late_bias  # the bias follows its pointwise half
    if bias is not None and not later:
        y.add_(bias.to(y.dtype))  # in place: fresh memory costs more than the sum
    return finish(call, y.transpose(1, 2).unflatten(2, call.out_grid), with_bias=later)
