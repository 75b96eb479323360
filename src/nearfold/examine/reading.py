"""What one layer reads while the model runs: its rows for some of its outputs, and their measures.

Shape legend: B images of a batch, G groups (heads), R rows (outputs asked), N inputs, C channels, K copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nearfold._images import first_line
from nearfold.examine.sources import Source
from nearfold.look.derivative import evaluating
from nearfold.look.measures import Measures, measure
from nearfold.look.mixing import own_mixing
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.surgery.proof import budget, difference, tensors

EVERY = 256  # outputs of which all are asked, where their rows are at most
NUMBERS = 1 << 20  # numbers
SOME = 64  # outputs that are asked where they are more; fewer where the rows are very long, down to
FEW = 16
GROUPS = 16  # groups of channels that are measured where there are more; fewer where the rows are very long
ALIKE = 4  # images in which a layer that reads the same of all of them is asked
IMAGES = 4  # of which a layer is differentiated
ROWS = 32  # outputs by which it is
PROBES = 2  # random signs over the channels of each
CHUNK = 1 << 23  # numbers of a matrix that are measured at once
BESIDE = 8  # tokens that may lie beside a map


@dataclass
class Layer:
    """A layer and what was found of it so far.

    Attributes:
        source: what was known before.
        way: ``words``, ``derivative``, or empty before it ran.
        grid: of its inputs, () before it ran.
        out_grid: of its outputs.
        beside: tokens beside the map, which come first.
        rows: (R,), outputs that are asked.
        groups: of channels, or heads; those measured are at most `GROUPS`.
        measures: of every batch.
        sample: (G, R, N), of the first image.
        fixed: whether it reads the same of every image: bit for bit so in the first `ALIKE`.
        reason: why it cannot be measured.
        calls: in the present run.
        grams: products of its output's maps, of every batch.
        seconds: that measuring it took.
    """

    source: Source
    way: str = ""
    grid: tuple[int, ...] = ()
    out_grid: tuple[int, ...] = ()
    beside: int = 0
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    groups: int = 1
    measures: list[Measures] = field(default_factory=list)
    sample: Tensor | None = None
    fixed: bool = False
    reason: str = ""
    calls: int = 0
    grams: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """Of how many images it was measured."""
        return sum(len(m.distance) for m in self.measures)

    def all_measures(self) -> Measures:
        """The measures of all batches."""
        values = {f.name: torch.cat([getattr(m, f.name) for m in self.measures]) for f in fields(Measures)}
        return Measures(**values)


def read(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, images: Tensor) -> None:
    """Measure a layer on one call of it; where that fails, the reason is kept.

    Args:
        layer: found so far, and changed.
        args: of the call.
        kwargs: of the call.
        output: what the layer made.
        images: (B, C, *grid), the model's input, whose grid says how tokens lie on a map.
    """
    batch, image = len(images), tuple(images.shape[2:])
    try:
        if not layer.way:
            layer.way = "words" if _same(layer, args, kwargs, output) else "derivative"
        if layer.way == "words":
            if not layer.fixed:
                _by_words(layer, args, kwargs, batch, image)
        elif layer.images < IMAGES:
            _by_derivative(layer, args, kwargs, output, batch, image)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        layer.reason = first_line(error)


# --- in the words


def _same(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether the layer in the words makes what the layer made, on this very call."""
    source = layer.source
    if source.mixer is source.place:
        return True
    if source.mixer is None:
        made = _without_weights(source, args)
        if made is None:
            return False
        source = layer.source = made
    assert source.twin is not None
    try:
        ours, theirs = first_tensor(source.twin(*args, **kwargs)), first_tensor(output)
    except (ValueError, RuntimeError, TypeError):
        return False
    return difference(ours, theirs) <= budget(theirs.dtype)


def _without_weights(source: Source, args: tuple[Any, ...]) -> Source | None:
    """A layer without weights, as a pool: its operation is all of it."""
    if source.operation is None or source.axis != 1 or any(True for _ in source.place.parameters()):
        return None
    x = next((t for t in args if isinstance(t, Tensor) and t.dim() > 2), None)
    if x is None:
        return None
    try:
        mixer = Mixer(source.operation, x.shape[1], ndim=x.dim() - 2, bias=False).to(x.device, x.dtype).eval()
    except ValueError:
        return None
    if any(True for _ in mixer.parameters()):
        return None
    return Source(source.name, source.kind, source.operation, source.place, 1, mixer, mixer)


