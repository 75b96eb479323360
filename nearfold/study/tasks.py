"""What a run does: everything it needs is in its configuration, so it can be done in any process on any machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfold.models import PlainNet, SpectrumNet, create, stem_stride
from nearfold.study.measure import measure
from nearfold.train import ImageData, Recipe, fit, load_data, prepare, save_weights
from nearfold.train.checkpoint import fingerprint
from nearfold.train.distributed import join

Config = Mapping[str, Any]
Sources = Mapping[str, str]
"""Folder by name of a data set."""

KEPT = (
    "train_accuracy", "train_accuracy_last", "val_accuracy", "test_accuracy", "test_accuracy_last", "train_loss",
    "best_epoch", "epochs", "steps", "seconds", "images_per_second", "history",
)  # fmt: skip
"""What a finished run keeps of `nearfold.train.Result`."""

SMALL: dict[str, Callable[..., nn.Module]] = {"spectrum": SpectrumNet, "plain": PlainNet}
"""The networks around one operation, besides those of `nearfold.models.list_models`."""


@functools.lru_cache(maxsize=4)
def load(source: str, limit: int | None, validation: float, image_size: int | None) -> ImageData:
    """A data set, loaded once a process."""
    return load_data(source, limit=limit, validation=validation, image_size=image_size)


_fingerprint = functools.lru_cache(maxsize=4)(fingerprint)  # reads every image


def data_of(config: Config, sources: Sources) -> ImageData:
    """The data of a run.

    Raises:
        ValueError: nobody said where it is, or what is there is not what the run was planned with.
    """
    asked = config["data"]
    data = load(source_of(asked["name"], sources), asked["limit"], asked["validation"], asked["image_size"])
    if (found := _fingerprint(data)) != asked["fingerprint"]:
        raise ValueError(
            f"the data set {asked['name']!r} is not the one that this run was planned with: {found} instead of "
            f"{asked['fingerprint']}; plan it again, or point --data at the same files"
        )
    return data


def source_of(name: str, sources: Sources) -> str:
    """Where a data set is.

    Raises:
        ValueError: nobody said.
    """
    if name != "digits" and name not in sources:
        raise ValueError(f"where is the data set {name!r}? Say it: --data {name}=FOLDER")
    return sources.get(name, name)


def build(network: Config, data: ImageData) -> nn.Module:
    """The network of a run, freshly initialised from torch's generator."""
    arguments = dict(network)
    name = arguments.pop("name")
    if name in SMALL:
        arguments.setdefault("stride", stem_stride(data.size))
        return SMALL[name](arguments.pop("operation"), data.channels, len(data.classes), **arguments)
    return create(name, num_classes=len(data.classes), in_chans=data.channels, img_size=data.size, **arguments)


def train(config: Config, sources: Sources, weights: Path | None, work: Path | None) -> dict[str, Any]:
    """Train a network, from its last checkpoint in the folder `work` if there is one."""
    data = data_of(config, sources)
    recipe = Recipe.from_dict(config["recipe"])
    torch.manual_seed(recipe.seed)
    model = build(config["network"], data)
    done = fit(model, data, recipe, progress=False, out=work, resume=work is not None)
    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, weights)
    return {name: getattr(done, name) for name in KEPT}


def cost(config: Config, sources: Sources, weights: Path | None, work: Path | None) -> dict[str, Any]:
    """Measure what a network costs."""
    data = data_of(config, sources)
    recipe = Recipe.from_dict(config["recipe"])
    device = join(recipe.device).device
    torch.manual_seed(0)
    rows = slice(recipe.batch_size)
    images = prepare(data.train.images[rows].to(device), data)
    return asdict(measure(build(config["network"], data).to(device), images, data.train.labels[rows].to(device)))


TASKS: dict[str, Callable[[Config, Sources, Path | None, Path | None], dict[str, Any]]] = {"train": train, "cost": cost}
"""(configuration, sources, where selected weights go if they are kept, folder for checkpoints) -> result, as JSON."""
