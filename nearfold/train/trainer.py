"""One model in training: its optimizer, its steps, its checkpoint. The loop over them is in ``loop``."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nearfold.surgery import SpectrumSchedule
from nearfold.train import checkpoint
from nearfold.train.augment import AUGMENTATIONS
from nearfold.train.data import ImageData, Split
from nearfold.train.distributed import Team
from nearfold.train.evaluation import autocast, evaluate, normalise
from nearfold.train.recipe import Recipe, learning_rate
from nearfold.train.record import Metrics
from nearfold.train.seeds import derive, generator, seed_step

TRAIN_IMAGES_EVALUATED = 10_000
"""Training images, at most, on which the final training loss and accuracy are measured."""


class Diverged(FloatingPointError):
    """The loss or a weight is no longer finite; the last checkpoint is from before."""


@dataclass
class Run:
    """What changes while a run goes, apart from weights and optimizer; part of every checkpoint."""

    step: int = 0  # steps done, over all epochs; where this ends an epoch, the epoch is evaluated too
    loss_sum: float = 0.0  # over the steps of the epoch under way
    correct: float = 0.0  # likewise, images classified correctly
    step_seconds: list[float] = field(default_factory=list)  # one for each step
    starts: list[int] = field(default_factory=list)  # steps done whenever the run was (re)started
    history: list[Metrics] = field(default_factory=list)  # one record for each epoch
    best_epoch: int = 0  # from 1
    best_weights: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mib: float = 0.0


@dataclass(frozen=True)
class _Pending:
    """A step whose measurements may still be on their way from the device."""

    measured: Tensor  # (2,): mean loss of the global batch, images of it classified correctly
    seconds: Callable[[], float]  # may be called once `measured` has arrived


class Trainer:
    """Takes the steps of a run.

    Args:
        model: Moved to the team's device.
        data: Copied there.
        recipe: How to train.
        team: The processes that train together.
        schedule: Moves layers of the model after every step.

    Raises:
        ValueError: The batch cannot be shared evenly by the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        team: Team,
        schedule: SpectrumSchedule | None = None,
    ) -> None:
        if recipe.batch_size % team.world:
            raise ValueError(
                f"Recipe.batch_size={recipe.batch_size} cannot be shared evenly by {team.world} processes: "
                f"use a multiple of {team.world}"
            )
        count = len(data.train)
        self.batch = min(recipe.batch_size, count - count % team.world)
        if self.batch == 0:
            raise ValueError(f"{count} training images are too few for {team.world} processes: start fewer")
        self.steps_per_epoch = count // self.batch
        each = self.batch // team.world
        self._share = slice(team.rank * each, (team.rank + 1) * each)

        self.recipe, self.team, self._schedule = recipe, team, schedule
        self._data = data  # the splits below are its own, on the device
        self._train, self._val, self._test = (
            Split(split.images.to(team.device), split.labels.to(team.device))
            for split in (data.train, data.val, data.test)
        )
        self._mean, self._std = data.mean.to(team.device), data.std.to(team.device)

        self.run = Run()
        self.model = model.to(team.device)
        self._optimizer = _optimizer(self.model, recipe, team.device)
        self._scaler = torch.amp.GradScaler(team.device.type, enabled=recipe.precision == "float16")
        self._averaged = AveragedModel(self.model, use_buffers=True) if recipe.ema else None
        self._net = team.wrap(self.model)  # shares the first process's initial weights
        self._pending: list[_Pending] = []

    @property
    def _evaluated(self) -> nn.Module:
        """The model that is validated and saved."""
        return self.model if self._averaged is None else self._averaged.module

    def order(self, epoch: int) -> Tensor:
        """Return the order of the training images in an epoch (from 0): int64 (N,), on the device."""
        draws = generator(self.recipe.seed, "order", epoch)
        return torch.randperm(len(self._train), generator=draws).to(self.team.device)

    def take_step(self, order: Tensor) -> None:
        """Take the next step of the run; `order` is that of its epoch."""
        recipe, step = self.recipe, self.run.step
        stop_watch = _start_watch(self.team.device)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, self.steps_per_epoch)
        seed_step(self.model, recipe.seed, step, self.team.rank)

        start = (step % self.steps_per_epoch) * self.batch
        rows = order[start : start + self.batch][self._share]
        labels = self._train.labels[rows]
        augment = AUGMENTATIONS[recipe.augment]
        seed = derive(recipe.seed, "augment", step)
        images = augment(self._train.images[rows], seed, self.batch, self._share)
        with autocast(self.team.device, recipe.precision):
            logits = self._net(normalise(images, self._mean, self._std)).float()
        wanted = (len(labels), len(self._data.classes))
        if logits.shape != wanted:
            raise ValueError(f"the model must return logits {wanted}; it returned {tuple(logits.shape)}")
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)

        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if recipe.clip_grad_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._averaged is not None:
            self._averaged.multi_avg_fn = _average(min(recipe.ema, (1 + step) / (10 + step)))
            self._averaged.update_parameters(self.model)

        if self._schedule is not None:
            self._schedule.step()
            if self._averaged is not None:
                self._schedule.follow(self._averaged.module)

        correct = (logits.detach().argmax(1) == labels).sum()
        measured = self.team.sum(torch.stack([loss.detach() / self.team.world, correct]))
        self._pending.append(_Pending(measured, stop_watch()))
        self.run.step += 1

    def read(self) -> Metrics:
        """Wait for the steps taken so far, and return the record of the last one.

        Raises:
            Diverged: The loss of one of them is not finite.
        """
        run = self.run
        loss, correct, step, epoch = math.nan, 0.0, 0, 0
        measured = torch.stack([pending.measured for pending in self._pending]).tolist()
        for pending, (loss, correct) in zip(self._pending, measured, strict=True):
            step = len(run.step_seconds) + 1
            epoch = (step - 1) // self.steps_per_epoch + 1
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at epoch {epoch}, step {step}: {_REMEDY}")
            run.loss_sum += loss
            run.correct += correct
            run.step_seconds.append(pending.seconds())
        self._pending.clear()
        assert step == run.step, "every step is read once"
        return {
            "kind": "step",
            "epoch": epoch,
            "step": step,
            "lr": learning_rate(self.recipe, run.step - 1, self.steps_per_epoch),
            "train_loss": loss,
            "train_accuracy": correct / self.batch,
            "images_per_second": self.batch / run.step_seconds[-1],
        }

    def end_epoch(self) -> Metrics:
        """Validate after the last step of an epoch, and return its record, which is in the history too.

        Raises:
            Diverged: A weight or the validation loss is not finite.
        """
        run = self.run
        epoch = run.step // self.steps_per_epoch
        self.require_finite_weights()
        loss, accuracy = self._evaluate(self._evaluated, self._val)
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after epoch {epoch}, step {run.step}: {_REMEDY}")
        record: Metrics = {
            "kind": "epoch",
            "epoch": epoch,
            "step": run.step,
            "lr": learning_rate(self.recipe, run.step - 1, self.steps_per_epoch),
            "train_loss": run.loss_sum / self.steps_per_epoch,
            "train_accuracy": run.correct / (self.steps_per_epoch * self.batch),
            "val_loss": loss,
            "val_accuracy": accuracy,
            "images_per_second": self._speed(run.step - self.steps_per_epoch),
        }
        run.loss_sum = run.correct = 0.0
        run.history.append(record)
        best = run.history[run.best_epoch - 1]
        if not run.best_epoch or (accuracy, -loss) > (best["val_accuracy"], -best["val_loss"]):
            run.best_epoch = epoch
            run.best_weights = copy.deepcopy(self._evaluated.state_dict())
        return record

    def finish(self) -> dict[str, Any]:
        """Put the selected weights into the model, and measure them and the last ones on the test images.

        Returns:
            The fields of a ``Result`` that measure the weights and the steps.
        """
        run = self.run
        _, last = self._evaluate(self._evaluated, self._test)
        self.model.load_state_dict(run.best_weights)
        if self._schedule is not None:  # the layers are again what they were when the weights were chosen
            self._schedule.load_state_dict({"done": run.best_epoch * self.steps_per_epoch})
        self.model.eval()
        is_last = run.best_epoch == self.recipe.epochs
        _, test = (0.0, last) if is_last else self._evaluate(self.model, self._test)
        draws = generator(self.recipe.seed, "train images evaluated")
        some = torch.randperm(len(self._train), generator=draws)[:TRAIN_IMAGES_EVALUATED]
        train_loss, train_accuracy = self._evaluate(self.model, self._train[some.to(self.team.device)])
        return {
            "epochs": self.recipe.epochs,
            "steps": run.step,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_accuracy": run.history[run.best_epoch - 1]["val_accuracy"],
            "best_epoch": run.best_epoch,
            "test_accuracy": test,
            "test_accuracy_last": last,
            "images_per_second": self._speed(0),
        }

    def require_finite_weights(self) -> None:
        """Raise :class:`Diverged` if a weight is not finite, so that no checkpoint holds it."""
        norm = nn.utils.get_total_norm([weight.detach() for weight in self.model.parameters()])
        if not math.isfinite(norm.item()):
            raise Diverged(f"a weight is not finite after step {self.run.step}: {_REMEDY}")

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint needs. No generator states: every step seeds its own."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "run": {name: value for name, value in vars(self.run).items()},
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go back to a :meth:`state`, read from `path`.

        Raises:
            ValueError: It is of another model.
        """
        try:
            self.model.load_state_dict(state["model"])
            if self._averaged is not None:
                self._averaged.load_state_dict(state["averaged"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint {path} is of another model: {error}\n"
                f"Resume with the same model; {checkpoint.restart(path)}"
            ) from error
        self._scaler.load_state_dict(state["scaler"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
            if self._averaged is not None:
                self._schedule.follow(self._averaged.module)
        self.run = Run(**state["run"])

    def _evaluate(self, model: nn.Module, split: Split) -> tuple[float, float]:
        each = self.batch // self.team.world  # what fits into memory in training fits here
        return evaluate(model, split, self._data, batch_size=each, precision=self.recipe.precision, team=self.team)

    def _speed(self, since: int) -> float:
        """Images per second by the median of the steps from `since` (from 0) on, without first ones."""
        times = self.run.step_seconds
        steady = [times[step] for step in range(since, len(times)) if step not in self.run.starts]
        return self.batch / statistics.median(steady or times[since:])


_REMEDY = (
    "lower lr, lengthen warmup_epochs, set clip_grad_norm, or use a wider precision; the last checkpoint is from before"
)


_Tensors = tuple[Tensor, ...] | list[Tensor]


def _average(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """Return the update of averaged tensors, all of one type, by the current ones."""
    average_floats = get_ema_multi_avg_fn(decay)

    def update(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            average_floats(averaged, current, count)
        else:  # torch's average rounds integers down, and with them a constant table of indices
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    return update


def _optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError("the model has no trainable parameter")
    fused = device.type in ("cpu", "cuda")  # one call for all weights: small networks live on this
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(
        weights,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=fused,
    )


def _start_watch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start a watch; calling the result stops it, and gives a function that returns the seconds.

    On CUDA the watch is two events in the device's queue, so that nothing waits for it.
    """
    if device.type != "cuda":
        began = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - began
            return lambda: seconds

        return stop
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()

    def stop_event() -> Callable[[], float]:
        second.record()
        return lambda: first.elapsed_time(second) / 1000

    return stop_event
