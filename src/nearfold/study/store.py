"""Results of single runs on disk: one JSON file a run, named after a hash of everything that decides it.

A finished run lies under `runs/`, written in one step, and is never run again. A failed run leaves its error
under `failed/`; it counts as not done. Whoever does a run holds its claim under `claims/` meanwhile, a lock that ends
with the process, however it ends: several engines may work on one store. All may be deleted by hand at any time when
nobody works on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfold.study.checked import checked
from nearfold.train.checkpoint import replacing
from nearfold.train.readers import first_line


def run_key(config: Mapping[str, Any]) -> str:
    """Sixteen hex digits that name a configuration; the order of its fields does not matter.

    >>> run_key({"lr": 0.1, "seed": 0}) == run_key({"seed": 0, "lr": 0.1})
    True
    """
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_whole(path: Path, content: str) -> None:
    """Write a text file, and its folder, so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, f".{socket.gethostname()}-{os.getpid()}") as temporary:
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def write_each(contents: Mapping[Path, Callable[[], str]]) -> list[Path]:
    """Make and write files one after the other: where one cannot be made, those before it are there.

    Args:
        contents: what makes the content, by path.

    Returns:
        The paths.

    Raises:
        ValueError: a content cannot be made; the message says which, and that no result is lost by it.
    """
    for path, make in contents.items():
        try:
            content = make()
        except Exception as error:  # whatever a drawing, or a study's own function, dies of
            raise ValueError(
                f"{path} could not be made, and every result is kept: {type(error).__name__}: {first_line(error)}"
            ) from error
        write_whole(path, content)
    return list(contents)


@dataclass(frozen=True)
class Store:
    """The runs of studies under the folder `root`.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()))
    >>> with store.claim({"seed": 0}) as ours:
    ...     store.save({"seed": 0}, {"accuracy": 0.5})
    >>> ours, store.load({"seed": 0})
    (True, {'accuracy': 0.5})
    >>> store.load({"seed": 1}) is None
    True
    """

    root: Path

    def result_path(self, config: Mapping[str, Any]) -> Path:
        """Where the result of a finished run lies."""
        return self.root / "runs" / f"{run_key(config)}.json"

    def failure_path(self, config: Mapping[str, Any]) -> Path:
        """Where the error of a failed run lies."""
        return self.root / "failed" / f"{run_key(config)}.json"

    def weights_path(self, config: Mapping[str, Any]) -> Path:
        """Where the trained weights of a run lie, if they were kept."""
        return self.root / "weights" / f"{run_key(config)}.safetensors"

    def work_path(self, config: Mapping[str, Any]) -> Path:
        """Where a run that is under way keeps its checkpoints, if it does."""
        return self.root / "work" / run_key(config)

    @contextmanager
    def claim(self, config: Mapping[str, Any]) -> Iterator[bool]:
        """Whether this process may do the run: nobody else does it now. The claim ends with the context.

        On several machines the store must be on a file system whose locks hold between them (NFS version 4 does).
        """
        from filelock import FileLock, Timeout

        path = self.root / "claims" / run_key(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def load(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a finished run, or None if it has not finished.

        Raises:
            ValueError: the file is there but is not a result, or a value in it is of a type or size that no run leaves;
                the message says what to do. Nothing is run or drawn before that is settled.
        """
        path = self.result_path(config)
        if not path.exists():
            return None
        try:
            return checked(json.loads(path.read_text())["result"], str(config.get("task", "")))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a run's result ({error}); delete it to run it again") from error

    def save(self, config: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record a finished run; an error recorded for the same run, and its checkpoints, are forgotten."""
        write_whole(self.result_path(config), json.dumps({"config": config, "result": result}, indent=1) + "\n")
        self.failure_path(config).unlink(missing_ok=True)
        shutil.rmtree(self.work_path(config), ignore_errors=True)

    def save_failure(self, config: Mapping[str, Any], error: str, traceback: str) -> None:
        """Record that a run failed: its error in a line, and the traceback. The run stays to be done."""
        record = {"config": config, "error": error, "traceback": traceback}
        write_whole(self.failure_path(config), json.dumps(record, indent=1) + "\n")

    def failure(self, config: Mapping[str, Any]) -> str | None:
        """The error recorded for a failed run, or None."""
        path = self.failure_path(config)
        if not path.exists():
            return None
        try:
            error = str(json.loads(path.read_text())["error"])
            return " ".join("".join(c if c.isprintable() else " " for c in error).split())
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a run's error ({error}); delete it") from error
