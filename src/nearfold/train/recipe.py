"""The recipe: everything that decides how a model is trained, and nothing about where the results go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from nearfold._numbers import LARGEST, MOST, plain, shown
from nearfold.train.augment import AUGMENTATIONS
from nearfold.train.transforms import IMAGE_AUGMENTATIONS

PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)

MOST_SEED = 2**63 - 1
_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "sgd", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "augment": (*AUGMENTATIONS, *IMAGE_AUGMENTATIONS),
    "precision": tuple(PRECISIONS),
}
_LEAST = {"epochs": 1, "batch_size": 1, "accumulate": 1, "seed": 0}  # the integers
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda v: v > 0, "a number above 0"),
    "weight_decay": (lambda v: v >= 0, "a number of at least 0"),
    "momentum": (lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "warmup_epochs": (lambda v: v >= 0, "a number of at least 0"),
    "label_smoothing": (lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "clip_grad_norm": (lambda v: v >= 0, "a number of at least 0 (0 switches clipping off)"),
    "mixup": (lambda v: v >= 0, "a number of at least 0 (0 switches it off)"),
    "cutmix": (lambda v: v >= 0, "a number of at least 0 (0 switches it off)"),
    "ema": (lambda v: 0 <= v < 1, "a decay in [0, 1) (0 switches averaging off)"),
    "until": (lambda v: 0 <= v <= 1, "an accuracy in [0, 1] (0: train for all epochs)"),
}


@dataclass(frozen=True)
class Recipe:
    """How to train a model. Two runs of equal recipe, data and initial weights are the same run.

    Attributes:
        epochs: Passes over the training images. Each leaves out the images, other ones in every epoch,
            that do not fill a batch.
        batch_size: Images a step, over all processes together; all of them where there are fewer.
        accumulate: Parts into which a process divides its share of a batch and which it computes one after the other,
            to save memory. Loss and gradient are the means over the whole batch all the same, so that parts change
            nothing but rounding, what batch normalisation sees, and the draws of dropout and sampled candidates.
        optimizer: ``"adamw"`` (betas 0.9 and 0.999), ``"sgd"`` (Nesterov momentum where it is not 0) or ``"muon"``:
            orthogonalised Nesterov momentum for matrices and kernels, AdamW, also with Nesterov momentum, at a fifth of
            `lr` for the rest (timm's implementation; needs the extra `vision`).
        lr: Highest learning rate, reached after the warmup.
        weight_decay: Decay of every parameter: decoupled for adamw and muon, L2 for sgd.
        momentum: Momentum of sgd and muon; adamw ignores it.
        warmup_epochs: Epochs, also a fraction, over which the rate rises linearly to `lr`.
        schedule: After the warmup: ``"cosine"``, half a cosine from `lr` to 0, ``"linear"``, a straight line to 0, or
            ``"constant"``.
        label_smoothing: Share of the target spread evenly over all classes.
        clip_grad_norm: Gradients are scaled down to this global 2-norm; 0: never.
        augment: ``"none"``, ``"crop_flip"`` (random shift and horizontal mirroring), ``"shift_flip"`` (the same by half
            as much, reflected at the border: for short trainings) or ``"randaugment"`` (crop_flip, then RandAugment;
            needs the extra `vision`). For data that are read from files (``open_data``):
            ``"none"``, ``"resized_crop"`` (a random part, resized, and mirroring), ``"resized_randaugment"`` (then
            RandAugment) or ``"resized_erasing"`` (then random erasing). Mirroring is wrong for digits and letters.
        mixup: Every image is added to another one with a random share, and so are their labels: the share is drawn
            from Beta(mixup, mixup), once for each step; 0: never. With `cutmix` too, each is done in half of the
            steps. The training accuracy of a step then counts the label of the greater share.
        cutmix: A random rectangle of every image is replaced by another one's, and the labels are mixed by area: the
            area is drawn from Beta(cutmix, cutmix); 0: never.
        ema: Decay per step of an exponential moving average of weights and buffers, which is then what is
            validated and saved; 0: none. It ramps up, min(ema, (1 + step) / (10 + step)), so that a
            short run does not average in its initial weights.
        until: The run ends after the first epoch at whose end the training images, evaluated without augmentation
            (up to 10,000 of them), are classified with at least this accuracy; 0: only after the last epoch.
        precision: ``"float32"``, or autocast to ``"bfloat16"`` or ``"float16"`` (with loss scaling).
        channels_last: Hold images and weights of four dimensions with the channels last in memory, which convolutions
            take faster in low precision; it changes nothing but rounding, and which elements dropout draws.
        device: ``"auto"`` (CUDA where there is a device, else the CPU) or a torch device such as
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``. Under torchrun ``"cuda"`` is each process's own device.
        seed: Decides order, augmentation, dropout and sampled candidates. The initial weights are the
            caller's.
        deterministic: Refuse operations without a deterministic implementation, so that a run on CUDA
            can be repeated to the bit too (slower; torch asks for CUBLAS_WORKSPACE_CONFIG=:4096:8 in the
            environment). A run on the CPU can be repeated anyway, with as many threads.

    Raises:
        ValueError: A field is of the wrong type, out of range or not among the choices.

    Example:
        >>> Recipe(epochs=5, lr=3e-4).epochs
        5
        >>> Recipe(optimizer="adam")
        Traceback (most recent call last):
        ...
        ValueError: Recipe.optimizer must be one of 'adamw', 'sgd', 'muon'; got 'adam'
    """

    epochs: int = 20
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    warmup_epochs: float = 1.0
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    clip_grad_norm: float = 1.0
    augment: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    until: float = 0.0
    precision: str = "float32"
    channels_last: bool = False
    device: str = "auto"
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # NumPy's numbers, as a sweep draws them, are taken
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                self._refuse(name, f"one of {', '.join(map(repr, choices))}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                self._refuse(name, f"an integer of at least {least}")
            if value > (most := MOST_SEED if name == "seed" else MOST):
                self._refuse(name, f"at most {most}")
        for name, (valid, wanted) in _NUMBERS.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not abs(value) <= LARGEST or not valid(value):
                self._refuse(name, wanted)
        if self.warmup_epochs > self.epochs:
            self._refuse("warmup_epochs", f"at most epochs={self.epochs}")
        for name in ("channels_last", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        if self.device != "auto":
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError):
                self._refuse("device", "'auto' or a torch device such as 'cpu', 'cuda' or 'cuda:0'")

    def _refuse(self, name: str, wanted: str) -> None:
        raise ValueError(f"Recipe.{name} must be {wanted}; got {shown(getattr(self, name))}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name: numbers, strings and booleans only, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """Build a recipe from fields by name; the others keep their defaults.

        Raises:
            ValueError: A name is not a field, or a value does not fit.

        Example:
            >>> Recipe.from_dict({"epochs": 3}) == Recipe(epochs=3)
            True
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ValueError(f"Recipe has no field {', '.join(map(repr, unknown))}; the fields are {', '.join(known)}")
        return cls(**fields)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of one step: linear warmup, then the recipe's schedule.

    Args:
        recipe: The recipe.
        step: Steps done before this one, over all epochs.
        steps_per_epoch: Steps an epoch.

    Returns:
        The rate. The first warmup step has already one part of it, the last one all of it.

    Example:
        >>> recipe = Recipe(epochs=4, lr=1.0, warmup_epochs=1)
        >>> [round(learning_rate(recipe, step, 2), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * min(1.0, (step + 1) / warmup)
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (step - warmup) / (recipe.epochs * steps_per_epoch - warmup)
    if recipe.schedule == "linear":
        return recipe.lr * (1 - progress)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))
