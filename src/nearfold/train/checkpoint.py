"""The checkpoint of a run: written whole or not at all, and read only where it fits the run.

A checkpoint is a folder of tensors, written by torch's distributed checkpoints, and ``checkpoint.json``, which names
the folder, vouches for its files and holds the rest. A new one goes to the other one of two folders; replacing the
small file, at once, is what makes it count. Whatever number of processes wrote it, any number can read it, whether
they divide the model or each hold all of it. Whoever wrote it: nothing of it is run, and no name in it leads out of the
run's folder.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nearfold._images import first_line
from nearfold.train import index
from nearfold.train.data import ImageData
from nearfold.train.distributed import Team
from nearfold.train.files import inside, is_own_file, replacing, to_disk

if TYPE_CHECKING:
    from nearfold.train.feed import Streamed

POINTER = "checkpoint.json"
MADE_FROM = "network"
"""The aspect of a run that not every checkpoint has."""
FOLDERS = ("checkpoint-a", "checkpoint-b")
_FORMAT = 3  # raise it when the content of a checkpoint changes
_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk, whole and of the right run.

    Attributes:
        path: Its ``checkpoint.json``, for messages.
        folder: Where its tensors are.
        facts: What is not a tensor.
        index: Of its tensors, as torch has it.
    """

    path: Path
    folder: Path
    facts: dict[str, Any]
    index: Any

    @property
    def layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """(shape, type) of every tensor by name."""
        entries = self.index.state_dict_metadata.items()
        return {name: (entry.size, entry.properties.dtype) for name, entry in entries}

    def unusable(self, why: object) -> ValueError:
        """Return the error that says that the checkpoint cannot be used, and what to do."""
        return ValueError(f"the checkpoint {self.path} cannot be read ({why}); {restart(self.path)}")


@dataclass(frozen=True)
class _Pointer:
    """What ``checkpoint.json`` says, once its types are checked and its names found to be those of a checkpoint."""

    folder: str
    files: dict[str, list[int]]
    identity: dict[str, dict[str, Any]]
    facts: dict[str, Any]


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

    path = out / POINTER
    current = _pointer(path).folder if team.leads and path.exists() else None
    current = team.gather(current)[0]
    folder = out / next(name for name in FOLDERS if name != current)
    problem = ""
    files: dict[str, list[int]] = {}
    try:
        if team.leads:
            _remove(folder)  # what a process that died has left
        team.wait()
        with _torchs_errors():
            dcp.save(tensors, storage_writer=_writer(folder), no_dist=team.world == 1)
        own = [*folder.glob(f"__{team.rank}_*"), *([folder / index.NAME] if team.leads else [])]
        files = {file.name: _check(file) for file in own}
    except Exception as error:
        problem = first_line(error)
    found = team.gather((problem, files))
    problem = next((problem for problem, _ in found if problem), "")
    if team.leads and not problem:
        try:
            to_disk(folder)
            merged = {name: check for _, files in found for name, check in files.items()}
            content = {"format": _FORMAT, "folder": folder.name, "files": merged, "identity": identity, "facts": facts}
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        except OSError as error:
            problem = str(error)
    problem = team.gather(problem)[0]
    superseded = folder if problem else out / current if current else None
    if team.leads and superseded:
        _remove(superseded)
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
    path = out / POINTER
    if not path.is_symlink() and not path.exists():
        if exists(out):
            raise ValueError(f"{out / 'checkpoint.pt'} is no checkpoint of this version; {restart(out)}")
        return None
    content = _pointer(path)
    for aspect, wanted in identity.items():
        if aspect == MADE_FROM and aspect not in content.identity:  # of a run of which it was not said
            continue
        saved = content.identity.get(aspect, {})
        now, was = ({name: repr(value) for name, value in facts.items()} for facts in (wanted, saved))
        require_same(aspect, path, differing(now, was, absent="None"))
    found = Saved(path, out / content.folder, content.facts, None)
    mine = list(content.files.items())[team.rank :: team.world]  # every file is read by one process
    folder = found.folder
    broken = [f"{folder / name} {damage}" for name, check in mine if (damage := _damage(out, folder / name, check))]
    problems = [problem for theirs in team.gather(broken) for problem in theirs]
    if problems:
        raise found.unusable(problems[0])
    try:
        entries = index.read(folder, {name: size for name, (size, _) in content.files.items()})
    except ValueError as error:
        raise found.unusable(error) from error
    return Saved(path, folder, content.facts, entries)


