"""Batches of a feed put together and compared, and the recipe they are asked for with."""

from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from nearfold.train import Recipe
from nearfold.train.distributed import Team

NEEDS_TORCHVISION = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
CPU = torch.device("cpu")
RECIPE = Recipe(epochs=2, batch_size=24, lr=3e-3, augment="resized_crop", device="cpu", warmup_epochs=0)


def together(data, recipe, world, workers, step):
    """The batches of all processes of a team, put together."""
    feeds = [data.open_feed(recipe, Team(rank, world, CPU), workers) for rank in range(world)]
    batches = zip(*(feed.train(step) for feed in feeds), strict=True)
    return [tuple(map(torch.cat, zip(*shares, strict=True))) for shares in batches]


def same(one, other):
    assert len(one) == len(other)
    for (images, labels), (more_images, more_labels) in zip(one, other, strict=True):
        assert torch.equal(images, more_images) and torch.equal(labels, more_labels)


def identities(batches):
    pairs = [pair for batch in batches for pair in zip(*batch, strict=True)]
    return Counter((image.numpy().tobytes(), int(label)) for image, label in pairs)
