"""Converted models in folders: the operations in ``config.json``, all weights in ``model.safetensors``."""

from __future__ import annotations

import json
import operator
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import Operation, parse
from nearfold.lower.parameters import Parameter
from nearfold.nn.mixer import Mixer
from nearfold.recognise.foreign import count
from nearfold.surgery.build import new_mixer, row_of, standing
from nearfold.surgery.report import Change, Report
from nearfold.surgery.sites import Site, at, sites

CONFIG, WEIGHTS, FORMAT = "config.json", "model.safetensors", "nearfold-converted-1"
LARGEST_CONFIG = 1 << 24  # bytes


def save_converted(model: nn.Module, report: Report, folder: str | os.PathLike[str]) -> None:
    """Write a converted model to a folder, which is made where there is none; `load_converted` reads it.

    Args:
        model: that `convert` changed, trained or not; layers that a schedule moved are saved where they are.
        report: of that `convert`.
        folder: for ``config.json`` (the operations by layer) and ``model.safetensors`` (weights and buffers).

    Raises:
        ValueError: when the new layers are not in the model, or its state cannot be written.

    >>> import tempfile
    >>> from nearfold.surgery import Rule, convert
    >>> fresh = lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    >>> model, other = fresh(), fresh()
    >>> report = convert(model, Rule("({self}) + near*(nearest(9, cosine, self) | ranked | kernel)"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_converted(model, report, folder)
    ...     loaded = load_converted(other, folder)
    >>> x = torch.randn(1, 3, 8, 8)
    >>> torch.equal(other(x), model(x)), loaded.replaced[0].to == report.replaced[0].to
    (True, True)
    """
    from safetensors.torch import save_model

    there = set(model.modules())
    if not report.standing or not all(change.new in there for change in report.standing):
        raise ValueError("the report's new layers are not in this model: convert it, or report.apply()")
    layers = []
    for change in report.standing:
        assert change.new is not None
        mixer = next(m for m in change.new.modules() if isinstance(m, Mixer))
        row = change.row
        layers.append(
            {
                "name": row.name,
                "class": row.layer,
                "was": row.operation,
                "operation": str(mixer.operation),
                "room": {name: [list(spec.shape), spec.init, spec.fan_in] for name, spec in mixer.room.items()},
                "frozen": [name for name, parameter in mixer.named_parameters() if not parameter.requires_grad],
                "draws": mixer.sampler is not None,
                "grade": row.grade,
                "reason": row.reason,
            }
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "model": type(model).__name__, "layers": layers}
    try:
        save_model(model, str(path / f"{WEIGHTS}.new"), metadata={"format": "pt"})
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        (path / f"{WEIGHTS}.new").unlink(missing_ok=True)
        raise ValueError(f"the state of {type(model).__name__} cannot be written as safetensors: {error}") from error
    (path / f"{CONFIG}.new").write_text(json.dumps(config, indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        os.replace(path / f"{name}.new", path / name)


@torch.no_grad()
def load_converted(model: nn.Module, folder: str | os.PathLike[str]) -> Report:
    """Convert a freshly built model as the saved one was, and load its weights.

    Args:
        model: the original architecture, unconverted, in the saved dtype; changed in place.
        folder: that `save_converted` wrote.

    Returns:
        The report; ``undo()`` puts the model's own layers back, as they were.

    Raises:
        ValueError: for a folder or file that is missing, damaged or of another model. The model is then as it was.
    """
    path = Path(folder)
    config, state = _config(path / CONFIG), _weights(path / WEIGHTS)
    try:
        changes = _changes(model, config, state)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / CONFIG} is not what save_converted writes: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from error
    report = Report(model, tuple(changes), {})
    report.apply()
    try:
        _load(model, state, path / WEIGHTS)
    except BaseException:
        report.undo()
        raise
    return report


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is not there; save_converted writes {CONFIG} and {WEIGHTS}")
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; save_converted writes no such file")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} is not of the format {FORMAT}, which save_converted writes")
    return config


def _weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path} is not there; save_converted writes {CONFIG} and {WEIGHTS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): copy it again") from error


def _changes(model: nn.Module, config: dict[str, Any], state: dict[str, Tensor]) -> list[Change]:
    """The new layers, as the file has them; nothing is allocated that is not in the weights' file."""
    known = {site.name: site for site in sites(model) if isinstance(site, Site)}
    names = {module: name for name, module in model.named_modules()}
    changes = []
    for layer in config["layers"]:
        site = known.get(layer["name"])
        if site is None or layer["class"] != type(site.module).__name__:
            raise ValueError(f"{layer['name']} is no {layer['class']} of {type(model).__name__} that can be replaced")
        site = at(site, _called(site, parse(layer["was"])), None)
        op, room = parse(layer["operation"]), _room(layer["room"])
        where = names[site.place]
        for name, spec in room.items():
            sizes = [tuple(t.shape) for key, t in state.items() if key.startswith(where) and key.endswith(f".{name}")]
            if spec.shape not in sizes:
                raise ValueError(f"{layer['name']}: {name} of shape {spec.shape} is not among the weights")
        like = next(iter(site.source.tensors.values()))
        with torch.device("meta"):
            mixer = new_mixer(site, op)
        for name, spec in mixer.room.items():
            if (
                name not in room
                or len(room[name].shape) != len(spec.shape)
                or any(map(operator.lt, room[name].shape, spec.shape))
            ):
                raise ValueError(f"{layer['name']}: {op} needs {name} of shape {spec.shape}, which is not there")
        mixer.hold(room)
        mixer.to_empty(device=like.device).to(like.dtype)
        for name in layer["frozen"]:
            mixer.get_parameter(name).requires_grad_(False)
        if layer["draws"] and mixer.sampler is None:
            mixer.sampler = torch.zeros(2, dtype=torch.int64, device=like.device)
        row = row_of(
            site.name, site.module, "replaced", str(layer["reason"]), site,
            to=str(op), grade=str(layer["grade"]), parameters_after=count(mixer),
        )  # fmt: skip
        changes.append(Change(row, site.place, standing(site, mixer)))
    return changes


def _called(site: Site, was: Operation) -> Operation:
    """The layer's operation, which a call may have shown to be another one between the same weights."""
    if type(was) is not type(site.operation):
        raise ValueError(f"{site.name} was {was}, and is {site.operation} here")
    return was


def _room(given: dict[str, Any]) -> dict[str, Parameter]:
    room = {}
    for name, (shape, init, fan_in) in given.items():
        if not all(type(n) is int and n > 0 for n in (*shape, fan_in)) or not isinstance(init, str):
            raise ValueError(f"{name}: {shape}, {init}, {fan_in} is no parameter")
        room[name] = Parameter(tuple(shape), init, fan_in)
    return room


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load all weights, after everything has been looked at."""
    own = model.state_dict()
    shared = {t.untyped_storage().data_ptr() for name, t in own.items() if name in state and not t.is_meta}
    for name, t in own.items():  # of tied weights one name is in the file
        if name not in state and (t.is_meta or t.untyped_storage().data_ptr() not in shared):
            raise ValueError(f"{path} lacks {name}: it is of another model")
    for name, t in state.items():
        if name not in own:
            raise ValueError(f"{path} has {name}, which {type(model).__name__} has not: it is of another model")
        if (own[name].shape, own[name].dtype) != (t.shape, t.dtype):
            raise ValueError(
                f"{path}: {name} is {tuple(t.shape)} {t.dtype}, and in this model {tuple(own[name].shape)} "
                f"{own[name].dtype}"
            )
    model.load_state_dict(state, strict=False)
