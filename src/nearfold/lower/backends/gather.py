"""`gather`: any table of positions: windows that move at the border, scores with a bias, generated kernels, fractions.

What a slot reads is the same for every input and head, or made by a few numbers per slot: scores, weights and sums
touch the rows of channels that they need, and nothing of size slots x channels x positions exists.

Shape legend: B batch, H heads, N positions, M outputs, S slots, E entries of a slot, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.grammar.words import Deformable, Dense, Depthwise, Experts, Max, Points, Shift
from nearfold.kernels import sampled_torch
from nearfold.kernels.corners import corners
from nearfold.kernels.deformed import DeformedWindow
from nearfold.kernels.names import DOT_LIKE
from nearfold.kernels.sampled import sampled
from nearfold.kernels.weigh import softmax_of_few
from nearfold.kernels.whole import whole
from nearfold.lower.call import Call, Run, autocast_dtype, count_positions, is_transformed, refuse_derivatives
from nearfold.lower.frame import Frame
from nearfold.lower.kernel import finish
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.windows import is_table
from nearfold.lower.words.deformable import moved, placed, window_of
from nearfold.lower.words.slots import slots, summed, weighed

NAME = "gather"
MOVED = Deformable, Points


def supports(facts: Facts) -> Verdict:
    """Windows, blocks and deformable windows; scores of a dot product only."""
    op = facts.op
    if not (isinstance(op.path, MOVED) or is_table(op.path)):
        return Verdict.no(f"path is {op.path.word}: its slots are not known beforehand")
    if isinstance(op.weight.rho, Max) or isinstance(op.weight.kernel, (Experts, Shift)):
        return Verdict.no(f"weight {op.weight} is another one for every channel or input")
    if op.weight.rho.needs_score and op.path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {op.path.similarity} is not a dot product")
    if isinstance(op.path, MOVED):
        if op.weight.kernel is None:
            return Verdict.yes("a weighted sum over the corners of every moved slot", "roundoff")
        return Verdict.yes("corners of every moved slot, blended by tiles, times the kernel", "roundoff")
    return Verdict.yes("scores and sums over a table of positions", "roundoff")


CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def _fractional(call: Call) -> tuple[Tensor, Tensor]:
    """Index and alpha (B, G, M, S * E) of slots that are moved, for a kernel."""
    if isinstance(call.op.path, Points):
        index, part = sampled_torch.entries(*placed(call))
        return index.permute(0, 3, 1, 2), part.permute(0, 3, 1, 2)
    _rows_first(call)
    offset, mask, frame = moved(call)
    alpha, index = corners(offset, mask, frame.grid, frame.out, frame.size, frame.stride, frame.dilation, frame.before)
    groups = (call.value.shape[0], call.heads)
    return index.unflatten(0, groups), alpha.unflatten(0, groups)


def _rows_first(call: Call) -> None:
    if call.ndim in CHANNELS_LAST and call.value is call.x and not is_transformed(call.x):
        # the convolution of the offsets is twice as fast on it, backward, and `rows` are then a view of it
        call.x = call.value = call.x.contiguous(memory_format=CHANNELS_LAST[call.ndim])


def _blended(call: Call) -> Tensor:
    """The sum over moved slots without a kernel: (B, C, *out)."""
    _rows_first(call)
    place, share, grid = placed(call, lambda made, axis: softmax_of_few(made))
    rows = call.rows()
    y = sampled(rows.to(autocast_dtype(rows) or rows.dtype), place, share, grid)
    return finish(call, y.transpose(1, 2).unflatten(2, call.out_grid))


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
    if torch.compiler.is_compiling():  # it takes the parts, and a look at the size would tie the graph to it
        return None
    op, kernel, ndim = at.op, at.op.weight.kernel, len(at.grid)
    placed = kernel is not None and getattr(kernel, "coordinates", False) is not False
    if not isinstance(op.path, Deformable) or ndim > 3 or count_positions(at.out_grid) > LARGEST_WHOLE:
        return None
    if op.path.net != "window" or getattr(op.weight.rho, "activation", "sigmoid") != "sigmoid":
        return None
    if placed or not (kernel is None or isinstance(kernel, (Dense, Depthwise))):
        return None
    groups = 0 if isinstance(kernel, Depthwise) else kernel.groups if isinstance(kernel, Dense) else 1
    return DeformedWindow(at.heads, groups, window_of(op, at.grid, at.out_grid))


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    if isinstance(call.op.path, MOVED):
        if call.op.weight.kernel is None:
            return _blended(call)
        return summed(call, *_fractional(call), 2**call.ndim)
    score, at = slots(call)
    return summed(call, at, weighed(call, score, at))
