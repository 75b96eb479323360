"""A trained network of the user's in a study: where it comes from, whose weights it has, and how it takes images."""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearfold.models import Network, create, from_pretrained
from nearfold.models.hub import CONFIG
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
    from nearfold.recognise.load import SOURCES, load_model

    ours, folder = pretrained(), bool(spec) and (Path(spec) / CONFIG).is_file()
    if not (":" in spec or folder or spec in ours):
        raise ValueError(f"MODEL must be {WHAT}; got {brief(spec)}")
    if folder:
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
    elif (library := spec.partition(":")[0]) in SOURCES:
        raise ValueError(f"{spec} alone has fresh weights of {library}: name its own, --weights FILE")
    return model


def given(
    spec: str, weights: Path | None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> dict[str, Any]:
    """A model as the network of a trial.

    Args:
        spec: as `load` takes it.
        weights: as `load` takes it.
        mean: of each channel, 0..1: how the model was trained to take images; None: as the model says, or as studies
            do, by the data set's own.
        std: what they are then divided by.

    Raises:
        ValueError: as `load`; or the model is none that can be trained on.
    """
    model = _loaded(spec, weights)
    _require_trainable(model, spec)
    sha256 = digest(model, spec)
    if digest(_loaded(spec, weights), spec) != sha256:
        raise ValueError(
            f"model {spec} has other weights every time: load them from a file in the function, or give --weights"
        )
    found = {"name": GIVEN, "model": spec, "weights": None if weights is None else str(weights), "sha256": sha256}
    if (mean is None) != (std is None):
        raise ValueError("mean= and std= go together: give both, or none")
    if std is not None and min(std, default=0) <= 0:
        raise ValueError(f"std= must be above 0 for every channel, got {tuple(std)}")
    return found if mean is None or std is None else found | {"mean": list(mean), "std": list(std)}


def _loaded(spec: str, weights: Path | None) -> nn.Module:
    """A model, and torch's generator and default dtype as they were: a function of the user's may set them."""
    usual = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]):
            return load(spec, weights)
    finally:
        torch.set_default_dtype(usual)


def _require_trainable(model: nn.Module, spec: str) -> None:
    """ValueError for a model that no study can go on from, with what to do."""
    tensors = [*model.parameters(), *model.buffers()]
    why = ""
    if isinstance(model, torch.jit.ScriptModule):
        why = "is scripted: give the module that it was made from"
    elif any(isinstance(x, nn.UninitializedParameter | nn.UninitializedBuffer) for x in tensors):
        why = "has lazy layers, whose weights have no shape yet: run it once before it is returned"
    elif any(x.is_meta for x in tensors):
        why = "is on the meta device and has no weights: load them"
    elif odd := {x.dtype for x in tensors if x.is_floating_point() and x.dtype != torch.float32}:
        why = f"has weights of {odd.pop()}, and studies train in float32: return model.float()"
    elif not all(bool(x.isfinite().all()) for x in tensors):
        why = "has weights or buffers that are not finite"
    elif not any(x.is_floating_point() for x in model.parameters()):
        why = "has no parameters"
    if not why:
        try:
            copy.deepcopy(model)
        except (RuntimeError, TypeError) as error:
            why = f"cannot be copied: {str(error).splitlines()[0]}"
    if why:
        raise ValueError(f"model {spec} {why}")


def digest(model: nn.Module, spec: str) -> str:
    """Of what a model is, in hexadecimal: weights and buffers, layers as they print, and the file that makes it.

    What that file imports from others is not seen.
    """
    found = hashlib.sha256(re.sub("0x[0-9a-f]+", "", repr(model)).encode())
    path = Path(spec.rpartition(":")[0])
    if path.is_file():
        found.update(path.read_bytes())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def build(network: Config, data: ImageData) -> nn.Module:
    """The model of a trial's network, with its weights, all of them to be trained.

    Args:
        network: as `given` makes it.
        data: what it is trained on.

    Raises:
        ValueError: as `given`, or the model is not the one that the trial was planned with.
    """
    model = copy.deepcopy(_checked(network["model"], network["weights"], network["sha256"]))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    own = ways_of(model)
    mean, std = (network.get(name, own.get(name)) for name in ("mean", "std"))
    if mean is not None and std is not None and len(mean) == len(std) == data.channels:
        scale = [float(s) / float(o) for s, o in zip(data.std, std, strict=True)]
        shift = [(float(m) - float(o)) / float(w) for m, o, w in zip(data.mean, mean, std, strict=True)]
        model.register_forward_pre_hook(functools.partial(_normalised_anew, scale, shift))
    elif "mean" in network:
        raise ValueError(f"mean= and std= must have a number for each of {data.channels} channels, got {mean}, {std}")
    return model


@functools.lru_cache(maxsize=1)
def _checked(spec: str, weights: str | None, sha256: str) -> nn.Module:
    model = _loaded(spec, None if weights is None else Path(weights))
    if (found := digest(model, spec)) != sha256:
        raise ValueError(
            f"{spec} is not the model that this run was planned with ({found[:12]}, then {sha256[:12]}): plan it again"
        )
    return model


def ways_of(model: nn.Module) -> dict[str, Any]:
    """How a model of timm says that it takes images (``input_size``, ``mean``, ``std``); empty for others.

    Networks of this library are trained on images normalised by their data set, as studies do.
    """
    if isinstance(model, Network):
        return {}
    return getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}


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
    if not isinstance(made, Tensor):
        raise ValueError(f"model {spec} must return the logits alone, a tensor; got {type(made).__name__}")
    if tuple(made.shape) != (2, len(data.classes)):
        raise ValueError(
            f"model {spec} must make a number for each of the {len(data.classes)} classes of {data.name}, "
            f"{(2, len(data.classes))} of two images; got {tuple(made.shape)}"
        )
