"""What happens between making a network and its first step."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from nearfold.train.data import ImageData
from nearfold.train.distributed import Team
from nearfold.train.evaluation import normalise
from nearfold.train.feed import Streamed, open_feed
from nearfold.train.recipe import Recipe

BATCH, BATCHES = 500, 10


def begin(model: nn.Module, data: ImageData | Streamed) -> None:
    """Show a fresh network some of its training images, where it wants to see them (`nearfold.models.Network.start`).

    Up to 5,000, without augmentation, the same for every seed. Call it before `fit`, and not on trained weights.

    Args:
        model: on the CPU. One that is no `Network`, or has nothing to take, stays as it is.
        data: what it will be trained on.

    Example:
        >>> from nearfold.models import create
        >>> from nearfold.train import load_data
        >>> net, data = create("resnet8s_conv", in_chans=1), load_data("digits", limit=100)
        >>> begin(net, data)
        >>> net.stem.bias.abs().sum().item()
        0.0
    """
    from nearfold.models.network import Network  # it brings all of the networks in

    if not isinstance(model, Network) or type(model).start is Network.start:
        return
    feed = open_feed(data, Recipe(batch_size=BATCH), Team(0, 1, torch.device("cpu")))
    try:
        images = torch.cat([batch for batch, _ in islice(feed.evaluation("train"), BATCHES)])
    finally:
        feed.close()
    model.start(normalise(images, data.mean, data.std))
