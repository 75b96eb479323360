"""Doing the runs of a study: in this process, or several side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nearfold.study.measure import measure
from nearfold.study.spectrum import Run, Study
from nearfold.train import fit, prepare, save_weights

MOST_JOBS = 8
"""Runs side by side that are chosen without being asked for: each holds the data and a copy of torch."""

KEPT = (
    "train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_last", "train_loss", "best_epoch",
    "steps", "seconds", "history",
)  # fmt: skip
"""What a finished run keeps of `nearfold.train.Result`."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: a result, or an error in one line with its traceback."""

    run: Run
    seconds: float
    result: dict[str, Any] | None = None
    error: str = ""
    traceback: str = ""


def default_jobs(device: torch.device) -> int:
    """How many runs fit side by side: one for each core up to `MOST_JOBS`, or one on an accelerator."""
    return 1 if device.type != "cpu" else min(MOST_JOBS, _cores())


def run(study: Study, *, jobs: int = 1, say: Callable[[str], None] | None = None) -> None:
    """Measure the operators, then do the runs that have not finished, all operators of seed 0 first.

    A run that fails leaves its error in the store and the study goes on. What has finished stays, however
    the study ends. An operator that cannot be measured is not run.

    Args:
        study: from `open_study`.
        jobs: runs side by side. More than 1 starts Python anew for each: a script must guard its main
            part with ``if __name__ == "__main__"``.
        say: gets one line a run; None: print.

    Raises:
        ChildProcessError: a process died, which takes more than a Python error.
    """
    say = say or _print
    seconds_per_image = _measure_all(study, say)
    todo = [r for r in study.runs if r.stop.name in seconds_per_image and not study.store.load(r.config)]
    # Slowest first within a seed, so that no long run is left over at the end.
    todo.sort(key=lambda run: (run.seed, -seconds_per_image[run.stop.name]))
    jobs = max(1, min(jobs, len(todo)))
    say(
        f"{study.data.name}: {len(study.finished)} of {len(study.runs)} runs have finished before, "
        f"{len(todo)} to do, {jobs} at a time; results in {study.store.root}"
    )
    began = time.perf_counter()
    work_done, work_left = 0.0, sum(seconds_per_image[run.stop.name] for run in todo)
    for number, outcome in enumerate(_outcomes(study, todo, jobs), start=1):
        _record(study, outcome)
        work = seconds_per_image[outcome.run.stop.name]
        work_done, work_left = work_done + work, work_left - work
        left = (time.perf_counter() - began) / work_done * work_left
        ending = f"   about {duration(left)} left" if number < len(todo) else ""
        text = (
            f"test {100 * outcome.result['test_accuracy']:5.1f} %"
            if outcome.result is not None
            else f"FAILED: {outcome.error}"
        )
        say(
            f"[{number:{len(str(len(todo)))}}/{len(todo)}] {outcome.run.stop.title:22} "
            f"seed {outcome.run.seed}  {text}  {outcome.seconds:5.1f} s{ending}"
        )


def duration(seconds: float) -> str:
    """Seconds as one says them.

    >>> duration(8.2), duration(95), duration(5400)
    ('8 s', '1.6 min', '1.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _print(line: str) -> None:
    print(line, flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _record(study: Study, outcome: Outcome) -> None:
    if outcome.result is None:
        study.store.save_failure(outcome.run.config, outcome.error, outcome.traceback)
    else:
        study.store.save(outcome.run.config, outcome.result)


def _measure_all(study: Study, say: Callable[[str], None]) -> dict[str, float]:
    """Seconds an image, forward and backward, of every operator that can be measured; measured once."""
    found = {}
    split = study.data.train
    rows = slice(study.settings.recipe.batch_size)
    for stop in study.settings.stops:
        config = study.cost_config(stop)
        cost = study.store.load(config)
        if cost is None:
            try:
                torch.manual_seed(0)
                images = prepare(split.images[rows].to(study.device), study.data)
                model = study.build(stop).to(study.device)
                cost = asdict(measure(model, images, split.labels[rows].to(study.device)))
            except Exception as error:  # recorded and reported; the other operators go on
                study.store.save_failure(config, _in_a_line(error), _trace(error))
                say(f"{stop.title}: cannot be measured, so not run: {_in_a_line(error)}")
                continue
            study.store.save(config, cost)
        found[stop.name] = 1 / cost["images_per_second"]
    return found


def _outcomes(study: Study, todo: Sequence[Run], jobs: int) -> Iterator[Outcome]:
    """The outcomes of runs as they end."""
    if jobs == 1:
        yield from (_attempt(study, run) for run in todo)
        return
    before = set(multiprocessing.active_children())
    # Pickled here, to bytes: tensors handed to a process as such would go through shared memory, which is
    # small in containers.
    setup = (pickle.dumps(study), max(1, _cores() // jobs))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _set_up, setup)
    try:
        for future in as_completed([pool.submit(_attempt_here, run) for run in todo]):
            yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process of the study died, most likely for lack of memory; what has finished is kept: go on "
            "with --jobs 1"
        ) from error
    finally:  # after an interruption, do not wait for the runs under way
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


_STUDY: Study | None = None  # of a process that runs side by side with others


def _set_up(study: bytes, threads: int) -> None:
    global _STUDY
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once; the parent does the talking
    torch.set_num_threads(threads)
    _STUDY = pickle.loads(study)


def _attempt_here(run: Run) -> Outcome:
    assert _STUDY is not None
    return _attempt(_STUDY, run)


def _attempt(study: Study, run: Run) -> Outcome:
    began = time.perf_counter()
    try:
        result = _train(study, run)
    except Exception as error:  # whatever an operator dies of: recorded, reported, and the others go on
        return Outcome(run, time.perf_counter() - began, error=_in_a_line(error), traceback=_trace(error))
    return Outcome(run, time.perf_counter() - began, result)


def _train(study: Study, run: Run) -> dict[str, Any]:
    """Train one network, and keep the weights of seed 0 for the picture."""
    torch.manual_seed(run.seed)
    model = study.build(run.stop)
    done = fit(model, study.data, run.recipe, progress=False)
    if run.seed == 0:
        path = study.store.weights_path(run.config)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, path)
    return {name: getattr(done, name) for name in KEPT}


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
