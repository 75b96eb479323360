"""One model in training: its optimizer, its steps, its checkpoint. The loop over them is in ``loop``."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nearfold.surgery import SpectrumSchedule
from nearfold.train import checkpoint
from nearfold.train.data import ImageData
from nearfold.train.distributed import Team, averaging, whole
from nearfold.train.evaluation import autocast, measure, normalise
from nearfold.train.feed import Batches, Streamed, open_feed
from nearfold.train.mix import draw_mix, mixed
from nearfold.train.optimizer import HELD, average, optimizer_of
from nearfold.train.recipe import Recipe, learning_rate
from nearfold.train.record import PHASES, Metrics, Watch, phase_metrics
from nearfold.train.run import TENSORS, Run, configuration, restored
from nearfold.train.seeds import seed_step


class Diverged(FloatingPointError):
    """The loss or a weight is no longer finite; the last checkpoint is from before."""


@dataclass(frozen=True)
class _Pending:
    """A step whose measurements may still be on their way from the device."""

    measured: Tensor  # (2,): mean loss of the global batch, images of it classified correctly
    watch: Watch  # may be read once `measured` has arrived


class Trainer:
    """Takes the steps of a run, whose arguments :func:`nearfold.train.fit` has too.

    The model is moved to the team's device; where it is divided among processes, a copy of it is, until the end.

    Raises:
        ValueError: The batch or the model cannot be shared by the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData | Streamed,
        recipe: Recipe,
        team: Team,
        schedule: SpectrumSchedule | None = None,
        *,
        parallel: str = "ddp",
        compiled: bool = False,
        workers: int = 0,
    ) -> None:
        divided = parallel == "fsdp" and team.world > 1
        self.feed = open_feed(data, recipe, team, workers)
        self.batch, self.steps_per_epoch = self.feed.batch_size, self.feed.steps_per_epoch
        self.recipe, self.team, self._schedule = recipe, team, schedule
        self._classes = len(data.classes)
        self._mean, self._std = data.mean.to(team.device), data.std.to(team.device)

        self.run = Run()
        self._given = model
        self._made_of = configuration(model, schedule)
        self._format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch documents it
        if not divided:
            model.to(team.device)
        team.share((*model.parameters(), *model.buffers()))
        self._averaged = AveragedModel(model, use_buffers=True) if recipe.ema else None
        self.model = model
        if divided:  # a copy, since a divided model cannot be made whole again
            self.model = team.shard(copy.deepcopy(model))
            if self._averaged is not None:
                team.shard(self._averaged.module)
                self._averaged.to(team.device)
        self._optimizer = optimizer_of(self.model, recipe, team.device)
        self._scaler = torch.amp.GradScaler(team.device.type, enabled=recipe.precision == "float16")
        self._wrapped = team.wrap(self.model)
        # dynamic=False: every step has the shapes of the first
        self._net = torch.compile(self._wrapped, dynamic=False) if compiled else self._wrapped
        self._pending: list[_Pending] = []

    @property
    def _evaluated(self) -> nn.Module:
        """The model that is validated and saved."""
        return self.model if self._averaged is None else self._averaged.module

    @property
    def epochs_done(self) -> int:
        """Epochs done, with their validation."""
        return len(self.run.history)

    @property
    def finished(self) -> bool:
        """Whether the run has no epoch to come."""
        run, until = self.run, self.recipe.until
        reached = until and run.history and run.history[-1]["train_accuracy_evaluated"] >= until
        return bool(reached) or self.epochs_done == self.recipe.epochs

    def take_step(self, batches: Batches) -> None:
        """Take the next step of the run, with the next of the feed's `batches`."""
        recipe, step = self.recipe, self.run.step
        watch = Watch(self.team.device)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, self.steps_per_epoch)
        seed_step(self.model, recipe.seed, step, self.team.rank)
        self._optimizer.zero_grad(set_to_none=True)
        images, labels = next(batches)
        watch.lap("data")

        sums = torch.zeros(2, device=self.team.device)  # loss, images classified correctly
        parts = list(zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate), strict=True))
        for part, (some, wanted) in enumerate(parts, start=1):
            with averaging(self._wrapped, now=part == len(parts)):
                loss, correct = self._loss(some, wanted, step)
                watch.lap("forward")
                self._scaler.scale(loss / len(parts)).backward()
                watch.lap("backward")
            sums += torch.stack([loss.detach() / (len(parts) * self.team.world), correct])

        if recipe.clip_grad_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._averaged is not None:
            self._averaged.multi_avg_fn = average(min(recipe.ema, (1 + step) / (10 + step)))
            self._averaged.update_parameters(self.model)
        if self._schedule is not None:
            self._schedule.step()
            self._follow()
        measured = self.team.sum(sums)
        watch.lap("optimizer")
        self._pending.append(_Pending(measured, watch))
        self.run.step += 1

    def _loss(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The mean loss of some of a step's images, uint8, and how many of them are classified correctly."""
        recipe = self.recipe
        mix = draw_mix(recipe, step, *images.shape[-2:])
        prepared, targets = normalise(images, self._mean, self._std), labels
        if mix is not None:
            prepared, targets = mixed(mix, prepared, labels, self._classes)
            labels = targets.argmax(1)
        with autocast(self.team.device, recipe.precision):
            logits = self._net(prepared.contiguous(memory_format=self._format)).float()
        wanted = (len(images), self._classes)
        if logits.shape != wanted:
            raise ValueError(f"the model must return logits {wanted}; it returned {tuple(logits.shape)}")
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _follow(self) -> None:
        """Put the layers of every copy of the model where the schedule has put the model's."""
        assert self._schedule is not None
        for other in (self.model, self._averaged.module if self._averaged else None):
            if other is not None and other is not self._given:
                self._schedule.follow(other)

    def read(self) -> Metrics:
        """Wait for the steps taken so far, and return the record of the last one.

        Raises:
            Diverged: The loss of one of them is not finite.
        """
        run = self.run
        loss, correct, step, epoch = math.nan, 0.0, 0, 0
        seconds: dict[str, float] = {}
        measured = torch.stack([pending.measured for pending in self._pending]).tolist()
        for pending, (loss, correct) in zip(self._pending, measured, strict=True):
            step = len(run.step_seconds) + 1
            epoch = (step - 1) // self.steps_per_epoch + 1
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at epoch {epoch}, step {step}: {_REMEDY}")
            run.loss_sum += loss
            run.correct += correct
            seconds = pending.watch.seconds()
            run.step_seconds.append(sum(seconds.values()))
            for phase, value in seconds.items():
                run.phase_sums[phase] += value
        self._pending.clear()
        assert step == run.step, "every step is read once"
        speed = {"images_per_second": self.batch / run.step_seconds[-1]}
        return self._record("step", epoch, 1, loss, correct) | speed | phase_metrics(seconds, 1)

    def _record(self, kind: str, epoch: int, steps: int, loss_sum: float, correct: float) -> Metrics:
        """What the records of a step and of an epoch of so many begin with."""
        return {
            "kind": kind,
            "epoch": epoch,
            "step": self.run.step,
            "lr": learning_rate(self.recipe, self.run.step - 1, self.steps_per_epoch),
            "train_loss": loss_sum / steps,
            "train_accuracy": correct / (steps * self.batch),
        }

    def end_epoch(self) -> Metrics:
        """Validate after the last step of an epoch, and return its record, which is in the history too.

        Raises:
            Diverged: A weight or the validation loss is not finite.
        """
        run = self.run
        epoch = run.step // self.steps_per_epoch
        self.require_finite_weights()
        loss, accuracy = self._measure(self._evaluated, "val")
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after epoch {epoch}, step {run.step}: {_REMEDY}")
        record: Metrics = self._record("epoch", epoch, self.steps_per_epoch, run.loss_sum, run.correct) | {
            "val_loss": loss,
            "val_accuracy": accuracy,
            "images_per_second": self._speed(run.step - self.steps_per_epoch),
            **phase_metrics(run.phase_sums, self.steps_per_epoch),
        }
        if self.recipe.until:
            record["train_accuracy_evaluated"] = self._measure(self._evaluated, "train")[1]
        run.loss_sum = run.correct = 0.0
        run.phase_sums = dict.fromkeys(PHASES, 0.0)
        run.history.append(record)
        best = run.history[run.best_epoch - 1]
        if not run.best_epoch or (accuracy, -loss) > (best["val_accuracy"], -best["val_loss"]):
            run.best_epoch = epoch
            weights = self._evaluated.state_dict()
            run.best_weights = {
                name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                for name, value in weights.items()
            }
        return record

    def finish(self) -> dict[str, Any]:
        """Put the selected weights into the model, and measure them and the last ones on the test images.

        Returns:
            The fields of a ``Result`` that measure the weights and the steps.
        """
        run = self.run
        (_, last), on_train_last = (self._measure(self._evaluated, split) for split in ("test", "train"))
        self.model.load_state_dict(run.best_weights)
        if self._schedule is not None:  # the layers are again what they were when the weights were chosen
            self._schedule.load_state_dict({"done": run.best_epoch * self.steps_per_epoch})
            self._follow()
        self.model.eval()
        test, (train_loss, train_accuracy) = last, on_train_last
        if run.best_epoch != self.epochs_done:
            _, test = self._measure(self.model, "test")
            train_loss, train_accuracy = self._measure(self.model, "train")
        if self._given is not self.model:
            self._given.load_state_dict(
                {n: whole(v) if isinstance(v, Tensor) else v for n, v in run.best_weights.items()}
            )
            self._given.to(self.team.device).eval()
        return {
            "epochs": self.epochs_done,
            "steps": run.step,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "train_accuracy_last": on_train_last[1],
            "val_accuracy": run.history[run.best_epoch - 1]["val_accuracy"],
            "best_epoch": run.best_epoch,
            "test_accuracy": test,
            "test_accuracy_last": last,
            "images_per_second": self._speed(0),
        }

    def require_finite_weights(self) -> None:
        """Raise :class:`Diverged` if a weight is not finite, so that no checkpoint holds it."""
        norm = nn.utils.get_total_norm([weight.detach() for weight in self.model.parameters()])
        if not math.isfinite(whole(norm).item()):
            raise Diverged(f"a weight is not finite after step {self.run.step}: {_REMEDY}")

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return all that a checkpoint needs: what JSON can hold, and tensors by name.

        No generator states: every step seeds its own.
        """
        for model in self._models().values():
            self.team.share(model.buffers())  # any process may write them, and the first one's count
        run = {name: value for name, value in vars(self.run).items() if name not in TENSORS}
        tensors: dict[str, Any] = {"step_seconds": torch.tensor(self.run.step_seconds, dtype=torch.float64)}
        for kind, model in self._models().items():
            tensors |= _prefixed(kind, model.state_dict())
        tensors |= _prefixed("best", self.run.best_weights)
        names: dict[Tensor, str] = {weight: name for name, weight in self.model.named_parameters()}
        for weight, held in self._optimizer.state.items():
            kept = {f"{names[weight]}/{name}": value for name, value in held.items() if isinstance(value, Tensor)}
            tensors |= _prefixed("optimizer", kept)  # muon also notes which weights are its own: it asks their shape
        facts = {
            "run": run,
            "model": self._made_of,
            "scaler": self._scaler.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
        }
        return facts, tensors

    def restore(self, saved: checkpoint.Saved) -> None:
        """Go back to a :meth:`state` that was saved.

        Raises:
            ValueError: It is of another model, or not what a checkpoint holds.
        """
        tensors: dict[str, Any] = {}
        weights = self.model.state_dict()
        for kind, model in self._models().items():
            tensors |= _prefixed(kind, model.state_dict())
        self._require_same_model(saved, weights)
        if any(name.startswith("best/") for name in saved.layout):
            empty = {n: torch.empty_like(v) if isinstance(v, Tensor) else v for n, v in weights.items()}
            tensors |= _prefixed("best", empty)
        owners = dict(self.model.named_parameters())
        held_by: dict[str, set[str]] = {}
        for name, (shape, dtype) in saved.layout.items():
            if name.startswith("optimizer/"):
                owner, _, held = name.removeprefix("optimizer/").rpartition("/")
                held_by.setdefault(owner, set()).add(held)
                if owner not in owners or shape not in (owners[owner].shape, ()):
                    raise saved.unusable(f"{name} is no state of a weight")
                weight = owners[owner].detach()
                alike = shape == weight.shape
                tensors[name] = torch.zeros_like(weight, dtype=dtype) if alike else weight.new_zeros(shape, dtype=dtype)
        if any(held not in HELD[self.recipe.optimizer] for held in held_by.values()):
            raise saved.unusable(f"a weight has not the state of {self.recipe.optimizer}")
        shape, dtype = saved.layout.get("step_seconds", (torch.Size(), torch.bool))
        if len(shape) != 1 or dtype != torch.float64:
            raise saved.unusable("there are no times of steps")
        tensors["step_seconds"] = torch.empty(shape, dtype=dtype)
        scaler, moved = saved.facts.get("scaler"), saved.facts.get("schedule")
        if scaler is None or not _alike(scaler, self._scaler.state_dict()):
            raise saved.unusable("its scale of the loss is not that of a run")
        if not _alike(moved, None if self._schedule is None else self._schedule.state_dict()):
            raise saved.unusable("its schedule is not that of this run")
        checkpoint.load(saved, tensors, self.team)
        best = _under("best", tensors)
        try:
            run = restored(
                saved.facts.get("run", {}), tensors["step_seconds"].tolist(), best, self.steps_per_epoch,
                bool(self.recipe.until),
            )  # fmt: skip
        except ValueError as error:
            raise saved.unusable(error) from error

        for kind, model in self._models().items():
            model.load_state_dict(_under(kind, tensors))
        for name, value in _under("optimizer", tensors).items():
            owner, held = name.rsplit("/", 1)
            self._optimizer.state[owners[owner]][held] = value
        self._scaler.load_state_dict(scaler)
        if self._schedule is not None and moved is not None:
            self._schedule.load_state_dict(moved)
            self._follow()
        self.run = run

    def _models(self) -> dict[str, nn.Module]:
        """What is trained, and its average where there is one, by the names a checkpoint has for them."""
        return {"model": self.model} | ({} if self._averaged is None else {"averaged": self._averaged})

    def _require_same_model(self, saved: checkpoint.Saved, weights: dict[str, Any]) -> None:
        """Raise a ValueError that names the tensors in which a checkpoint's model differs from this one."""
        here = {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
        there = {name: tuple(shape) for name, (shape, _) in _under("model", saved.layout).items()}
        made_of = saved.facts.get("model")
        if not isinstance(made_of, dict):
            raise saved.unusable("it does not say of which model")
        shapes = checkpoint.differing(here, there)  # first: they say the most
        checkpoint.require_same("model", saved.path, shapes or checkpoint.differing(self._made_of, made_of))

    def _measure(self, model: nn.Module, split: str) -> tuple[float, float]:
        """The mean loss and the accuracy of a model on a split."""
        batches, count = self.feed.evaluation(split), self.feed.count(split)
        precision = self.recipe.precision
        return measure(model, batches, count, self._mean, self._std, precision=precision, team=self.team)

    def _speed(self, since: int) -> float:
        """Images per second by the median of the steps from `since` (from 0) on, without first ones."""
        times = self.run.step_seconds
        steady = [times[step] for step in range(since, len(times)) if step not in self.run.starts]
        return self.batch / statistics.median(steady or times[since:])


_REMEDY = (
    "lower lr, lengthen warmup_epochs, set clip_grad_norm, or use a wider precision; the last checkpoint is from before"
)


def _alike(given: Any, own: dict[str, Any] | None) -> bool:
    """Whether a state from JSON has the names of one's own, and finite numbers of the same types."""
    if own is None or given is None:
        return own is given
    return (
        isinstance(given, dict)
        and given.keys() == own.keys()
        and all(type(given[n]) is type(v) and math.isfinite(given[n]) and given[n] >= 0 for n, v in own.items())
    )


def _prefixed(kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind}/{name}": value for name, value in tensors.items()}


def _under(kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {n.removeprefix(f"{kind}/"): value for n, value in tensors.items() if n.startswith(f"{kind}/")}
