"""Every network of the table at a small size, and images for it."""

from __future__ import annotations

import pytest
import torch

from helpers.cells import slow_but
from nearfold.models import MODELS, create

NAMES = sorted(MODELS)
every = pytest.mark.parametrize("name", NAMES)
CLASSES = 5


def sizes(name: str) -> list[tuple[int, int]]:
    """Two sizes of images, the first odd and not square; smaller where the network was published for small ones."""
    return [(33, 47), (40, 32)] if MODELS[name].input_size[1] < 64 else [(65, 97), (64, 80)]


def tiny(name: str, **arguments):
    torch.manual_seed(0)
    given = {"num_classes": CLASSES, "img_size": sizes(name)[0]} | MODELS[name].tiny | arguments
    return create(name, **given)


def images(name: str, which: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, *sizes(name)[which], generator=torch.Generator().manual_seed(1))


def one_of_each_kind() -> list[str]:
    """Networks among which every class and every layer is found."""
    chosen, seen = [], set()
    for name in NAMES:
        kinds = {MODELS[name].network, MODELS[name].arguments.get("layer"), MODELS[name].arguments.get("block")}
        if kinds - seen:
            chosen.append(name)
            seen |= kinds
    return chosen


every_kind = pytest.mark.parametrize("name", slow_but(one_of_each_kind(), NAMES))
"""Quick for one network of each kind, for the code is theirs; slow for all others."""
