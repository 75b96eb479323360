"""What `nearfold describe` does: find a model by name or in a file, and describe it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from nearfold import _torchvision
from nearfold.options import line, sizes
from nearfold.recognise import configured
from nearfold.recognise.report import Description, describe


def run(spec: str, input_size: tuple[int, ...] | None = None) -> str:
    """The description of a model as text.

    Args:
        spec: as `load_model` takes it.
        input_size: channels and grid; without it a timm model is run on the size it was made for, one of
            transformers on pixels, ids or sound as it takes them, and others are not run.

    Raises:
        ValueError: as `load_model` and `describe` do.
    """
    where, _, name = spec.rpartition(":")
    if where == "transformers" and input_size is None:
        small = f"transformers:{name} in a small configuration: layers of the same kinds, fewer and narrower"
        return f"{described(name)}\n{small}"
    model = load_model(spec)
    if input_size is None:
        input_size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    return str(describe(model, None if input_size is None else tuple(input_size)))


def described(name: str) -> Description:
    """The first of the sizes and inputs of a model of transformers on which it runs."""
    errors = []
    for model in configured.models(_transformers(), name):
        for inputs in configured.inputs(model):
            try:
                return describe(model, inputs=inputs)
            except ValueError as error:
                errors.append(error)
    raise ValueError(f"transformers:{name}: {errors[0]}; describe it without a run from a file") from errors[0]


def parse_size(text: str) -> tuple[int, ...]:
    """Channels and grid, from C,H,W.

    >>> parse_size("3,224,224"), parse_size("16x100")
    ((3, 224, 224), (16, 100))
    """
    try:
        return sizes(text, 2, "channels and grid, such as 3,224,224")
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


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


def _transformers() -> ModuleType:
    with contextlib.suppress(ImportError):  # which some of its models import
        import_library("torchvision", "transformers")
    return import_library("transformers", "transformers")


def _from_transformers(name: str) -> nn.Module:
    return next(configured.models(_transformers(), name))


SOURCES: dict[str, Callable[[str], nn.Module]] = {
    "timm": _from_timm, "torchvision": _from_torchvision, "transformers": _from_transformers,
}  # fmt: skip


def _built(spec: str, name: str, known: list[str], make: Callable[[], Any]) -> Any:
    if name.partition(".")[0] not in known:  # timm: a tag of weights may follow
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(f"{spec}: no model of this name{hint}")
    return guarded(spec, make)


def _from_file(path: Path, name: str) -> Any:
    spec = f"{path}:{name}"
    if not path.is_file():
        raise ValueError(f"{spec}: there is no file {path}")
    plan = importlib.util.spec_from_file_location(f"nearfold_described_{path.stem}", path)
    if plan is None or plan.loader is None:
        raise ValueError(f"{spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(plan)
    sys.modules[plan.name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.parent))  # so that it finds its neighbours, as when it is run
    try:
        guarded(spec, lambda: plan.loader.exec_module(module))  # type: ignore[union-attr]
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
    finally:
        sys.path.remove(str(path.parent))


def guarded(spec: str, make: Callable[[], Any]) -> Any:
    """What a user's own code makes; ValueError that names the code, whatever it raises."""
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{spec}: {type(error).__name__}: {line(error)}") from error


def import_library(name: str, wanted: str) -> ModuleType:
    """Import a library; torchvision also where its compiled operators do not fit this torch, as models need few."""
    try:
        return _torchvision.load(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{wanted} models need {error.name}: pip install {error.name}") from error
