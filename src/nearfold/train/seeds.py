"""All randomness of a training run, derived from the recipe's seed and the place in the run.

Nothing random is carried from one step to the next: every step seeds what it draws from (seed, purpose,
step, ...). A resumed run therefore repeats the draws of an undisturbed one by construction, and a
checkpoint needs no generator states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def derive(seed: int, *place: int | str) -> int:
    """Return a seed (63 bits) for one purpose at one place of a run.

    Args:
        seed: The run's seed.
        place: What the seed is for and where, such as ``("order", epoch)``.

    Returns:
        The same number for the same arguments on every machine; unrelated ones otherwise.

    Example:
        >>> derive(0, "order", 1) == derive(0, "order", 1)
        True
        >>> derive(0, "order", 1) == derive(0, "order", 2)
        False
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *place: int | str) -> torch.Generator:
    """Return a CPU generator seeded with :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, *place))


def seed_step(model: nn.Module, seed: int, step: int, rank: int) -> None:
    """Seed what a model may draw from in one training step.

    That is torch's global generators (dropout) and every ``torch.Generator`` that a module of the model
    holds as an attribute (sampled candidates).

    Args:
        model: The model about to be called.
        seed: The run's seed.
        step: Steps done before this one, over all epochs.
        rank: The process's rank: processes draw differently, as their images differ.
    """
    torch.manual_seed(derive(seed, "step", step, rank))
    for index, module in enumerate(model.modules()):
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                value.manual_seed(derive(seed, "module", index, step, rank))


@contextmanager
def global_randomness_kept() -> Iterator[None]:
    """Give the caller's global generators, of the CPU and of every CUDA device, back as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
