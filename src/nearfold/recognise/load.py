"""A model by its name in a library, or from a file."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from nearfold import _torchvision
from nearfold._own_code import executed, guarded
from nearfold.options import meant
from nearfold.recognise import configured


def load_model(spec: str) -> nn.Module:
    """A model with fresh weights.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, ``transformers:NAME`` (a model's class, a configuration's or a
            type, made small), or ``path/to/file.py:factory``, a callable without arguments.

    Raises:
        ValueError: when there is no such thing, or it is no model; the message says what there is instead.
        ImportError: when that library is not installed.

    >>> load_model("resnet50")
    Traceback (most recent call last):
    ValueError: a model is given as timm:NAME, ... or path/to/file.py:factory; got 'resnet50'
    """
    where, colon, name = spec.rpartition(":")
    if not (colon and where and name):
        known = ", ".join(f"{source}:NAME" for source in SOURCES)
        raise ValueError(f"a model is given as {known} or path/to/file.py:factory; got {spec!r}")
    made = SOURCES[where](name) if where in SOURCES else _from_file(Path(where), name)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{spec} must return an nn.Module, got {type(made).__name__}")
    return made


def _from_timm(name: str) -> nn.Module:
    import_library("torchvision", "timm")
    timm = import_library("timm", "timm")
    return _built(f"timm:{name}", name, timm.list_models(), lambda: timm.create_model(name, pretrained=False))


def _from_torchvision(name: str) -> nn.Module:
    import_library("torchvision", "torchvision")
    models = importlib.import_module("torchvision.models")

    def make() -> Any:
        builder = models.get_model_builder(name)  # some would fetch the weights of their backbone
        names = ("weights", "weights_backbone")
        return builder(**{n: None for n in names if n in inspect.signature(builder).parameters})

    return _built(f"torchvision:{name}", name, models.list_models(), make)


def transformers_library() -> ModuleType:
    """The library transformers; ImportError, which says what to install, where it is not there."""
    with contextlib.suppress(ImportError):  # which some of its models import
        import_library("torchvision", "transformers")
    return import_library("transformers", "transformers")


SOURCES: dict[str, Callable[[str], nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": lambda name: next(configured.models(transformers_library(), name)),
}


def _built(spec: str, name: str, known: list[str], make: Callable[[], Any]) -> Any:
    if name.partition(".")[0] not in known:  # timm: a tag of weights may follow
        raise ValueError(f"{spec}: no model of this name{meant(name, known, 5)}")
    return guarded(spec, make)


def _from_file(path: Path, name: str) -> Any:
    spec = f"{path}:{name}"
    with executed(path, spec) as module:
        factory = getattr(module, name, None)
        if factory is None:
            found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ValueError(
                f"{spec}: {path} has no {name!r}; it has: {', '.join(found) or 'nothing that can be called'}"
            )
        if isinstance(factory, nn.Module) or not callable(factory):
            raise ValueError(
                f"{spec}: {name} must be a callable without arguments that makes a model, got {type(factory).__name__}"
            )
        return guarded(spec, factory)


def import_library(name: str, wanted: str) -> ModuleType:
    """Import a library; torchvision also where its compiled operators do not fit this torch, as models need few."""
    try:
        return _torchvision.load(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{wanted} models need {error.name}: pip install {error.name}") from error
