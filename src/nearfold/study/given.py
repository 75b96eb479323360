"""A trained network of the user's in a study: where it comes from, whose weights it has, and how it takes images."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearfold.models import Network, create, from_pretrained
from nearfold.models.pretrained import pretrained
from nearfold.options import brief

if TYPE_CHECKING:
    from nearfold.train import ImageData

Config = Mapping[str, Any]

GIVEN = "given"
"""Name, in a trial's network, of one that the user gives: ``model``, ``weights`` (a path, or None) and ``sha256``."""
WHAT = (
    "timm:NAME or torchvision:NAME with --weights, path/to/file.py:factory, a function that returns a trained model, a "
    "folder that save_pretrained left, or a network of `nearfold models --pretrained`"
)
"""What a model may be."""


def load(spec: str, weights: Path | None = None) -> nn.Module:
    """A model by its name, with weights.

    Args:
        spec: what `WHAT` says.
        weights: a state dict.

    Raises:
        ValueError: there is no such model, it has no weights, or these do not fit it.
    """
    from nearfold.compat.checkpoints import tensors_of
    from nearfold.recognise.load import load_model

    ours = pretrained()
    if ":" not in spec and not Path(spec).is_dir() and spec not in ours:
        raise ValueError(f"MODEL must be {WHAT}; got {brief(spec)}")
    if Path(spec).is_dir():
        model: nn.Module = from_pretrained(Path(spec))
    else:
        model = create(spec, pretrained=weights is None) if spec in ours else load_model(spec)
    if weights is not None:
        try:
            state = tensors_of(weights)
        except ValueError as error:
            raise ValueError(f"--weights {weights}: {error}") from error
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise ValueError(f"--weights {weights} do not fit {spec}: {' '.join(lines[1:3])[:300]}") from error
    elif spec.partition(":")[0] in ("timm", "torchvision"):
        raise ValueError(f"{spec} alone has fresh weights, of which nothing can be kept: name its own, --weights FILE")
    return model


def given(spec: str, weights: Path | None) -> dict[str, Any]:
    """A model as the network of a trial.

    Raises:
        ValueError: as `load`.
    """
    return {
        "name": GIVEN, "model": spec, "weights": None if weights is None else str(weights),
        "sha256": digest(load(spec, weights)),
    }  # fmt: skip


def digest(model: nn.Module) -> str:
    """Of the weights and buffers of a model, in hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def build(network: Config) -> nn.Module:
    """The model of a trial's network, with its weights.

    Raises:
        ValueError: as `load`, or the weights are not those that the trial was planned with.
    """
    return copy.deepcopy(_checked(network["model"], network["weights"], network["sha256"]))


@functools.lru_cache(maxsize=1)
def _checked(spec: str, weights: str | None, sha256: str) -> nn.Module:
    model = load(spec, None if weights is None else Path(weights))
    if (found := digest(model)) != sha256:
        raise ValueError(
            f"{spec} has other weights than this run was planned with ({found[:12]}, and then {sha256[:12]}): a "
            "factory must return the same ones every time"
        )
    return model


def ways_of(model: nn.Module) -> dict[str, Any]:
    """How a model of timm says that it takes images (``input_size``, ``mean``, ``std``); empty for others.

    Networks of this library are trained on images normalised by their data set, as studies do.
    """
    if isinstance(model, Network):
        return {}
    return getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}


def take_images_of(model: nn.Module, data: ImageData) -> None:
    """Make a model, in place, take images as `nearfold.train.prepare` makes them of these data.

    One that says how it was trained gets them normalised so, by a hook before its forward.
    """
    own = ways_of(model)
    mean, std = own.get("mean"), own.get("std")
    if mean is None or std is None or len(mean) != data.channels:
        return
    scale = [float(s) / float(o) for s, o in zip(data.std, std, strict=True)]
    shift = [(float(m) - float(o)) / float(w) for m, o, w in zip(data.mean, mean, std, strict=True)]
    model.register_forward_pre_hook(functools.partial(_normalised_anew, scale, shift))


def _normalised_anew(
    scale: Sequence[float], shift: Sequence[float], _: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    x: Tensor = arguments[0]
    columns = [x.new_tensor(values)[:, None, None] for values in (scale, shift)]
    return (x * columns[0] + columns[1], *arguments[1:])


def require_classifier(model: nn.Module, data: ImageData, spec: str) -> None:
    """ValueError where a model does not make a number for each class of the data of their images.

    Args:
        model: as `build` returns it.
        data: what it is to be trained on.
        spec: its name, for the message.
    """
    from nearfold.train import prepare

    x = prepare(data.train.images[:2], data)
    with torch.no_grad():
        try:
            made = copy.deepcopy(model).eval()(x)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"model {spec} does not take images of {data.name}, {tuple(x.shape[1:])}: {str(error).splitlines()[0]}"
            ) from error
    wanted = (2, len(data.classes))
    if not isinstance(made, Tensor) or tuple(made.shape) != wanted:
        what = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"model {spec} must make {wanted} of two images of {data.name}, got {what}")
