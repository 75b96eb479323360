"""What a run tells while it goes: metrics in a JSONL file and TensorBoard, progress on the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nearfold.train.checkpoint import replacing

Metrics = dict[str, Any]

PHASES = ("data", "forward", "backward", "optimizer")
"""What a training step spends its time on: waiting for its images, the model and loss, gradients, and the rest."""


class Watch:
    """Takes the times of the phases of a step, which may come several times each.

    On CUDA a lap is an event in the device's queue, so that nothing waits for it: a phase's time is then that of the
    device, and its share of "data" what the device was idle for want of images.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, phase: str) -> None:
        """End a phase, which began with the end of the one before."""
        self._laps.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase; on CUDA once the device has come to the last one's end."""
        sums = dict.fromkeys(PHASES, 0.0)
        for (_, began), (phase, ended) in zip(self._laps, self._laps[1:], strict=False):
            sums[phase] += began.elapsed_time(ended) / 1000 if self._cuda else ended - began
        return sums

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def phase_metrics(seconds: dict[str, float], steps: int) -> Metrics:
    """Return what a record says of the phases' `seconds` in so many steps: the mean of each, the share of the data.

    Example:
        >>> phase_metrics({"data": 1.0, "forward": 1.5, "backward": 1.5, "optimizer": 1.0}, steps=2)["data_wait"]
        0.2
    """
    total = sum(seconds.values())
    means = {f"seconds_{phase}": value / steps for phase, value in seconds.items()}
    return {**means, "data_wait": seconds["data"] / total if total else 0.0}


class Recorder:
    """Writes the records of a run; a context manager, whose end closes what it opened.

    A record has a ``kind`` ("step" or "epoch"), the ``step`` (steps done, over all epochs) and the
    ``epoch`` (from 1) it stands at, and its measurements. Among them are the seconds that a step spent on each of
    the :data:`PHASES`, ``seconds_data`` and so on, and ``data_wait``, the share of the data in them: those of a step
    record are its step's, those of an epoch's the means over its steps, all of the first process.

    Args:
        out: Folder for ``metrics.jsonl`` and ``tensorboard/``, or None to write nothing.
        after: Steps the run has done so far: records of later steps, left by an interrupted run that
            will do them again, are removed, and so is a last line cut short.
        tensorboard: Write the measurements for TensorBoard too.
    """

    def __init__(self, out: Path | None, after: int, tensorboard: bool) -> None:
        self._file = None
        self._board = None
        if out is None:
            return
        path = out / "metrics.jsonl"
        kept = _records_until(path, after)
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        if tensorboard:
            self._board = _summary_writer()(str(out / "tensorboard"), purge_step=after + 1)

    def write(self, record: Metrics) -> None:
        """Append one record; it survives the death of the process from here on."""
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name not in ("kind", "step", "epoch"):
                    self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def require_tensorboard() -> None:
    """Raise an ImportError that names the extra if TensorBoard is not installed."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter


def _records_until(path: Path, step: int) -> list[bytes]:
    """Return the lines of a metrics file that belong to the first `step` steps."""
    if step == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # a write cut short: nothing that counts comes after it
        if record["step"] > step:
            break
        kept.append(line)
    return kept


class Progress:
    """Shows how a run goes, on stderr: a bar on a terminal, else one line an epoch. A context manager.

    Args:
        shown: False: show nothing.
        epochs: Epochs of the run.
        steps_per_epoch: Steps of each.
        done: Steps the run has done so far.
    """

    def __init__(self, shown: bool, epochs: int, steps_per_epoch: int, done: int) -> None:
        self._epochs = epochs
        self._lines = shown and not sys.stderr.isatty()
        self._bar: Any = None
        if shown and not self._lines:
            from rich import progress as rich
            from rich.console import Console

            self._bar = rich.Progress(
                rich.TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[text]}"),
                rich.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            epoch = min(done // steps_per_epoch + 1, epochs)
            self._task = self._bar.add_task("", total=epochs * steps_per_epoch, completed=done, epoch=epoch, text="")

    def step(self, record: Metrics) -> None:
        """Show where the run stands by the record of its last step."""
        if self._bar is not None:
            text = (
                f"loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:.1%}  "
                f"{record['images_per_second']:,.0f} images/s"
            )
            self._bar.update(self._task, completed=record["step"], epoch=record["epoch"], text=text)

    def epoch(self, record: Metrics) -> None:
        """Tell the end of an epoch by its record."""
        text = (
            f"epoch {record['epoch']}/{self._epochs}  loss {record['train_loss']:.4f}  "
            f"accuracy {record['train_accuracy']:.1%}  validation {record['val_accuracy']:.1%}  "
            f"{record['images_per_second']:,.0f} images/s"
        )
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
