"""What one layer reads while the model runs: its rows for some of its outputs, and their measures.

Shape legend: B images of a batch, G groups (heads), R rows (outputs asked), N inputs, C channels, K copies.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from nearfold._images import first_line
from nearfold.examine.layout import Layout, placed
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
NEED_WEIGHTS = list(inspect.signature(nn.MultiheadAttention.forward).parameters).index("need_weights") - 1
NEAR = 1e-3  # how far what one image makes alone may be from what it makes among others, by the largest number


@dataclass
class Layer:
    """A layer and what was found of it so far.

    Attributes:
        source: what was known before.
        way: ``words``, ``derivative``, or empty before it ran.
        grid: of its inputs, () before it ran.
        out_grid: of its outputs; () where they lie beside the map, as the one query of class attention.
        beside: tokens beside the map, which come first.
        rows: (R,), outputs that are asked.
        alone: what it is given of the first image where that runs alone, for a layer that is given parts of images.
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
    alone: Tensor | None = None
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
    args, kwargs = _without_scores(layer.source.place, args, kwargs)
    try:
        if not layer.measures:
            _require_order(layer, next((t for t in tree_leaves((args, kwargs)) if holds_positions(t)), images))
        if not layer.way:
            layer.way = "words" if _same(layer, args, kwargs, output) else "derivative"
        if layer.way == "words":
            if not layer.fixed:
                _by_words(layer, args, kwargs, batch, image)
        elif layer.images < IMAGES:
            _by_derivative(layer, args, kwargs, output, batch, image)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        layer.reason = first_line(error)


