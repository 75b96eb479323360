"""What a task of known structure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""(how many, generator) -> float images (N, C, H, W), in 0..1 or a little beyond, and int64 labels (N,)."""

NOISE = 0.1
"""Standard deviation of the noise of a made picture, in shares of the range from black to white."""
FAINT = 0.03
"""That of marks and symbols."""


@dataclass(frozen=True)
class Structure:
    """A classification task, made from a seed, and the words it was made from.

    Attributes:
        title: in tables.
        path: where an operator has to look.
        shape: in which form.
        weight: what it has to value.
        perfect: what a perfect operator would do.
        notation: an operator of that kind.
        classes: their names.
        size: channels, height and width of an image.
        draw: makes images.
        held_out: makes the test images, where they have a source of their own.
        real: whether the images come from the world, and not from a rule.

    The same number of images of every class is expected; the share of right guesses is one in ``len(classes)``.
    """

    title: str
    path: str
    shape: str
    weight: str
    perfect: str
    notation: str
    classes: tuple[str, ...]
    size: tuple[int, int, int]
    draw: Draw
    held_out: Draw | None = None
    real: bool = False


def labels(count: int, classes: int, rng: torch.Generator) -> Tensor:
    """Labels (count,), the classes as evenly as they go, in random order."""
    return (torch.arange(count) % classes)[torch.randperm(count, generator=rng)]


def noisy(images: Tensor, rng: torch.Generator, sigma: float = NOISE) -> Tensor:
    """The images with Gaussian noise."""
    return images + sigma * torch.randn(images.shape, generator=rng)


def below(limits: Tensor | int, count: int, rng: torch.Generator) -> Tensor:
    """Random whole numbers (count,) from 0 to `limits` - 1, which may differ from row to row."""
    return (torch.rand(count, generator=rng) * limits).long()


def distinct(count: int, many: int, of: int, rng: torch.Generator) -> Tensor:
    """For every row `many` different numbers below `of`, in random order: int64 (count, many)."""
    return torch.rand(count, of, generator=rng).argsort(1)[:, :many]


def balanced(count: int, many: int, of: int, rng: torch.Generator) -> Tensor:
    """For every row `many` numbers below `of`, each as often as the others, in random order: int64 (count, many).

    What stands in a map as often whatever the label is cannot be counted instead of found.
    """
    return (torch.arange(many) % of)[torch.rand(count, many, generator=rng).argsort(1)]


def one_of(there: Tensor, rng: torch.Generator) -> Tensor:
    """One of the places that are marked in each row of `there`, bool (N, P): int64 (N,)."""
    assert there.any(1).all()
    return (torch.rand(there.shape, generator=rng) * there).argmax(1)


def one_hot(values: Tensor, classes: int) -> Tensor:
    """float32 (..., classes)."""
    return torch.nn.functional.one_hot(values, classes).float()
