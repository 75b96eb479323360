"""What a layer in no table does, seen by running it alone: in float64, on random maps, with weights that are not zero.

Shape legend: N positions, C channels, n the other positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfold.grammar import Basic, Weight
from nearfold.grammar.words import Box, Dense, Depthwise, Ones, Window
from nearfold.recognise.foreign import GLOBAL_MEAN, Match, count, plain, window
from nearfold.recognise.trial import copied, quiet

TRIED = "tried alone"
LARGEST = 1 << 23  # parameters of a layer that is tried
MOST = 1 << 15  # positions of a map that is tried
SCALES = (3.0, 0.1)  # of the numbers in a map
CLOSE = 1e-10  # of what is as large as one, in float64


def tried(module: nn.Module) -> Match | str | None:
    """What a layer was seen to be: `TRIED` where it is pointwise; None where none of the trials fits.

    >>> tried(nn.Softplus()), tried(nn.Softmax(dim=-1))
    ('tried alone', None)
    >>> print(tried(nn.GroupNorm(2, 4)).operation)
    all | row | mean
    """
    if count(module) > LARGEST or "forward" in vars(module):
        return None
    cpu = torch.device("cpu")
    try:
        alone = copied(module, cpu)[0].to(cpu, torch.float64)
    except Exception:
        return None
    generator = torch.Generator().manual_seed(0)
    with quiet(cpu), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that only these runs have
        for p in alone.parameters():  # what is zero at the start would show nothing
            if p.is_floating_point():
                p.add_(0.1 + 0.4 * torch.rand(p.shape, generator=generator, dtype=p.dtype))
        if _acts_alone(alone, generator) or _embeds(alone, generator):
            return TRIED
        return next((match for trial in TRIALS if (match := trial(alone, generator))), None)


# --- pointwise


def _acts_alone(module: nn.Module, generator: torch.Generator) -> bool:
    """Whether it reads one position for each that it makes, wherever its channels may be.

    One position after the other gets other values. It passes if it runs on some maps, and on all of these nothing else
    changes.
    """
    passed = False
    for x, axis in _maps(module, generator):
        try:
            y = _output(module(x))
        except Exception:
            continue
        if not _one_position(module, x, y, axis, generator):
            return False
        passed = True
    return passed


def _maps(module: nn.Module, generator: torch.Generator, least: int = 3) -> Iterator[tuple[Tensor, int]]:
    """Maps of several sizes, with channels along the last and the second axis; small numbers saturate nothing."""
    sizes = {n for p in module.parameters(recurse=False) for n in p.shape if n > 1}
    sizes = sizes or {n for n in vars(module).values() if type(n) is int and 1 < n <= 4096} or {8}
    first = next(n for n in range(least, 100) if n not in sizes and (n + 1) not in sizes)  # no axis is mistaken
    for channels in sorted(sizes)[:4]:
        for grid in ((first,), (2, first + 1)):
            for axis, shape in ((-1, (1, *grid, channels)), (1, (1, channels, *grid))):
                for scale in SCALES:
                    yield scale * torch.randn(shape, dtype=torch.float64, generator=generator), axis


def _output(made: object) -> Tensor:
    if not isinstance(made, Tensor):
        raise TypeError("makes no tensor")
    return made


def _one_position(module: nn.Module, x: Tensor, y: Tensor, axis: int, generator: torch.Generator) -> bool:
    """Whether the output at a position changes with the input there, and no other does."""
    x_Np, y_Np = x.movedim(axis, -1), y.movedim(axis, -1) if y.dim() == x.dim() else y
    if x_Np.shape[:-1] != y_Np.shape[:-1]:
        return False
    for at in range(x_Np[..., 0].numel()):
        other = x_Np.clone().flatten(0, -2)
        other[at] = 2 * x.abs().mean() * torch.randn(other.shape[-1], dtype=x.dtype, generator=generator)
        changed = _output(module(other.view(x_Np.shape).movedim(-1, axis))).movedim(axis, -1) - y_Np
        rows = changed.flatten(0, -2)
        rows[at] = 0
        if not bool((rows.abs() <= 1e-13 * (1 + y.abs().max())).all()):
            return False
    return True


def _embeds(module: nn.Module, generator: torch.Generator) -> bool:
    """Whether it makes a position of each index, and of no other."""
    if not isinstance(module, nn.Embedding):
        return False
    ids, other = (torch.randint(module.num_embeddings, (1, 7), generator=generator) for _ in range(2))
    try:
        y = _output(module(ids))
        if y.shape[:2] != ids.shape:
            return False
        for at in range(ids.shape[1]):
            one = ids.clone()
            one[0, at] = other[0, at]
            changed = (_output(module(one)) != y).flatten(2).any(-1)[0]
            changed[at] = False
            if bool(changed.any()):
                return False
    except Exception:
        return False
    return True


# --- statistics


def _statistics(module: nn.Module, generator: torch.Generator) -> Match | None:
    """Whether a position depends on the others, and by means alone: of each channel, and of its square.

    The others are mirrored, each channel by itself, so that their values change and these two means do not.
    """
    for axis in (1, -1):
        passed, squares = False, False
        for x, its in _maps(module, generator, least=6):
            if its != axis:
                continue
            try:
                y = _output(module(x))
            except Exception:
                continue
            if y.dim() != x.dim():  # maps of another rank than it takes
                continue
            means = y.shape == x.shape and _kept(module, x, y, axis, _mirrored, generator)
            if not means or _kept(module, x, y, axis, _others, generator):
                passed = False
                break
            passed = True
            squares |= not _kept(module, x, y, axis, _redrawn, generator)
        if passed:
            what = "of the map, and of its square" if squares else "of the map"
            note = f"the mean {what}, by which every position is then changed alone"
            return Match(GLOBAL_MEAN, scaffold="a norm counts 0", axis=axis, note=note, followed=True)
    return None


Change = Callable[[Tensor, torch.Generator], Tensor]


def _kept(module: nn.Module, x: Tensor, y: Tensor, axis: int, change: Change, generator: torch.Generator) -> bool:
    """Whether some positions stay what they are when all others change so."""
    x_NC, shape = x.movedim(axis, -1).flatten(0, -2), x.movedim(axis, -1).shape
    y_NC = y.movedim(axis, -1).flatten(0, -2)
    for at in (0, len(x_NC) // 2, len(x_NC) - 1):
        rest = torch.arange(len(x_NC)) != at
        other = x_NC.clone()
        other[rest] = change(x_NC[rest], generator)
        made = _output(module(other.view(shape).movedim(-1, axis))).movedim(axis, -1).flatten(0, -2)
        if not bool((made[at] - y_NC[at]).abs().max() <= CLOSE * (1 + y.abs().max())):
            return False
    return True


def _mirrored(rest_nC: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, each channel at a plane of its own that holds what is the same everywhere."""
    normal_nC = torch.randn(rest_nC.shape, generator=generator, dtype=rest_nC.dtype)
    normal_nC = F.normalize(normal_nC - normal_nC.mean(0), dim=0)
    return rest_nC - 2 * normal_nC * (normal_nC * rest_nC).sum(0)