def _without_scores(
    place: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of torch's attention that does not ask for its weights beside the output: in the words there are none."""
    if not isinstance(place, nn.MultiheadAttention):
        return args, kwargs
    if len(args) > NEED_WEIGHTS:
        return (*args[:NEED_WEIGHTS], False, *args[NEED_WEIGHTS + 1 :]), kwargs
    return args, kwargs | {"need_weights": False}


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
    if source.operation is None or source.layout.axis != 1 or any(True for _ in source.place.parameters()):
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
    return replace(source, mixer=mixer, twin=mixer)


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
        if not given:
            raise ValueError("called like this it does not do what its words say")
    x, layout = given[0].detach(), layer.source.layout
    _require_parts(layer, x, batch)
    if isinstance(mixer, TokenMixer):
        sides = out_sides = tuple(x.shape[1:-1])
    else:
        sides, out_sides = tuple(mixer.prepare(x[:1]).shape[2:]), tuple(mixer(x[:1]).shape[2:])
    layer.beside, layer.grid = layout.on_map(sides, image)
    out_beside, layer.out_grid = (layer.beside, layer.grid) if sides == out_sides else layout.on_map(out_sides, image)
    _require_beside(layer, out_beside)
    _choose_rows(layer, SOME)
    rows = layer.rows + layer.beside
    x = x.unflatten(0, (batch, layout.parts))

    def rows_of(images: Tensor) -> Tensor:
        return torch.cat([_limited(layer, _on_map(mixer, one, rows, layout)) for one in images])

    signed = own_mixing(mixer, x[0, :1], rows=rows[:1] % math.prod(out_sides)).exact
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


def _on_map(mixer: Mixer, x_P: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """These rows (1, G, R, N) of what a layer in the words does to one image, on the map that its parts are of."""
    if layout.places is None:
        return own_mixing(mixer, x_P, rows=rows).matrix
    positions, whole = layout.places.shape[1], torch.zeros(0)
    found_R = layout.places.flatten().argsort()[rows]
    for part in (found_R // positions).unique().tolist():
        (mine,) = torch.where(found_R // positions == part)
        block = own_mixing(mixer, x_P[part : part + 1], rows=found_R[mine] % positions).matrix
        if not len(whole):
            whole = block.new_zeros(1, block.shape[1], len(rows), layout.places.numel())
        whole[:, :, mine[:, None], layout.places[part][None]] = block
    return whole


# --- by differentiation


def _by_derivative(
    layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: int, image: tuple[int, ...]
) -> None:
    place = layer.source.place
    leaves, spec = tree_flatten((args, kwargs))
    which = next((i for i, t in enumerate(leaves) if holds_positions(t)), None)
    if which is None:
        raise ValueError("nothing that it is given has positions")
    x, y = leaves[which], first_tensor(output)
    _require_parts(layer, x, batch)
    if len(y) != len(x):
        raise ValueError(f"its output {tuple(y.shape)} has another batch than its input {tuple(x.shape)}")
    layout = _laid(layer.source.layout, x, y, image)
    layer.beside, layer.grid = layout.on_map(_sides(x, layout.axis), image)
    out_sides = _sides(y, layout.axis)
    if _asks_for_all(out_sides, layer):
        layer.out_grid, layer.rows = (), torch.arange(out_sides[0])
        asked = layer.rows
    else:
        out_beside, layer.out_grid = layout.on_map(out_sides, image)
        _require_beside(layer, out_beside)
        _choose_rows(layer, ROWS)
        asked = layer.rows + layer.beside
    same = {i for i, t in enumerate(leaves) if t is x or _is_again(t, x)}
    if any(_is_map(t, x, layout) for i, t in enumerate(leaves) if i not in same):
        raise ValueError("it is given several maps, and nothing says how one depends on the other")
    images, parts = [], layout.parts
    for b in range(min(batch, IMAGES - layer.images)):
        mine = slice(b * parts, (b + 1) * parts)

        def call(many: Tensor, mine: slice = mine) -> Tensor:
            given = [many if i in same else _again(t[mine], many) if _batched(t, x) else t
                     for i, t in enumerate(leaves)]  # fmt: skip
            args, kwargs = tree_unflatten(given, spec)
            return first_tensor(place(*args, **kwargs))

        images.append(probed(call, place, x[mine], asked, layout))
    _keep(layer, torch.stack(images)[:, None], signed=False)


def probed(
    call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, rows_R: Tensor, layout: Layout, probes: int = PROBES
) -> Tensor:
    """The sizes of some rows (R, N) of a layer's derivative at one image, estimated by random signs over its channels.

    The image is x (P, ...), one entry of the batch for each of its parts; all of them run together.

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
            many = x.detach().repeat(len(row_k), *[1] * (x.dim() - 1)).requires_grad_()
            y_kOM = layout.flat(call(many.clone()))
            if signs_pO is None:
                generator = torch.Generator().manual_seed(0)
                signs_pO = (torch.randint(2, (probes, y_kOM.shape[1]), generator=generator) * 2 - 1).to(y_kOM)
            ask_kOM = torch.zeros_like(y_kOM, memory_format=torch.contiguous_format)
            ask_kOM[torch.arange(len(row_k)), :, row_k] = signs_pO.repeat(len(row_k) // probes, 1)
            (grad,) = torch.autograd.grad(y_kOM, many, ask_kOM)
            found.append(layout.flat(grad).square().sum(1) / y_kOM.shape[1])
        return torch.cat(found).unflatten(0, (-1, probes)).mean(1).sqrt().detach()


def _laid(layout: Layout, x: Tensor, y: Tensor, image: tuple[int, ...]) -> Layout:
    """The layout with its channels' axis, which nothing but the tensors' shapes may say."""
    if layout.axis is not None:
        return layout
    if x.dim() == 3 and y.dim() == 3:
        placed(x.shape[1], image)
        return Layout(-1)
    if x.dim() == 2 + len(image) == y.dim():
        return Layout(1)
    raise ValueError(f"nothing says which axes of {tuple(x.shape)} and {tuple(y.shape)} are positions")


def _sides(x: Tensor, axis: int | None) -> tuple[int, ...]:
    """Of a tensor's positions; (B, C) is one."""
    if x.dim() == 2:
        return (1,)
    return tuple(x.shape[1:-1] if axis == -1 else x.shape[2:])


def _asks_for_all(out_sides: tuple[int, ...], layer: Layer) -> bool:
    """Whether the outputs are queries that lie beside the map, as in class attention, and no map themselves."""
    there = math.prod(layer.grid) + layer.beside
    return len(out_sides) == 1 and out_sides[0] < there and out_sides[0] in (1, layer.beside)


def _require_beside(layer: Layer, out_beside: int) -> None:
    if out_beside != layer.beside:
        raise ValueError(
            f"{layer.beside} tokens lie beside the map of its input, {out_beside} beside that of its output"
        )


def holds_positions(t: Any) -> bool:
    """Whether an argument of a layer is a map or a sequence."""
    return isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 2


def _again(t: Tensor, many: Tensor) -> Tensor:
    """A part of a batch as often as it fills a batch."""
    return t.repeat(len(many) // len(t), *[1] * (t.dim() - 1))


def _is_again(t: Any, x: Tensor) -> bool:
    """Whether it is the same tensor, as key and value of self-attention are the query."""
    same = isinstance(t, Tensor) and t.shape == x.shape and t.stride() == x.stride() and t.dtype == x.dtype
    return same and t.data_ptr() == x.data_ptr()


def _is_map(t: Any, x: Tensor, layout: Layout) -> bool:
    """Whether it is a map of the same positions, whatever its channels."""
    found = isinstance(t, Tensor) and t.is_floating_point() and 2 < t.dim() == x.dim() and t.shape[0] == x.shape[0]
    return found and _sides(t, layout.axis) == _sides(x, layout.axis)


def _batched(t: Any, x: Tensor) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == x.shape[0] > 1


# --- shared


def _require_parts(layer: Layer, x: Tensor, batch: int) -> None:
    """ValueError where a layer is not given the images one by one, and nothing says which entry is of which."""
    parts = layer.source.layout.parts
    if x.shape[0] != batch * parts:
        raise ValueError(f"it is called on {x.shape[0]} parts of {batch} images, and nothing says which lies where")


def _require_order(layer: Layer, x: Tensor) -> None:
    """ValueError where the parts of an image do not follow one another in the batch."""
    parts = layer.source.layout.parts
    if parts > 1 and (layer.alone is None or difference(x[:parts], layer.alone.to(x)) > NEAR):
        raise ValueError(f"it is called on {parts} parts of every image, and those of one do not follow one another")


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


def first_tensor(output: Any) -> Tensor:
    """The first tensor of what a layer takes or returns, whatever holds it."""
    found = tensors(output)
    if not found:
        raise ValueError(f"{type(output).__name__} has no tensor")
    return found[0]
