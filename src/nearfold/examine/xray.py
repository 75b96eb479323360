"""`xray`: where every layer of a network looks, measured on images.

Shape legend: I images, B images of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nearfold._images import first_line
from nearfold.examine.network import ReceptiveField, gram, receptive_fields
from nearfold.examine.reading import Layer, first_tensor, holds_positions, read
from nearfold.examine.report import XRay, finished
from nearfold.examine.sources import sources
from nearfold.surgery.runs import unchanged

BATCH = 8

Progress = Callable[[int, int, str], None]
"""Told how much is done, of how much, and what: every time a layer has been measured on a batch."""


def xray(
    model: nn.Module, images: Tensor, *, batch: int = BATCH, network: bool = True, progress: Progress | None = None
) -> XRay:
    """Measure where every layer that mixes positions looks.

    The model runs in evaluation mode on the images as they are given (normalised as it wants them); every layer is
    measured while it runs, on the maps that the layers before it have made. Layers of this library, and those that
    `nearfold.convert` could carry over, are read head by head from the operation itself, after it has made the same
    output; any other is differentiated on the first four images. What is measured, with formulas: docs/xray.md.

    Args:
        model: takes (B, C, *grid); it is left as it is, gradients included.
        images: (I, C, *grid), at least two, of the kind that it was trained for; noise has no content to look for.
        batch: images that run at once; content is compared within a batch.
        network: measure the whole network, too: receptive fields, and how alike the layers' maps are.
        progress: called as (done, of, name).

    Returns:
        The layers with their measures; ``str()`` is a table.

    Raises:
        ValueError: the model does not run on such images, or they are fewer than two.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1))
    >>> seen = xray(net, torch.randn(2, 3, 8, 8))
    >>> [(one.name, round(one.measures["window3"], 3), one.measures["content"] > 0) for one in seen.layers]
    [('0', 1.0, False), ('2', 1.0, True), ('3', 1.0, False)]
    >>> [field.name for field in seen.fields]
    ['0', '2', '3']
    """
    _require(model, images, batch)
    began = time.perf_counter()
    with unchanged(model), torch.no_grad():
        found, left = sources(model, tuple(images.shape[1:]))
        layers = [Layer(source) for source in found]
        batches = list(images.split(batch))
        if len(batches) > 1 and len(batches[-1]) < 2:  # content is compared within a batch
            batches[-2:] = [torch.cat(batches[-2:])]
        told = _Told(progress, len(layers) * len(batches))
        _alone(model, images[:1].clone(), [layer for layer in layers if layer.source.layout.parts > 1])
        for part in batches:
            with _watched(layers, part, network, told):
                model(part.clone())  # which it may write into
            for layer in layers:
                if layer.grams and not layer.calls:  # as one that was called, and said nothing
                    layer.grams.append(torch.full((len(part), len(part)), torch.nan, dtype=torch.double))
        fields, why = _fields(model, images, layers) if network else ([], "")
    return finished(model, images, layers, left, fields, why, time.perf_counter() - began)


def _fields(model: nn.Module, images: Tensor, layers: list[Layer]) -> tuple[list[ReceptiveField], str]:
    """The receptive fields behind the layers that are measured, or why there are none."""
    measured = {one.source.name: one.source.place for one in layers if one.measures}
    last = frozenset(one.source.name for one in layers if one.source.layout.axis != 1)
    try:
        fields = receptive_fields(model, images, measured, last)
    except (RuntimeError, ValueError, TypeError) as error:  # it runs, but cannot be differentiated as a whole
        return [], f"receptive fields: {first_line(error)}"
    return fields, "receptive fields: no gradient reaches the images" if measured and not fields else ""


class _Told:
    """Counts what was done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, name: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, name)


@contextlib.contextmanager
def _watched(layers: list[Layer], images: Tensor, network: bool, told: _Told) -> Iterator[None]:
    """Every layer is measured when it has returned; of several calls in one run, on the first."""
    busy: list[nn.Module] = []  # the layer that is asked anew, by differentiation or within another

    def returned(layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if busy:
            return
        layer.calls += 1
        if layer.calls > 1:
            return
        busy.append(module)
        began = time.perf_counter()
        try:
            if not layer.reason:
                read(layer, args, kwargs, output, images)
            if network:
                layer.grams.append(gram(first_tensor(output), len(images), layer.source.layout.parts))
        finally:
            busy.pop()
            layer.seconds += time.perf_counter() - began
            told(layer.source.name)

    hooks = []
    for layer in layers:
        layer.calls = 0
        hooks.append(layer.source.place.register_forward_hook(partial(returned, layer), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _alone(model: nn.Module, image: Tensor, layers: list[Layer]) -> None:
    """Note what layers that are given parts of images are given of one image: which parts of a batch are its."""

    def given(layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.alone is None:
            layer.alone = next((t.detach() for t in tree_leaves((args, kwargs)) if holds_positions(t)), None)

    hooks = [layer.source.place.register_forward_pre_hook(partial(given, layer), with_kwargs=True) for layer in layers]
    try:
        if layers:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()


def _require(model: nn.Module, images: Tensor, batch: int) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(images, Tensor) or images.dim() < 3 or not images.is_floating_point():
        got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be floating point, (images, channels, *grid), got {got}")
    if len(images) < 2:
        raise ValueError(
            f"images must be two or more, since what changes from one to the next is measured; got {len(images)}"
        )
    if type(batch) is not int or batch < 2:
        raise ValueError(f"batch must be 2 or more, since images are compared within a batch; got {batch!r}")
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite: they have numbers that are infinite or none")
    if torch.is_inference_mode_enabled():
        raise ValueError("layers are differentiated: call xray outside torch.inference_mode()")
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if types and images.dtype not in types:
        (wanted, *_) = sorted(types, key=str)
        raise ValueError(f"images are {images.dtype}, and the model is {wanted}: give images.to({wanted})")
