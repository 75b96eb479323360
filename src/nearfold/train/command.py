"""`nearfold train`: the command line of `fit`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import os
import re
import typing
from collections.abc import Callable
from typing import Any

import torch

from nearfold.grammar import parse
from nearfold.models import SpectrumNet, stem_stride
from nearfold.options import PIXELS, above, folder, whole
from nearfold.train.data import load_data
from nearfold.train.loop import fit
from nearfold.train.memory import require_trainable
from nearfold.train.recipe import Recipe
from nearfold.train.stream import open_data

EXAMPLES = """\
examples:
  nearfold train
  nearfold train --op convnn --epochs 30 --out runs/convnn
  nearfold train --op "all | row | softmax(heads=4)" --data path/to/cifar10 --augment crop_flip
  nearfold train --op convnn --epochs 30 --out runs/convnn --resume
  torchrun --nproc-per-node 2 -m nearfold train --batch-size 256
  torchrun --nproc-per-node 8 --max-restarts 3 -m nearfold train --op convnn --parallel fsdp --out runs/convnn"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    data_arguments(parser)
    parser.add_argument(
        "--op", default="conv", metavar="NOTATION",
        help="the mixing layer, in the notation or by its name in `ops` (default: conv)",
    )  # fmt: skip
    parser.add_argument(
        "--label-column", metavar="NAME",
        help="the column of parquet files, or the field of KEY.json in tar files, with the labels (default: label, or "
        "fine_label)",
    )  # fmt: skip
    parser.add_argument(
        "--stream", type=whole(1, PIXELS), metavar="PIXELS",
        help="read images from parquet, tar or image files when they are needed, and make them so large, instead of "
        "holding all in memory",
    )  # fmt: skip
    parser.add_argument("--width", type=whole(1, PIXELS), default=32, metavar="C", help="channels (default: 32)")
    parser.add_argument("--depth", type=whole(1, 1000), default=2, metavar="N", help="blocks (default: 2)")
    parser.add_argument("--out", type=folder, metavar="DIR", help="keep metrics, checkpoint and weights here")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events to --out")
    parser.add_argument(
        "--checkpoint-every", type=whole(), metavar="N",
        help="steps between checkpoints within an epoch (default: one at the end of every epoch)",
    )  # fmt: skip
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="how the processes of torchrun hold the model: each all of it (ddp, default), or each a part (fsdp)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="train by torch.compile")
    parser.add_argument(
        "--workers", type=whole(0, 1000), default=0, metavar="N",
        help="processes that read ahead, of data that are not in memory (default: 0)",
    )  # fmt: skip
    _recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and say how well it went: the exit code."""
    if args.out is None and (args.resume or args.tensorboard):
        flag = "--resume" if args.resume else "--tensorboard"
        raise ValueError(f"{flag} needs --out DIR, the folder of the run")
    if args.stream is not None and args.limit is not None:
        raise ValueError("--limit is for data held in memory: leave it out, or --stream")
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    operation = parse(args.op)
    data = (
        load_data(args.data, limit=args.limit, label_column=args.label_column)
        if args.stream is None
        else open_data(args.data, image_size=args.stream, label_column=args.label_column)
    )

    def build() -> SpectrumNet:
        return SpectrumNet(
            operation, data.channels, len(data.classes),
            width=args.width, depth=args.depth, stride=stem_stride(data.size),
        )  # fmt: skip

    require_trainable(build, (data.channels, *data.size))
    torch.manual_seed(recipe.seed)
    model = build()
    result = fit(
        model, data, recipe, out=args.out, resume=args.resume, tensorboard=args.tensorboard,
        checkpoint_every=args.checkpoint_every or 0, parallel=args.parallel, compile=args.compile, workers=args.workers,
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":  # under torchrun, one process speaks
        print(
            f"{operation}\n{data.name}: test accuracy {100 * result.test_accuracy:.1f} % (weights of epoch "
            f"{result.best_epoch}, the best on the validation images: {100 * result.val_accuracy:.1f} %), "
            f"{result.images_per_second:,.0f} images/s, {result.seconds:.0f} s"
            + (f"\nin {args.out}" if args.out else "")
        )
    return 0


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which images."""
    parser.add_argument(
        "--data", default="digits", metavar="SOURCE",
        help="digits (8x8 handwriting, comes along; default), or a folder of Hugging Face parquet files, of WebDataset "
        "tar files, or of images, train/CLASS/*.png",
    )  # fmt: skip
    parser.add_argument("--limit", type=whole(), metavar="N", help="at most N training and N test images")


_TYPES: dict[type, Callable[[str], Any]] = {int: whole(0), float: above(-math.inf), str: str}
"""How a field of the recipe is read; the recipe knows its range."""


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag a field of the recipe, with the field's own type, default and documentation."""
    group = parser.add_argument_group("recipe")
    types = typing.get_type_hints(Recipe)
    documented = attribute_docs(Recipe)
    for field in dataclasses.fields(Recipe):
        text = f"{documented[field.name]} (default: {field.default})".replace("%", "%%")
        how: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if types[field.name] is bool
            else {"type": _TYPES[types[field.name]], "metavar": types[field.name].__name__.upper()}
        )
        group.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=text, **how)


def attribute_docs(cls: type) -> dict[str, str]:
    """The `Attributes:` section of a class's docstring: name to text, one line each.

    >>> class Pair:
    ...     '''Two.
    ...
    ...     Attributes:
    ...         left: The first
    ...             of two.
    ...         right: The other.
    ...     '''
    >>> attribute_docs(Pair)
    {'left': 'The first of two.', 'right': 'The other.'}
    """
    section = re.search(r"^Attributes:\n((?:(?: {4}.*)?\n)+)", f"{inspect.getdoc(cls)}\n", re.MULTILINE)
    assert section is not None, f"{cls.__name__} documents no attributes"
    items = re.findall(r"^ {4}(\w+): (.*\n(?: {8}.*\n)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(text.replace("``", "").replace("`", "").split()) for name, text in items}