def _by_words(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, image: tuple[int, ...]) -> None:
    mixer, twin = layer.source.mixer, layer.source.twin
    assert mixer is not None and twin is not None
    given: list[Tensor] = []
    if twin is mixer:
        given.append(first_tensor((args, kwargs)))
    else:
        hook = mixer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
        try:
            twin(*args, **kwargs)
        finally:
            hook.remove()
    x = given[0].detach()
    _require_whole(x, batch)
    if isinstance(mixer, TokenMixer):
        n = x.shape[1]
        layer.beside, layer.grid = placed(n, image) if x.dim() == 3 else (0, tuple(x.shape[1:-1]))
        layer.out_grid = layer.grid
    else:
        layer.grid, layer.out_grid = tuple(mixer.prepare(x[:1]).shape[2:]), tuple(mixer(x[:1]).shape[2:])
    _choose_rows(layer, SOME)
    rows = layer.rows + layer.beside

    def rows_of(images: Tensor) -> Tensor:
        return torch.cat([_limited(layer, own_mixing(mixer, one[None], rows=rows).matrix) for one in images])

    signed = own_mixing(mixer, x[:1], rows=rows[:1]).exact
    first = rows_of(x[:ALIKE])
    layer.fixed = (
        len(first) > 1 and all(torch.equal(first[0], one) for one in first[1:]) and not bool((x[0] == x[1]).all())
    )
    if layer.fixed:
        _keep(layer, first[:2], signed)
        return
    step = _images_at_once(layer)
    for begin in range(0, len(x), step):
        done = first[begin : begin + step]
        rest = x[begin + len(done) : begin + step]
        _keep(layer, torch.cat([done, rows_of(rest)]) if len(rest) else done, signed)


# --- by differentiation


