"""Files of a run that are replaced whole or not at all, and the check that a checkpoint fits its run.

A checkpoint is a folder of tensors, written by torch's distributed checkpoints, and ``checkpoint.json``, which names
the folder, vouches for its files and holds the rest. A new one goes to the other one of two folders; replacing the
small file, at once, is what makes it count. Whatever number of processes wrote it, any number can read it, whether
they divide the model or each hold all of it. Like every pickle, its index must come from someone you trust.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nearfold.train.data import ImageData
from nearfold.train.distributed import Team

if TYPE_CHECKING:
    from nearfold.train.feed import Streamed

POINTER = "checkpoint.json"
FOLDERS = ("checkpoint-a", "checkpoint-b")
_FORMAT = 2  # raise it when the content of a checkpoint changes


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """Give a name to write to; once it is written and on the disk, it takes the place of `path`.

    Whatever happens on the way, `path` holds either its old or its new content. Where several may write at once, each
    has a name as `writer`.
    """
    temporary = path.with_name(f"{path.name}{writer}.partial")
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


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk, whole and of the right run.

    Attributes:
        path: Its ``checkpoint.json``, for messages.
        folder: Where its tensors are.
        facts: What is not a tensor.
        layout: (shape, type) of every tensor by name.
    """

    path: Path
    folder: Path
    facts: dict[str, Any]
    layout: dict[str, tuple[torch.Size, torch.dtype]]


def exists(out: Path) -> bool:
    """Return whether a run's folder holds a checkpoint."""
    return (out / POINTER).exists() or (out / "checkpoint.pt").exists()


def save(out: Path, identity: dict[str, Any], facts: dict[str, Any], tensors: dict[str, Any], team: Team) -> None:
    """Write a checkpoint in the place of the last one; all processes must call this.

    Args:
        out: The run's folder.
        identity: What the run is, by aspect: its recipe, its data; see :func:`fingerprint`.
        facts: Whatever JSON can hold.
        tensors: By name; of a divided tensor every process writes its part, of any other one process all.
        team: The processes.

    Raises:
        OSError: It cannot be written; the last checkpoint is as it was.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    path = out / POINTER
    current = json.loads(path.read_bytes())["folder"] if team.leads and path.exists() else None
    current = team.gather(current)[0]
    folder = out / next(name for name in FOLDERS if name != current)
    problem = ""
    files: dict[str, list[int]] = {}
    try:
        if team.leads:
            shutil.rmtree(folder, ignore_errors=True)  # what a process that died has left
        team.wait()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: as meant
            dcp.save(tensors, storage_writer=_writer(folder), no_dist=team.world == 1)
        own = [*folder.glob(f"__{team.rank}_*"), *([folder / ".metadata"] if team.leads else [])]
        files = {file.name: _check(file) for file in own}
    except CheckpointException as error:
        problem = _reason(error)
    except OSError as error:
        problem = str(error)
    found = team.gather((problem, files))
    problem = next((problem for problem, _ in found if problem), "")
    if team.leads and not problem:
        try:
            _to_disk(folder)
            merged = {name: check for _, files in found for name, check in files.items()}
            content = {"format": _FORMAT, "folder": folder.name, "files": merged, "identity": identity, "facts": facts}
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        except OSError as error:
            problem = str(error)
    problem = team.gather(problem)[0]
    superseded = folder if problem else out / current if current else None
    if team.leads and superseded:
        shutil.rmtree(superseded, ignore_errors=True)
    if problem:
        kept = "the last one is kept" if current else "there is none yet"
        raise OSError(
            f"no checkpoint could be written to {out} ({problem}); {kept}: make room or mend that, and resume the run"
        )


def read(out: Path, identity: dict[str, Any], team: Team) -> Saved | None:
    """Find the checkpoint of the run that `identity` describes; None if there is none. All processes must call this.

    Raises:
        ValueError: It is broken, or of another run; the message names what differs.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = out / POINTER
    if not path.exists():
        if exists(out):
            raise ValueError(f"{out / 'checkpoint.pt'} is no checkpoint of this version; {restart(out)}")
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"the checkpoint {path} cannot be read ({error}); {restart(path)}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version; {restart(path)}")
    for aspect, wanted in identity.items():
        saved = content["identity"].get(aspect, {})
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
    folder = out / content["folder"]
    mine = list(content["files"].items())[team.rank :: team.world]  # every file is read by one process
    broken = [f"{folder / name} {damage}" for name, check in mine if (damage := _damage(folder / name, check))]
    problems = [problem for theirs in team.gather(broken) for problem in theirs]
    if problems:
        raise ValueError(f"the checkpoint {path} cannot be read ({problems[0]}); {restart(path)}")
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    layout = {n: (e.size, e.properties.dtype) for n, e in entries if isinstance(e, TensorStorageMetadata)}
    return Saved(path, folder, content["facts"], layout)


def load(saved: Saved, tensors: dict[str, Any], team: Team) -> None:
    """Fill tensors with those of a checkpoint, whoever wrote which part of them; all processes must call this."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(saved.folder), no_dist=team.world == 1)


def _check(file: Path) -> list[int]:
    """The size of a file, and a checksum of its content."""
    size = check = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            size, check = size + len(chunk), zlib.crc32(chunk, check)
    return [size, check]


def _damage(file: Path, check: list[int]) -> str:
    """What is wrong with a file; nothing: an empty text."""
    if not file.is_file():
        return "is missing"
    return "" if _check(file) == check else "is damaged"


def _writer(folder: Path) -> Any:
    """torch's writer to a folder, but one that tells why the system refused to write."""
    import torch.distributed.checkpoint as dcp

    class Writer(dcp.FileSystemWriter):
        def write_data(self, *arguments: Any) -> Any:
            try:
                return super().write_data(*arguments)
            except Exception as error:  # torch's serialisation stumbles over the system's error, and raises its own
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__cause__ or cause.__context__
                raise cause or error from None

    return Writer(folder, sync_files=True)


def _reason(error: Any) -> str:
    """What went wrong first in a collective of torch's checkpoints, in one line."""
    cause = next(iter(error.failures.values()))[0]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def restart(path: Path) -> str:
    """Return the advice on a checkpoint that cannot be used."""
    return f"to start afresh, delete {path} or choose another folder"


def fingerprint(data: ImageData | Streamed) -> dict[str, Any]:
    """Return what tells one data set from another, whatever its folder is called: sizes, a checksum of each split."""
    if not isinstance(data, ImageData):
        return data.fingerprint()
    checks: dict[str, Any] = {"classes": len(data.classes)}
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
