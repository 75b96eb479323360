"""`conv`: a window with a kernel and constant alpha is a convolution, torch's own but for ACmix's many small groups.

Pooling is a convolution without a kernel, and torch has it, too.

Shape legend: B batch, C channels, N positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.words import (
    ChannelShift,
    CrossCovariance,
    Dense,
    Depthwise,
    Excite,
    Experts,
    Max,
    Mean,
    Ones,
    Shift,
    Window,
)
from nearfold.kernels import cuda, engine
from nearfold.kernels.grouped_conv import grouped_conv
from nearfold.kernels.whole import whole
from nearfold.kernels.windows import ShiftConv
from nearfold.lower.call import Call, Run, autocast_dtype, is_transformed
from nearfold.lower.frame import Frame
from nearfold.lower.geometry import WindowGeometry, crop
from nearfold.lower.kernel import finish, kernel_weight, values
from nearfold.lower.meaning import meaning
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.windows import window_index
from nearfold.lower.words.channels import slots_of
from nearfold.lower.words.experts import expert_shares
from nearfold.lower.words.shift import shifted_bias

NAME = "conv"
LARGE = 25  # slots of a depthwise kernel
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def supports(facts: Facts) -> Verdict:
    """Window paths under rho ones, mean (without a kernel) or max, on 1 to 3 axes."""
    op = facts.op
    if not isinstance(op.path, Window):
        return Verdict.no(f"path is {op.path.word}, not window")
    if op.path.mode == "inside":
        return Verdict.no("the window moves at the border")
    if not isinstance(op.weight.rho, (Ones, Max, Mean)):
        return Verdict.no(f"weight is not the same everywhere (rho {op.weight.rho.word})")
    if isinstance(op.weight.rho, Mean) and op.weight.kernel is not None:
        return Verdict.no("how many slots are inside differs at the border")
    if facts.ndim not in _CONV:
        return Verdict.no(f"torch has no convolution on {facts.ndim} grid axes")
    if isinstance(op.weight.kernel, Shift):
        return Verdict.yes("maps, shifted and summed, are one grouped convolution", "roundoff")
    if isinstance(op.weight.rho, Max):
        return Verdict.yes("the largest value of a window is F.max_pool", "bitwise", keys=False)
    if isinstance(op.weight.kernel, Experts):
        return Verdict.yes("experts are mixed before one grouped F.conv", "roundoff")
    # where alpha is one, a zero is as good as a slot that is not valid
    return Verdict.yes("window with constant alpha is F.conv", "roundoff", keys=isinstance(op.weight.rho, Ones))


def _by_groups(call: Call) -> bool:
    """Whether this is ACmix's convolution where the compiled engine or a GPU's kernels may run it."""
    x = call.value
    if (
        not isinstance(call.op.weight.kernel, Shift)
        or is_transformed(x, *call.params.values())
        or torch.jit.is_tracing()
    ):
        return False
    kernels = cuda.kernels("grouped_conv", x)
    if kernels is not None:
        return (autocast_dtype(x) or x.dtype) in kernels.DTYPES
    return x.device.type == "cpu" and x.dtype in engine.COMPUTE and autocast_dtype(x) is None


def _in_two_steps(call: Call) -> bool:
    """Whether ACmix's maps, and then their shifts, are fewer multiplications than both merged into one kernel."""
    kernel = call.op.weight.kernel
    return isinstance(kernel, Shift) and 3 * kernel.heads > 3 + call.params["weight"].shape[0]


def _mapped(call: Call, maps_BGm: Tensor) -> tuple[Tensor, Tensor, int]:
    """The first step, (B, G, m, *grid) to (B, G, t, *grid), and the kernel of the second with its groups."""
    made_BGt = torch.einsum("tm,bgm...->bgt...", call.params["weight"], maps_BGm)
    return made_BGt, call.params["shift_weight"].to(made_BGt.dtype), maps_BGm.shape[1]