def _others(rest_nC: Tensor, generator: torch.Generator) -> Tensor:
    return 2 * rest_nC.abs().mean() * torch.randn(rest_nC.shape, generator=generator, dtype=rest_nC.dtype)


def _redrawn(rest_nC: Tensor, generator: torch.Generator) -> Tensor:
    """Others with the same mean."""
    other = _others(rest_nC, generator)
    return other - other.mean(0) + rest_nC.mean(0)


# --- one convolution


class _Convolutions(TorchDispatchMode):
    """The arguments of convolutions, and of what pads with zeros before them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.pads: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name == "convolution":
            self.calls.append(args)
        elif name == "constant_pad_nd":
            self.pads = list(args[1])
        return made


def _convolution(module: nn.Module, generator: torch.Generator) -> Match | None:
    """Whether it is one convolution of its input with a kernel that is made of its own parameters.

    The kernel of one run, and torch's convolution with it, must make what the layer makes of other inputs.
    """
    kernels = [p for p in module.parameters(recurse=False) if p.dim() > 2]
    ndim = max((p.dim() for p in kernels), default=0) - 2
    if ndim not in (1, 2, 3):
        return None
    side = 2 * max(n for p in kernels for n in p.shape[2:]) + 3
    if side**ndim > MOST:
        return None
    own = [getattr(module, "in_channels", None), *(n for p in kernels for n in p.shape[:2])]
    for channels in dict.fromkeys(n for n in own if type(n) is int and n > 0):
        seen: list[tuple[Any, ...]] = []
        try:
            for grid in ([side + a % 2 for a in range(ndim)], [side + 2, side + 1, side + 4][:ndim]):
                x, other = (
                    scale * torch.randn(2, channels, *grid, dtype=torch.float64, generator=generator)
                    for scale in SCALES
                )
                with _Convolutions() as watch:
                    y = _output(module(x))
                (call,) = watch.calls
                pads = watch.pads + [0] * (2 * ndim - len(watch.pads))
                if not (_convolves(call, pads, x, y) and _convolves(call, pads, other, _output(module(other)))):
                    return None
                seen.append((call, pads))
        except Exception:
            continue
        return _convolved(module, seen, ndim)
    return None


def _convolves(call: tuple[Any, ...], pads: list[int], x: Tensor, y: Tensor) -> bool:
    made = torch.convolution(F.pad(x, pads), *call[1:])
    return made.shape == y.shape and bool((made - y).abs().max() <= CLOSE * (1 + y.abs().max()))


def _convolved(module: nn.Module, seen: list[tuple[Any, ...]], ndim: int) -> Match | None:
    (_, weight, _, stride, padding, dilation, transposed, _, groups), _ = seen[0]
    if transposed or any(not torch.equal(weight, call[1]) for call, _ in seen):
        return None
    size, stride, dilation = (tuple(int(n) for n in v) for v in (weight.shape[2:], stride, dilation))
    ends = {  # zeros before and behind each axis, on every map
        tuple((padding[a] + pads[2 * (ndim - 1 - a)], padding[a] + pads[2 * (ndim - 1 - a) + 1]) for a in range(ndim))
        for _, pads in seen
    }
    reach = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    even = len(ends) == 1 and all(a == b for a, b in next(iter(ends)))
    same = ends == {tuple((r // 2, r - r // 2) for r in reach)}
    if same:
        path = Window(plain(size), stride=plain(stride), dilation=plain(dilation))
    else:
        path = window(size, stride, dilation, tuple(a for a, _ in next(iter(ends))) if even else 0)
    each = groups == weight.shape[0] > 1 and weight.shape[1] == 1
    notes = [] if even or same else ["on the map with zeros around it, as many as its size asks for"]
    if not any(p.shape == weight.shape and torch.equal(p, weight) for p in module.parameters(recurse=False)):
        notes.append("its kernel is made of its own parameters, the same for every input")
    op = Basic(path, Box(), Weight(kernel=Depthwise() if each else Dense(groups)))
    return Match(op, note="; ".join(notes), followed=not (even or same))


# --- a finer map


def _nearest(module: nn.Module, generator: torch.Generator) -> Match | None:
    """Whether it makes a finer map of the same values: each output is the input at its own place, rounded down."""
    passed = False
    for grid in ((7,), (5, 6), (3, 4, 5)):
        x = torch.randn(1, 8, *grid, dtype=torch.float64, generator=generator)
        try:
            y = made = _output(module(x))
        except Exception:
            continue
        if y.dim() != x.dim() or y.shape[:2] != x.shape[:2] or y.shape == x.shape:
            return None
        for axis, n in enumerate(grid, 2):
            m = y.shape[axis]
            if m < n:
                return None
            x = x.index_select(axis, torch.arange(m) * n // m)
        if not torch.equal(x, made):
            return None
        passed = True
    if not passed:
        return None
    note = "each output is one position of a coarser map"
    return Match(Basic(Window(1), Box(), Weight(Ones())), scaffold="a copy counts 0", note=note, followed=True)


Trial = Callable[[nn.Module, torch.Generator], Match | None]
TRIALS: tuple[Trial, ...] = (_convolution, _nearest, _statistics)
