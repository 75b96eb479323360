"""Files of a run that are replaced whole or not at all, and the check that a checkpoint fits its run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfold.train.data import ImageData

_FORMAT = 1  # raise it when the content of a checkpoint changes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; once it is written and on the disk, it takes the place of `path`.

    Whatever happens on the way, `path` holds either its old or its new content.
    """
    temporary = path.with_name(path.name + ".partial")
    yield temporary
    _to_disk(temporary)
    os.replace(temporary, path)
    _to_disk(path.parent)  # the new name must be on the disk too


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers, strings, and lists and dicts of them."""
    with replacing(path) as temporary:
        torch.save({"format": _FORMAT, **state}, temporary)


def load(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of the run that `identity` describes, tensors on the CPU.

    Args:
        path: The file.
        identity: What the run is, by aspect: its recipe, its data; see :func:`fingerprint`.

    Raises:
        ValueError: The file is broken, or of another run; the message names what differs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on broken bytes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the checkpoint {path} cannot be read ({reason}); {restart(path)}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version; {restart(path)}")
    for aspect, wanted in identity.items():
        saved = state["identity"].get(aspect, {})
        differing = [
            f"{name} is {wanted.get(name)!r}, was {saved.get(name)!r}"
            for name in {**saved, **wanted}
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            raise ValueError(
                f"the checkpoint {path} is of another {aspect}: {'; '.join(differing)}. "
                f"Resume with the same {aspect}; {restart(path)}"
            )
    return state


def restart(path: Path) -> str:
    """Return the advice on a checkpoint that cannot be used."""
    return f"to start afresh, delete {path} or choose another folder"


def fingerprint(data: ImageData) -> dict[str, Any]:
    """Return what tells one data set from another: its name, its sizes, and a checksum of each split."""
    checks: dict[str, Any] = {"name": data.name, "classes": len(data.classes)}
    for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        labels, images = (tensor.cpu().contiguous().numpy().data for tensor in (split.labels, split.images))
        checks[name] = [*split.images.shape, zlib.crc32(images, zlib.crc32(labels))]
    return checks


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the weights and buffers of a model as safetensors, whole or not at all."""
    from safetensors.torch import save_model

    with replacing(Path(path)) as temporary:
        save_model(model, str(temporary))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read weights that :func:`save_weights` wrote into a model of the same build, on its device.

    Raises:
        ValueError: The file is missing or broken, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there are no weights at {path}: train a model with out={str(path.parent)!r} first")
    try:
        load_model(model, path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): train or copy it again") from error
    except RuntimeError as error:  # torch's list of keys and shapes that do not fit
        raise ValueError(f"{path} holds the weights of another model: {error}") from error
