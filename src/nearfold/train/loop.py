"""The training loop: plain PyTorch, the same on one process and, under torchrun, on several."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfold.surgery import SpectrumSchedule
from nearfold.train import checkpoint
from nearfold.train.data import ImageData
from nearfold.train.distributed import Team, join
from nearfold.train.evaluation import require_precision
from nearfold.train.feed import Streamed
from nearfold.train.files import replacing
from nearfold.train.memory import PeakMemory
from nearfold.train.recipe import Recipe
from nearfold.train.record import Metrics, Progress, Recorder, require_tensorboard
from nearfold.train.seeds import global_randomness_kept
from nearfold.train.trainer import Trainer

_LOCK_SECONDS = 10.0
_READ_SECONDS = 0.5  # measurements are read at least so often: reading waits for the device


@dataclass(frozen=True)
class Result:
    """What came out of a training run. Accuracies are fractions, 0..1.

    The *selected* weights are those after the epoch of the highest validation accuracy (then of the
    lowest validation loss, then the earliest); with ``Recipe.ema`` all weights are the averaged ones.

    Attributes:
        epochs: Epochs done: the recipe's, or fewer where it says `until`.
        steps: Optimizer steps of the run.
        train_loss: Mean cross-entropy (no smoothing) of the selected weights, in evaluation mode, on up
            to 10,000 training images without augmentation.
        train_accuracy: Accuracy of the same weights on the same images.
        val_accuracy: Accuracy of the selected weights on the validation images.
        best_epoch: The epoch, from 1, of the selected weights.
        test_accuracy: Accuracy of the selected weights on the test images, which are looked at only
            once, after training.
        test_accuracy_last: Accuracy of the last epoch's weights on the test images.
        train_accuracy_last: Their accuracy on the training images of `train_accuracy`.
        images_per_second: Images of a global batch over the median time of a training step; the first
            step after a start is left out. Evaluation, checkpoints and reports are not in it.
        seconds: Wall time of the run from the call to the last evaluation; of an interrupted run, the
            times until the checkpoint from which it went on included.
        peak_memory_mib: Peak memory of the first process, in MiB. CUDA: the most that torch had
            allocated at one time, model and data included. CPU: how far the process's resident memory
            rose above where it stood at the call (see ``memory.PeakMemory`` for what that misses).
        history: One record for each epoch, as in ``metrics.jsonl``: ``epoch``, ``step``, ``lr``, ``train_loss`` and
            ``train_accuracy`` in training, ``val_loss``, ``val_accuracy``, ``images_per_second``, the mean seconds
            that a step spent on each phase (``seconds_data``, ``seconds_forward``, ``seconds_backward``,
            ``seconds_optimizer``), ``data_wait``, the share of the data in them (0..1), and, with ``Recipe.until``,
            ``train_accuracy_evaluated``.
    """

    epochs: int
    steps: int
    train_loss: float
    train_accuracy: float
    val_accuracy: float
    best_epoch: int
    test_accuracy: float
    test_accuracy_last: float
    train_accuracy_last: float
    images_per_second: float
    seconds: float
    peak_memory_mib: float
    history: list[Metrics]


def fit(
    model: nn.Module,
    data: ImageData | Streamed,
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    checkpoint_every: int = 0,
    log_every: int = 50,
    schedule: SpectrumSchedule | None = None,
    parallel: str = "ddp",
    compile: bool = False,
    workers: int = 0,
    made_from: Mapping[str, Any] | None = None,
) -> Result:
    """Train a model, keep the weights that do best on the validation images, then test them once.

    Started by torchrun, every process calls this with the same arguments: each trains on its share of
    every batch, and together they take the steps that one process would take (batch normalisation
    excepted, which sees one process's share). `out` must be a folder that all processes see. Where torchrun starts
    its processes anew (``--max-restarts``), they go on from the last checkpoint, `resume` or not.

    Args:
        model: (B, C, H, W) float32 -> logits (B, classes). It is moved to the recipe's device and left
            there with the selected weights, in evaluation mode. Normalisation is done here, not by it.
        data: What to train, validate and test on. In memory, they are copied to the device whole.
        recipe: How to train.
        out: Folder for ``recipe.json``, ``network.json`` (`made_from`), ``metrics.jsonl``, the checkpoint
            (``checkpoint.json`` and the folder that it names), and, at the end, ``weights.safetensors`` (the selected
            weights) and ``result.json``; None: nothing is written. One run at a time may use it.
        resume: Go on from the checkpoint in `out`, to the very weights that an undisturbed run reaches
            (to the bit on a CPU with as many threads and processes); without a checkpoint, start. The number of
            processes and `parallel` may be others than before.
        progress: Show a bar on a terminal, else print a line an epoch, on stderr.
        tensorboard: Write ``out/tensorboard`` too.
        checkpoint_every: Steps between checkpoints within an epoch, besides the one after it; 0: none.
        log_every: Steps between the step records of ``metrics.jsonl``.
        schedule: Moves layers of the model along the spectrum, a step of it after every optimizer step; saved and
            resumed with the run. The model is left with the operations that the selected weights were trained for.
        parallel: How several processes hold the model. ``"ddp"``: each has all of it, and every trainable parameter
            must take part in every step. ``"fsdp"``: weights, gradients, averages and the optimizer's state are
            divided among them (FSDP2) block by block, see ``Team.shard``; the model itself stays in the host's memory
            until the end.
        compile: Train by torch.compile; evaluation runs the model as it is.
        workers: Processes that read ahead, for each training process, of data that are not in memory.
        made_from: What the model was made from, as JSON can hold it: kept in ``network.json``, and what a run that is
            resumed must be made from too; None: nothing is said.

    Returns:
        The measurements; see :class:`Result`.

    Raises:
        ValueError: An argument does not fit; the device or precision is not available; `out` holds a
            run and `resume` is False, or another process uses it; its checkpoint is broken or of another recipe, data
            set or model.
        OSError: A checkpoint cannot be written, for instance on a full disk; the last one is kept.
        Diverged: The loss or a weight is no longer finite.

    Example:
        >>> from nearfold.train import Recipe, fit, load_data
        >>> data = load_data("digits", limit=200)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = fit(model, data, Recipe(epochs=2, device="cpu"), progress=False)
        >>> result.steps, len(result.history), 0 <= result.test_accuracy <= 1
        (2, 2, True)
    """
    began = time.perf_counter()
    out = None if out is None else Path(out)
    team = join(recipe.device)
    if out is not None and team.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0):
        resume = True  # each machine counts for itself; one that has started anew is enough
    _check_arguments(out, resume, tensorboard, checkpoint_every, log_every, parallel, workers)
    require_precision(team.device, recipe.precision)
    odd = [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
    if out is not None and odd:
        raise ValueError(
            f"{odd[0]} of the model is no tensor, and neither checkpoints nor safetensors hold anything else: make "
            "it a buffer, or train without out="
        )
    memory = PeakMemory(team.device)
    with _only_user(out, team), global_randomness_kept(), _deterministic(recipe.deterministic), ExitStack() as at_end:
        trainer = Trainer(model, data, recipe, team, schedule, parallel=parallel, compiled=compile, workers=workers)
        at_end.callback(trainer.feed.close)
        identity: dict[str, Any] = {}
        if out is not None:
            identity = _identity(data, recipe, schedule, made_from)
            saved = checkpoint.read(out, identity, team)
            if saved is not None:
                trainer.restore(saved)
        team.wait()  # nobody writes before everybody has read
        if out is not None and team.leads:
            _write_json(out / "recipe.json", recipe.to_dict())
            if made_from is not None:
                _write_json(out / "network.json", dict(made_from))

        run = trainer.run
        run.starts.append(run.step)
        seconds_before, peak_before = run.seconds, run.peak_memory_mib
        recorder = Recorder(out if team.leads else None, run.step, tensorboard)
        shown = Progress(progress and team.leads, recipe.epochs, trainer.steps_per_epoch, run.step)

        def save() -> None:
            run.seconds = seconds_before + time.perf_counter() - began
            run.peak_memory_mib = max(peak_before, memory.mib())
            if out is not None:
                checkpoint.save(out, identity, *trainer.state(), team)

        with recorder, shown:
            while not trainer.finished:
                trainer.model.train()
                batches = trainer.feed.train(run.step)
                end = (trainer.epochs_done + 1) * trainer.steps_per_epoch
                read_at = time.perf_counter()
                while run.step < end:
                    trainer.take_step(batches)
                    log_now = run.step % log_every == 0
                    save_now = checkpoint_every > 0 and run.step % checkpoint_every == 0 and run.step < end
                    due = time.perf_counter() - read_at > _READ_SECONDS
                    if not (log_now or save_now or due or run.step == end):
                        continue
                    record = trainer.read()
                    read_at = time.perf_counter()
                    shown.step(record)
                    if log_now:
                        recorder.write(record)
                    if save_now:
                        trainer.require_finite_weights()
                        save()
                record = trainer.end_epoch()
                recorder.write(record)
                shown.epoch(record)
                save()
        measured = trainer.finish()
        result = Result(
            **measured,
            seconds=seconds_before + time.perf_counter() - began,
            peak_memory_mib=max(peak_before, memory.mib()),
            history=run.history,
        )
        if out is not None and team.leads:
            checkpoint.save_weights(model, out / "weights.safetensors")
            _write_json(out / "result.json", dataclasses.asdict(result))
    team.wait()  # when one process returns, the files are there for all
    return result


def _identity(
    data: ImageData | Streamed,
    recipe: Recipe,
    schedule: SpectrumSchedule | None,
    made_from: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run is, by aspect, as JSON gives it back."""
    plan = {} if schedule is None else schedule.plan
    identity: dict[str, Any] = {"recipe": recipe.to_dict(), "data set": checkpoint.fingerprint(data), "schedule": plan}
    if made_from is not None:
        identity[checkpoint.MADE_FROM] = dict(made_from)
    as_read: dict[str, Any] = json.loads(json.dumps(identity))
    return as_read


def _check_arguments(
    out: Path | None,
    resume: bool,
    tensorboard: bool,
    checkpoint_every: int,
    log_every: int,
    parallel: str,
    workers: int,
) -> None:
    if parallel not in ("ddp", "fsdp"):
        raise ValueError(f"parallel must be one of 'ddp', 'fsdp'; got {parallel!r}")
    for name, value, least in (
        ("checkpoint_every", checkpoint_every, 0),
        ("log_every", log_every, 1),
        ("workers", workers, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    if tensorboard:
        require_tensorboard()
    if out is None:
        for name, value in (("resume", resume), ("tensorboard", tensorboard)):
            if value:
                raise ValueError(f"{name}=True needs a folder: pass out=")
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file: name a folder")
    if not resume and checkpoint.exists(out):
        raise ValueError(
            f"out={str(out)!r} holds a run already: pass resume=True (--resume) to go on with it, name another folder, "
            "or delete this one"
        )
    out.mkdir(parents=True, exist_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def _only_user(out: Path | None, team: Team) -> Iterator[None]:
    """Keep other processes from using a run's folder; the system lifts the lock when this one dies.

    It is waited for a little: processes whose launcher was killed end within a second, those that read ahead for one
    that was killed within five.
    """
    if out is None or not team.leads:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    give_up = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise ValueError(
                        f"out={str(out)!r} is in use by another run: wait for its end, or name another folder"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks, such as some that are mounted over a network
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)  # closing lifts it only where no child process has a copy
        os.close(folder)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Refuse operations without a deterministic implementation, if wanted, and undo that."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
