"""Runs side by side on this machine, in processes that live while there is work and no longer than their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from nearfold.study.engine import Outcome, attempt, failed
from nearfold.study.grid import Run
from nearfold.study.tasks import Place

MOST_JOBS = 8
"""Runs side by side that are chosen without being asked for: each holds the data and a copy of torch."""


def default_jobs(device: torch.device) -> int:
    """How many runs fit side by side: one for each core up to `MOST_JOBS`, or one on an accelerator."""
    return 1 if device.type != "cpu" else min(MOST_JOBS, cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Local:
    """The cores of this machine.

    Attributes:
        jobs: runs side by side; 1: in this process. More start Python anew for each: a script must guard its main part
            with ``if __name__ == "__main__"``.
    """

    jobs: int = 1

    def outcomes(self, runs: Sequence[Run], place: Place) -> Iterator[Outcome]:
        """As `nearfold.study.engine.Engine` has it."""
        jobs = min(self.jobs, len(runs))
        return _side_by_side(runs, place, jobs) if jobs > 1 else (attempt(run, place) for run in runs)


@dataclass
class _Worker:
    """A process, the pipe to it, and what it is doing."""

    process: BaseProcess
    pipe: Connection
    lifeline: Connection  # the worker ends when this end is closed, and it is closed when this process ends
    run: Run
    since: float

    def give(self, run: Run) -> None:
        self.run, self.since = run, time.perf_counter()
        with contextlib.suppress(OSError):  # it has just died, as `_receive` will find
            self.pipe.send(run)


def _side_by_side(runs: Sequence[Run], place: Place, jobs: int) -> Iterator[Outcome]:
    todo = list(reversed(runs))
    threads = max(1, cores() // jobs)
    workers: list[_Worker] = []
    try:
        while todo or workers:
            while todo and len(workers) < jobs:
                workers.append(_start(place, threads, todo.pop()))
            ready = wait([worker.pipe for worker in workers] + [worker.process.sentinel for worker in workers])
            for worker in [w for w in workers if w.pipe in ready or w.process.sentinel in ready]:
                outcome = _receive(worker, place)
                if worker.process.is_alive() and todo:
                    worker.give(todo.pop())
                else:
                    _stop(worker)
                    workers.remove(worker)
                yield outcome
    finally:  # after an interruption, do not wait for the runs under way
        for worker in workers:
            worker.process.terminate()
            _stop(worker)


def _receive(worker: _Worker, place: Place) -> Outcome:
    """What a worker says; where it has died, that, which is recorded here since it no longer can."""
    try:
        if worker.pipe.poll():
            outcome: Outcome = worker.pipe.recv()
            return outcome
    except (EOFError, OSError):
        pass
    worker.process.join()
    code = worker.process.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"itself with exit code {code}"
    hint = ": most likely for lack of memory, so try --jobs 1" if code == -signal.SIGKILL else ""
    return failed(worker.run, place, worker.since, f"the process was ended by {how}{hint}")


def _start(place: Place, threads: int, run: Run) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    end, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, end, place, threads), daemon=True)
    process.start()
    theirs.close()
    end.close()
    worker = _Worker(process, ours, lifeline, run, time.perf_counter())
    worker.give(run)
    return worker


def _stop(worker: _Worker) -> None:
    worker.lifeline.close()
    worker.pipe.close()
    worker.process.join()


def _work(pipe: Connection, lifeline: Connection, place: Place, threads: int) -> None:
    """The life of a worker: runs come through the pipe, outcomes go back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        while True:
            pipe.send(attempt(pipe.recv(), place))
    except (EOFError, OSError):
        pass  # no more runs


def _end_with(lifeline: Connection) -> None:
    """End this process when the other end of the lifeline is closed: its parent has no more use for it, or is gone."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)