def load(saved: Saved, tensors: dict[str, Any], team: Team) -> None:
    """Fill tensors with those of a checkpoint, whoever wrote which part of them; all processes must call this.

    Raises:
        ValueError: A file does not hold what the index says.
    """
    import torch.distributed.checkpoint as dcp

    for name, value in tensors.items():
        if name not in saved.layout or saved.layout[name][0] != value.shape:
            raise saved.unusable(f"{name} is not there, or not {tuple(value.shape)}")

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return saved.index

    try:
        with _torchs_errors():
            dcp.load(tensors, storage_reader=Reader(saved.folder), no_dist=team.world == 1)
    except Exception as error:  # the files are those that were written: it was wrong bytes that were vouched for
        raise saved.unusable(first_line(error)) from error


def differing(now: Mapping[str, Any], was: Mapping[str, Any], absent: str = "not there") -> list[str]:
    """Return in which names two mappings differ, and how."""
    return [
        f"{name} is {now.get(name, absent)}, was {was.get(name, absent)}"
        for name in {**was, **now}
        if now.get(name, absent) != was.get(name, absent)
    ]


def require_same(aspect: str, path: Path, differing: list[str]) -> None:
    """Raise the ValueError that a checkpoint is of a run that differs in an aspect, where it does so."""
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    if differing:
        raise ValueError(
            f"the checkpoint {path} is of another {aspect}: {'; '.join(differing[:5])}{more}. "
            f"Resume with the same {aspect}; {restart(path)}"
        )


def _pointer(path: Path) -> _Pointer:
    """Read a ``checkpoint.json``; ValueError where it is none."""
    if not is_own_file(path):
        raise ValueError(f"{path} is a link, a folder or a pipe, and no checkpoint; {restart(path)}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the checkpoint {path} cannot be read ({error}); {restart(path)}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version; {restart(path)}")
    folder, files, identity, facts = (content.get(name) for name in ("folder", "files", "identity", "facts"))
    wrong = [
        name
        for name, holds in (
            ("folder", folder in FOLDERS),
            ("files", isinstance(files, dict) and index.NAME in files and all(map(_is_file, files.items()))),
            ("identity", isinstance(identity, dict) and all(isinstance(value, dict) for value in identity.values())),
            ("facts", isinstance(facts, dict)),
        )
        if not holds
    ]
    if wrong:
        raise ValueError(f"the checkpoint {path} cannot be read (wrong {wrong[0]}); {restart(path)}")
    return _Pointer(folder, files, identity, facts)  # type: ignore[arg-type]


def _is_file(item: tuple[str, Any]) -> bool:
    """Whether an entry of ``files`` is a name that torch gives, with a size and a checksum."""
    name, check = item
    numbers = isinstance(check, list) and len(check) == 2 and all(type(n) is int and n >= 0 for n in check)
    return bool(_FILE.fullmatch(name)) and numbers


def _remove(folder: Path) -> None:
    """Remove one of the two folders; where somebody has put a link in its place, the link."""
    assert folder.name in FOLDERS, folder
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _check(file: Path) -> list[int]:
    """The size of a file, and a checksum of its content."""
    size = check = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            size, check = size + len(chunk), zlib.crc32(chunk, check)
    return [size, check]


def _damage(out: Path, file: Path, check: list[int]) -> str:
    """What is wrong with a file; nothing: an empty text."""
    inside(out, file)
    if not file.exists():
        return "is missing"
    return "" if is_own_file(file) and _check(file) == check else "is damaged"


def _writer(folder: Path) -> Any:
    """torch's writer to a folder, but one that tells the other processes why the system refused to write."""
    import torch.distributed.checkpoint as dcp

    class Writer(dcp.FileSystemWriter):
        def write_data(self, *arguments: Any) -> Any:
            with _torchs_errors():
                return super().write_data(*arguments)

    return Writer(folder, sync_files=True)


@contextmanager
def _torchs_errors() -> Iterator[None]:
    """Raise what went wrong first.

    Torch's collectives wrap even an interruption, and its serialisation raises its own error over the system's.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: as meant
            yield
    except (CheckpointException, Exception) as error:
        causes = _causes(error)
        for kind in (KeyboardInterrupt, SystemExit, OSError, Exception):
            cause = next((cause for cause in causes if isinstance(cause, kind)), None)
            if cause is error:
                raise
            if cause is not None:
                raise cause from None
        raise


def _causes(error: BaseException) -> list[BaseException]:
    """An exception, those that it holds of other processes, and what each came from."""
    causes = [error]
    for cause in causes:  # which grows
        held = (held for held, _ in getattr(cause, "failures", {}).values())
        causes += [c for c in (*held, cause.__cause__, cause.__context__) if c is not None and c not in causes]
    return causes


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
