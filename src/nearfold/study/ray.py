"""Runs on an existing Ray cluster, whose nodes see the folder of the store and, at the same paths, the data."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nearfold._images import first_line
from nearfold.study.engine import Outcome, attempt, failed
from nearfold.study.grid import Run
from nearfold.study.tasks import Place

PATIENCE_SECONDS = 300.0
"""How long a cluster may be without any node that could ever hold a run: a new one may be starting."""


@dataclass(frozen=True)
class Ray:
    """A Ray cluster.

    Attributes:
        address: as `ray.init` takes it: "auto" for the one on this machine, "ray://host:10001" for a client.
        gpus: GPUs of a run.
        cpus: cores of a run.
    """

    address: str
    gpus: float = 0.0
    cpus: float = 1.0

    def outcomes(self, runs: Sequence[Run], place: Place) -> Iterator[Outcome]:
        """As `nearfold.study.engine.Engine` has it.

        Raises:
            ImportError: Ray is not installed.
            ValueError: the cluster is not there or has no node for a run any more, or a node does not see the store.
        """
        ray = connect(self.address)
        mark = _mark(place.root)
        sources = {name: str(Path(source).resolve()) for name, source in place.sources.items()}
        there = replace(place, root=place.root.resolve(), sources=sources)
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0, max_calls=0)(_attempt_there)
        began = time.perf_counter()
        doing = {remote.remote(run, there, str(mark), self.cpus): run for run in runs}
        try:
            while doing:
                ready = self._next(ray, list(doing))
                run = doing.pop(ready)
                try:
                    yield ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise ValueError(str(error.cause)) from error  # not of the run: the node does not see the store
                except ray.exceptions.RayError as error:
                    text = f"the process was ended on the cluster ({type(error).__name__}): {first_line(error)}"
                    yield failed(run, place, began, text, str(error))
        finally:
            for task in doing:
                ray.cancel(task, force=True)
            mark.unlink(missing_ok=True)

    def _next(self, ray: Any, tasks: list[Any]) -> Any:
        """The next task that ends. Ray itself waits for ever, and without a word, where no node can take one."""
        without = 0.0
        while True:
            ready, _ = ray.wait(tasks, timeout=PATIENCE_SECONDS / 10)
            if ready:
                return ready[0]
            sizes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            fits = any(size.get("CPU", 0) >= self.cpus and size.get("GPU", 0) >= self.gpus for size in sizes)
            without = 0.0 if fits else without + PATIENCE_SECONDS / 10
            if without >= PATIENCE_SECONDS:
                raise ValueError(
                    f"{len(tasks)} runs wait for a node with {self.cpus:g} cores and {self.gpus:g} GPUs, and for "
                    f"{without / 60:.0f} minutes the Ray cluster at {self.address!r} has had none: start one and run "
                    "this again (what has finished stays), or use --engine local"
                )


def connect(address: str) -> Any:
    """The module ray, connected.

    Raises:
        ImportError: Ray is not installed.
        ValueError: there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install ray") from error
    if not ray.is_initialized():
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"no Ray cluster answers at --address {address!r} ({first_line(error)}): start one with `ray start "
                "--head` and name it, or use --engine local"
            ) from error
    return ray


def _knock(address: str) -> None:
    """Raise an OSError where an address has a port at which nobody listens: Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _attempt_there(run: Run, place: Place, mark: str, cpus: float) -> Outcome:
    if not os.path.exists(mark):
        raise ValueError(
            f"the node {socket.gethostname()} does not see {place.root}: put --out on a file system that all nodes "
            "share"
        )
    torch.set_num_threads(max(1, int(cpus)))
    return attempt(run, place)


def _mark(root: Path) -> Path:
    """A new file in the store, which every node must see."""
    root.mkdir(parents=True, exist_ok=True)
    path = root.resolve() / f".seen-{uuid.uuid4().hex}"
    path.touch()
    return path