def _shift(call: Call) -> Tensor:
    """ACmix's convolution straight from query, key and value, whose channels are never joined."""
    kernel, geometry = call.op.weight.kernel, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(kernel, Shift) and isinstance(call.op.path, Window)
    assert call.query is not None and call.key is not None
    dtype = autocast_dtype(call.value) or call.value.dtype
    parts = (call.query, call.key, call.value)
    maps = [t.to(dtype).unflatten(1, (kernel.heads, -1)).transpose(1, 2) for t in parts]
    if _in_two_steps(call):
        made, weight, groups = _mapped(call, torch.cat(maps, 2))
        maps = [made]
    else:
        shift = call.params["shift_weight"]
        weight = torch.matmul(call.params["weight"].T, shift.flatten(2)).unflatten(2, geometry.size)
        groups = weight.shape[0] // kernel.heads
    y = grouped_conv(
        maps,
        weight.to(dtype).unflatten(0, (groups, -1)),
        list(geometry.stride),
        list(geometry.dilation),
        list(geometry.before),
        list(call.out_grid),
        call.op.path.mode == "reflect",
    )
    return shifted_bias(call, kernel, (y.transpose(1, 2) if kernel.interleaved else y).flatten(1, 2))


def _shifting(at: Frame, geometry: WindowGeometry) -> Run:
    """ACmix's convolution in one call of the engine, where that is what `run` would choose."""
    kernel, path = at.op.weight.kernel, at.op.path
    assert isinstance(kernel, Shift) and isinstance(path, Window)
    window = list(geometry.stride), list(geometry.dilation), list(geometry.before)
    layer = ShiftConv(kernel.heads, window, path.mode == "reflect", kernel.interleaved, at.out_grid)

    def at_once(call: Call) -> Tensor:
        if "slot_bias" in call.params or _in_two_steps(call):
            return run(call)

        def again(weight: Tensor, shift: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            params = call.params | {"weight": weight, "shift_weight": shift}
            return run(Call(at, params, value, query, key, call.x, call.draw))

        operands = (call.params["weight"], call.params["shift_weight"], call.query, call.key, call.value)
        return whole(layer, operands, again)

    return at_once


def _experts(call: Call) -> Tensor:
    """Every input's own kernel, mixed from the experts: inputs become groups of one convolution."""
    kernel, geometry = call.op.weight.kernel, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(kernel, Experts) and isinstance(call.op.path, Window)
    weight, share_BE = call.params["weight"], expert_shares(call)
    mixed_BOCS = (share_BE.to(weight.dtype) @ weight.unflatten(0, (kernel.count, -1)).flatten(1)).unflatten(
        1, (-1, *weight.shape[1:])
    )
    B = call.value.shape[0]
    value = geometry.pad(call.value, call.op.path.mode).flatten(0, 1)[None]
    y = _CONV[call.ndim](value, mixed_BOCS.flatten(0, 1), None, geometry.stride, 0, geometry.dilation, B)
    y = y[0].unflatten(0, (B, -1))
    bias = call.params.get("bias")
    return y if bias is None else y + bias.view(-1, *(1,) * call.ndim).to(y.dtype)


def _moved(call: Call, kernel: ChannelShift, geometry: WindowGeometry) -> Tensor:
    """Every group of channels as its slot sees it: a piece of the map with its border."""
    assert isinstance(call.op.path, Window)
    value, parts, first = geometry.pad(call.value, call.op.path.mode), [], 0
    for at, many in slots_of(kernel, geometry.size, value.shape[1]):
        part = value.narrow(1, first, many)
        for axis in range(call.ndim - 1, -1, -1):
            size, step = geometry.size[axis], geometry.dilation[axis]
            start, length = step * (at % size), value.shape[2 + axis] - step * (size - 1)
            part = part.narrow(2 + axis, start, length)
            if geometry.stride[axis] != 1:
                part = part[(slice(None),) * (2 + axis) + (slice(None, None, geometry.stride[axis]),)]
            at //= size
        parts.append(part)
        first += many
    return torch.cat(parts, 1)


def _largest(call: Call) -> Tensor:
    geometry, path = WindowGeometry.of(call.op, call.ndim), call.op.path
    assert isinstance(path, Window)
    out = call.out_grid
    if path.mode == "reflect":
        value = geometry.pad(call.value, "reflect")
    else:
        lowest = float("-inf")
        pads = [n for b, a in list(zip(geometry.before, geometry.after, strict=True))[::-1] for n in (b, a)]
        value = F.pad(call.value, pads, value=lowest)
    y = _MAX[call.ndim](value, geometry.size, geometry.stride, 0, geometry.dilation)
    y = crop(y, (0,) * call.ndim, out)
    return y if path.mode == "reflect" else y.masked_fill(y == float("-inf"), 0)


def _channels_last(call: Call, groups: int, geometry: WindowGeometry) -> bool:
    """Large depthwise kernels on the CPU: oneDNN is 2 to 40 times faster on rows of channels (docs/log.md)."""
    large = call.ndim == 2 and groups == call.value.shape[1] and math.prod(geometry.size) >= LARGE
    return large and call.value.device.type == "cpu"


def prepare(at: Frame) -> Run:
    """What runs on this frame: torch's convolution itself where that is all there is to do."""
    op, kernel, ndim = at.op, at.op.weight.kernel, len(at.grid)
    assert isinstance(op.path, Window)
    geometry = WindowGeometry.of(op, ndim)
    if isinstance(kernel, Shift):
        return _shifting(at, geometry)
    plain = isinstance(kernel, (Dense, Depthwise)) and getattr(kernel, "coordinates", False) is False
    even = op.path.mode == "zeros" and geometry.before == geometry.after
    if not (plain and even and isinstance(op.weight.rho, Ones)) or math.prod(geometry.size) >= LARGE:
        return run
    convolve, stride, padding, dilation = _CONV[ndim], geometry.stride, geometry.before, geometry.dilation
    groups = kernel.groups if isinstance(kernel, Dense) else None

    def convolution(call: Call) -> Tensor:
        x, weight = call.value, call.params["weight"]
        y = convolve(x, weight, call.params.get("bias"), stride, padding, dilation, groups or weight.shape[0])
        return y if y.is_contiguous() or not x.is_contiguous() else y.contiguous()

    return convolution


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    if isinstance(call.op.weight.rho, Max):
        return _largest(call)
    if isinstance(call.op.weight.kernel, Experts) and call.value.shape[0]:
        return _experts(call)
    if _by_groups(call):
        return _shift(call)
    op, geometry = call.op, WindowGeometry.of(call.op, call.ndim)
    assert isinstance(op.path, Window)
    kernel = op.weight.kernel
    if isinstance(kernel, (CrossCovariance, Excite)):  # its window is the position itself
        return finish(call, call.value)
    if isinstance(kernel, ChannelShift):
        return finish(call, _moved(call, kernel, geometry))
    # the map itself where nothing is added to it: a compiler cannot prove that open sizes, flattened, unflatten again
    more = meaning(kernel).reads_more(kernel)
    value = values(call).unflatten(2, call.grid) if more else call.value
    if _in_two_steps(call):
        made, weight, groups = _mapped(call, value.unflatten(1, (-1, call.params["weight"].shape[1])))
        value = made.flatten(1, 2)
    elif (found := kernel_weight(call)) is not None:
        weight, groups = found
    else:
        groups = value.shape[1]
        weight = torch.ones(groups, 1, *geometry.size, dtype=value.dtype, device=value.device)
    padding = geometry.before
    if op.path.mode == "reflect" or geometry.before != geometry.after:
        value, padding = geometry.pad(value, op.path.mode), (0,) * call.ndim
    later = meaning(kernel).late_bias  # the bias follows what `finish` does
    bias = None if later else call.params.get("bias")
    if _channels_last(call, groups, geometry):
        value = value.contiguous(memory_format=torch.channels_last)
    y = _CONV[call.ndim](value, weight, bias, geometry.stride, padding, geometry.dilation, groups)
    y = y.contiguous() if call.value.is_contiguous() else y
    if isinstance(op.weight.rho, Mean):
        _, valid_MS = window_index(op, call.grid, y.device)
        y = y / valid_MS.sum(-1).clamp(min=1).to(y.dtype).unflatten(0, tuple(y.shape[2:]))
    return finish(call, y, with_bias=later)
