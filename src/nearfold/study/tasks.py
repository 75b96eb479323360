"""What a run does: everything it needs is in its configuration, so it can be done in any process on any machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfold.models import PlainNet, SpectrumNet, create, stem_stride
from nearfold.study import given, surgery
from nearfold.study.grid import Data
from nearfold.study.measure import measure
from nearfold.train import ImageData, Recipe, StreamData, begin, fit, load_data, open_data, prepare, save_weights
from nearfold.train.checkpoint import fingerprint
from nearfold.train.data import comes_along
from nearfold.train.distributed import join

Config = Mapping[str, Any]
Sources = Mapping[str, str]
"""Folder by name of a data set."""

KEPT = (
    "train_accuracy", "train_accuracy_last", "val_accuracy", "test_accuracy", "test_accuracy_last", "train_loss",
    "best_epoch", "epochs", "steps", "seconds", "images_per_second", "history",
)  # fmt: skip
"""What a finished run keeps of `nearfold.train.Result`."""


@dataclass(frozen=True)
class Place:
    """Where runs find what they need and leave what they find; the same for every process.

    Attributes:
        root: of the store.
        sources: folder by name of a data set.
        resumable: keep checkpoints, so that a killed run goes on where it was.
        workers: processes of a run that read ahead, where data are streamed.
    """

    root: Path
    sources: Sources
    resumable: bool = False
    workers: int = 0


SMALL: dict[str, Callable[..., nn.Module]] = {"spectrum": SpectrumNet, "plain": PlainNet}
"""The networks around one operation, besides those of `nearfold.models.list_models`."""


@functools.lru_cache(maxsize=4)
def load(source: str, data: Data) -> ImageData | StreamData:
    """A data set, loaded once a process."""
    if data.stream:
        assert data.image_size is not None, data
        return open_data(source, image_size=data.image_size, validation=data.validation)
    return load_data(
        source, limit=data.limit, test_limit=data.test_limit, validation=data.validation, image_size=data.image_size
    )


_fingerprint = functools.lru_cache(maxsize=4)(fingerprint)  # reads every image


def data_of(config: Config, sources: Sources) -> ImageData | StreamData:
    """The data of a run.

    Raises:
        ValueError: nobody said where it is, or what is there is not what the run was planned with.
    """
    asked = Data(**{name: value for name, value in config["data"].items() if name != "fingerprint"})
    data = load(source_of(asked.name, sources), asked)
    if (found := _fingerprint(data)) != (planned := config["data"]["fingerprint"]):
        raise ValueError(
            f"the data set {asked.name!r} is not the one that this run was planned with: {found} instead of "
            f"{planned}; plan it again, or point --data at the same files"
        )
    return data


def source_of(name: str, sources: Sources) -> str:
    """Where a data set is.

    Raises:
        ValueError: nobody said.
    """
    if not comes_along(name) and name not in sources:
        raise ValueError(f"where is the data set {name!r}? Say it: --data {name}=FOLDER")
    return sources.get(name, name)


def build(network: Config, data: ImageData | StreamData) -> nn.Module:
    """The network of a run: freshly initialised from torch's generator, or as trained, layers exchanged."""
    if network["name"] == given.GIVEN:
        assert isinstance(data, ImageData), "a network of the user's is trained on data that are held in memory"
        model = given.build(network, data)
        surgery.operate(model, network, (data.channels, *data.size))
        return model
    arguments = surgery.arguments(network)
    name = arguments.pop("name")
    if name in SMALL:
        arguments.setdefault("stride", stem_stride(data.size))
        return SMALL[name](arguments.pop("operation"), data.channels, len(data.classes), **arguments)
    model = create(name, num_classes=len(data.classes), in_chans=data.channels, img_size=data.size, **arguments)
    surgery.operate(model, network, (data.channels, *data.size))
    return model


def train(config: Config, place: Place, weights: Path | None, work: Path | None) -> dict[str, Any]:
    """Train a network, from its last checkpoint in the folder `work` if there is one."""
    data = data_of(config, place.sources)
    recipe = Recipe.from_dict(config["recipe"])
    torch.manual_seed(recipe.seed)
    model = build(config["network"], data)
    if not config["network"].get(surgery.TRAINED) and config["network"]["name"] != given.GIVEN:
        begin(model, data)
    images = len(data.splits["train"] if isinstance(data, StreamData) else data.train)
    steps = recipe.epochs * max(1, images // recipe.batch_size)
    done = fit(
        model, data, recipe, progress=False, out=work, resume=work is not None, workers=place.workers,
        schedule=surgery.walk(model, config["network"], steps),
    )  # fmt: skip
    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, weights)
    return {name: getattr(done, name) for name in KEPT}


def cost(config: Config, place: Place, weights: Path | None, work: Path | None) -> dict[str, Any]:
    """Measure what a network costs."""
    data = data_of(config, place.sources)
    recipe = Recipe.from_dict(config["recipe"])
    device = join(recipe.device).device
    torch.manual_seed(0)
    if not isinstance(data, ImageData):
        raise ValueError(f"{data.name} is read while training: costs are measured on data that are held in memory")
    rows = slice(recipe.batch_size)
    images = prepare(data.train.images[rows].to(device), data)
    model = build(config["network"], data)
    surgery.arrive(model, config["network"])
    return asdict(measure(model.to(device), images, data.train.labels[rows].to(device)))


TASKS: dict[str, Callable[[Config, Place, Path | None, Path | None], dict[str, Any]]] = {"train": train, "cost": cost}
"""(configuration, sources, where selected weights go if they are kept, folder for checkpoints) -> result, as JSON."""
