"""`nearfold evaluate`: the test accuracy of a network whose weights come along, beside what is stated of it."""

from __future__ import annotations

import argparse

import torch

from nearfold.models.pretrained import Pretrained, weights_of
from nearfold.models.registry import PREFIX, create
from nearfold.options import brief
from nearfold.train.data import load_data
from nearfold.train.distributed import Team
from nearfold.train.evaluation import measure

BATCH = 250
EXAMPLES = """\
examples:
  nearfold evaluate resnet8s_conv --data cifar10=path/to/cifar10
  nearfold models --pretrained"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("name", metavar="NAME", help="one of the networks that `nearfold models --pretrained` lists")
    parser.add_argument(
        "--data", required=True, metavar="NAME=FOLDER",
        help="the data set that it was trained on: cifar10=path/to/cifar10; digits come along",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Count, and say what is stated: the exit code."""
    stated = weights_of(args.name.removeprefix(PREFIX))
    name, _, folder = args.data.partition("=")
    if name != stated.data or not (folder or name == "digits"):
        raise ValueError(
            f"--data must say where {stated.data} is, on which {stated.name} was trained: --data {stated.data}=FOLDER; "
            f"got {brief(args.data)}"
        )
    correct, tested = count(stated, folder or name)
    print(f"{stated.name}: {correct:,} of {tested:,} test images, {100 * correct / tested:.2f} %")
    same = (correct, tested) == (stated.correct, stated.tested)
    print(f"stated: {stated.correct:,} of {stated.tested:,}, " + ("the same" if same else "not the same"))
    return 0


def count(stated: Pretrained, source: str) -> tuple[int, int]:
    """How many test images of a data set the weights classify correctly, in float32, and how many there are.

    Args:
        stated: the record of the weights.
        source: what `nearfold.train.load_data` takes.

    Raises:
        ValueError: the data set has other classes or channels.
    """
    data = load_data(source)
    if data.classes != stated.classes or data.channels != len(stated.mean):
        wanted = f"{len(stated.mean)} channels and the classes {brief(', '.join(stated.classes))}"
        found = f"{data.channels} and {brief(', '.join(data.classes))}"
        raise ValueError(f"{stated.name} was trained on images of {wanted}; {source} has {found}")
    network = create(stated.name, pretrained=True)
    batches = zip(data.test.images.split(BATCH), data.test.labels.split(BATCH), strict=True)
    mean, std, tested = torch.tensor(stated.mean), torch.tensor(stated.std), len(data.test)
    team = Team(0, 1, torch.device("cpu"))
    _, accuracy = measure(network, batches, tested, mean, std, precision="float32", team=team)
    return round(accuracy * tested), tested