def _by_derivative(
    layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: int, image: tuple[int, ...]
) -> None:
    place = layer.source.place
    leaves, spec = tree_flatten((args, kwargs))
    which = next(i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 2)
    x, y = leaves[which], first_tensor(output)
    _require_whole(x, batch)
    _require_whole(y, batch)
    tokens = _channels_last(layer.source.axis, x, y, image)
    layer.beside, layer.grid = _grid(x, tokens, image)
    out_beside, layer.out_grid = _grid(y, tokens, image)
    if out_beside != layer.beside:
        raise ValueError(
            f"{layer.beside} tokens lie beside the map of its input, {out_beside} beside that of its output"
        )
    _choose_rows(layer, ROWS)
    asked = layer.rows + layer.beside
    images = []
    for b in range(min(len(x), IMAGES - layer.images)):

        def call(many: Tensor, b: int = b) -> Tensor:
            given = [
                many if i == which else t[b : b + 1].expand(len(many), *t.shape[1:]) if _batched(t, x) else t
                for i, t in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(given, spec)
            return first_tensor(place(*args, **kwargs))

        images.append(probed(call, place, x[b : b + 1], asked, tokens))
    _keep(layer, torch.stack(images)[:, None], signed=False)


def probed(
    call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, rows_R: Tensor, tokens: bool, probes: int = PROBES
) -> Tensor:
    """The sizes of some rows (R, N) of a layer's derivative at one image, estimated by random signs over its channels.

    The size of a pair is sqrt(sum over o and c of (dy[o, m] / dx[c, n])^2 / O), as in `nearfold.look.mixing_matrix`.
    The mean of (sum over o of s[o] dy[o, m] / dx[c, n])^2 over random signs s is that sum over o. The signs are those
    of every row and image: what differs between two of them is the layer's own.
    """
    with evaluating(layer), torch.enable_grad():
        rows_K = rows_R.repeat_interleave(probes)
        copies = probes * max(1, min(len(rows_R), (1 << 24) // (probes * x.numel())))
        found, signs_pO = [], None
        for first in range(0, len(rows_K), copies):
            row_k = rows_K[first : first + copies]
            many = x.detach().expand(len(row_k), *x.shape[1:]).clone().requires_grad_()
            y_kOM = _flat(call(many.clone()), tokens)
            if signs_pO is None:
                generator = torch.Generator().manual_seed(0)
                signs_pO = (torch.randint(2, (probes, y_kOM.shape[1]), generator=generator) * 2 - 1).to(y_kOM)
            ask_kOM = torch.zeros_like(y_kOM, memory_format=torch.contiguous_format)
            ask_kOM[torch.arange(len(row_k)), :, row_k] = signs_pO.repeat(len(row_k) // probes, 1)
            (grad,) = torch.autograd.grad(y_kOM, many, ask_kOM)
            found.append(_flat(grad, tokens).square().sum(1) / y_kOM.shape[1])
        return torch.cat(found).unflatten(0, (-1, probes)).mean(1).sqrt().detach()


def _channels_last(axis: int | None, x: Tensor, y: Tensor, image: tuple[int, ...]) -> bool:
    if axis is not None:
        return axis == -1
    if x.dim() == 3 and y.dim() == 3:
        placed(x.shape[1], image)
        return True
    if x.dim() == 2 + len(image) == y.dim():
        return False
    raise ValueError(f"nothing says which axes of {tuple(x.shape)} and {tuple(y.shape)} are positions")


def _grid(x: Tensor, tokens: bool, image: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    sides = tuple(x.shape[1:-1]) if tokens else tuple(x.shape[2:])
    if len(sides) == len(image):
        return 0, sides
    if len(sides) == 1:
        return placed(sides[0], image)
    raise ValueError(f"a map of {tuple(x.shape)} is not a map of the image's axes")


def _batched(t: Any, x: Tensor) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == x.shape[0] > 1


# --- shared


def _require_whole(x: Tensor, batch: int) -> None:
    """ValueError where a layer is not given the images one by one: windows of them, or positions first."""
    if x.shape[0] != batch:
        raise ValueError(f"it is called on {x.shape[0]} parts of {batch} images, and nothing says which lies where")


def placed(positions: int, image: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How a sequence lies on a map as wide as the image: tokens beside it, which come first, and its grid.

    Raises:
        ValueError: no map with at most `BESIDE` tokens beside it has so many positions.

    >>> placed(197, (224, 224)), placed(201, (224, 224)), placed(48, (128, 192))
    ((1, (14, 14)), (5, (14, 14)), (0, (6, 8)))
    """
    if len(image) == 1:
        return 0, (positions,)
    if len(image) == 2:
        for beside in range(min(BESIDE, positions - 1) + 1):
            on = positions - beside
            exact = math.sqrt(on * image[0] / image[1])
            for height in {math.floor(exact), math.ceil(exact)} - {0}:
                width = on // height
                near = abs(height * image[1] - width * image[0]) < max(image)  # less than one row or column off
                if height * width == on and near:
                    return beside, (height, width)
    raise ValueError(f"{positions} positions are no map of an image of {' x '.join(map(str, image))}")


def _choose_rows(layer: Layer, some: int) -> None:
    """Which outputs are asked: all where they are few, or some at random, the same in every batch."""
    if len(layer.rows):
        return
    outputs, inputs = math.prod(layer.out_grid), math.prod(layer.grid) + layer.beside
    if outputs * inputs <= NUMBERS and outputs <= EVERY and layer.way == "words":
        layer.rows = torch.arange(outputs)
        return
    some = min(outputs, max(FEW, min(some, NUMBERS // inputs)))
    layer.rows = torch.randperm(outputs, generator=torch.Generator().manual_seed(0))[:some].sort().values


def _limited(layer: Layer, matrix: Tensor) -> Tensor:
    """At most `GROUPS` of the groups, evenly spaced, and fewer where their rows are many numbers."""
    layer.groups = matrix.shape[1]
    most = max(2, min(GROUPS, 4 * NUMBERS // matrix[0, 0].numel()))
    if layer.groups <= most:
        return matrix
    return matrix[:, torch.linspace(0, layer.groups - 1, most).round().long()]


def _images_at_once(layer: Layer) -> int:
    numbers = len(layer.rows) * (math.prod(layer.grid) + layer.beside) * min(layer.groups, GROUPS)
    return max(2, CHUNK // max(numbers, 1))


def _keep(layer: Layer, matrix: Tensor, signed: bool) -> None:
    if layer.sample is None:
        layer.sample = matrix[0].float().cpu()
    layer.measures.append(measure(matrix.cpu(), layer.grid, layer.rows, layer.out_grid, layer.beside, signed=signed))


def _flat(x: Tensor, tokens: bool) -> Tensor:
    """(B, C, N)."""
    return (x.movedim(-1, 1) if tokens else x).flatten(2)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of what a layer takes or returns, whatever holds it."""
    found = tensors(output)
    if not found:
        raise ValueError(f"{type(output).__name__} has no tensor")
    return found[0]
