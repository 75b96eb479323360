"""`nearfold train`: the command line of `fit`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import math
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfold._own_code import executed
from nearfold.grammar import parse
from nearfold.models import SpectrumNet, create, stem_stride
from nearfold.models.registry import PREFIX, entry_of
from nearfold.options import PIXELS, above, folder, whole
from nearfold.train.begin import begin
from nearfold.train.data import ImageData, load_data
from nearfold.train.loop import fit
from nearfold.train.memory import require_trainable
from nearfold.train.recipe import Recipe
from nearfold.train.stream import StreamData, open_data

EXAMPLES = """\
examples:
  nearfold train
  nearfold train --op convnn --epochs 30 --out runs/convnn
  nearfold train --op "all | row | softmax(heads=4)" --data path/to/cifar10 --augment crop_flip
  nearfold train --op convnn --epochs 30 --out runs/convnn --resume
  nearfold train --model resnet18_hybrid --data path/to/cifar10 --augment crop_flip --out runs/hybrid
  nearfold train --import my_words.py --op "criss_cross | box | softmax(heads=2)"
  torchrun --nproc-per-node 2 -m nearfold train --batch-size 256
  torchrun --nproc-per-node 8 --max-restarts 3 -m nearfold train --op convnn --parallel fsdp --out runs/convnn"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    data_arguments(parser)
    parser.add_argument(
        "--op", metavar="NOTATION",
        help="the mixing layer of the small network, in the notation or by its name in `ops` (default: conv)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="NAME", help="train this one of the networks that `nearfold models` lists, not the small one"
    )
    parser.add_argument(
        "--import", type=Path, metavar="FILE.py", dest="own_code",
        help="first execute a Python file, which may do whatever Python can: one that registers words "
        "(docs/howto/own_word.md) or networks of your own, for --op and --model",
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
    parser.add_argument(
        "--width", type=whole(1, PIXELS), metavar="C", help="channels of the small network (default: 32)"
    )
    parser.add_argument("--depth", type=whole(1, 1000), metavar="N", help="blocks of the small network (default: 2)")
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
    _require_options(args)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    with contextlib.ExitStack() as at_end:
        made_from: dict[str, Any] = {}
        if args.own_code is not None:
            at_end.enter_context(executed(args.own_code))
            check = hashlib.sha256(args.own_code.read_bytes()).hexdigest()
            made_from = {"import": args.own_code.name, "import_sha256": check}
        name, build = _network(args)
        data = (
            load_data(args.data, limit=args.limit, label_column=args.label_column)
            if args.stream is None
            else open_data(args.data, image_size=args.stream, label_column=args.label_column)
        )
        size = (data.channels, *data.size)
        try:
            require_trainable(lambda: build(data)[0], size)
        except ValueError as error:
            images = " x ".join(map(str, size))
            raise ValueError(f"{name} cannot be trained on images of {images}: {error}") from error
        torch.manual_seed(recipe.seed)
        model, said = build(data)
        begin(model, data)
        result = fit(
            model, data, recipe, out=args.out, resume=args.resume, tensorboard=args.tensorboard,
            checkpoint_every=args.checkpoint_every or 0, parallel=args.parallel, compile=args.compile,
            workers=args.workers, made_from=said | made_from,
        )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":  # under torchrun, one process speaks
        print(
            f"{name}\n{data.name}: test accuracy {100 * result.test_accuracy:.1f} % (weights of epoch "
            f"{result.best_epoch}, the best on the validation images: {100 * result.val_accuracy:.1f} %), "
            f"{result.images_per_second:,.0f} images/s, {result.seconds:.0f} s"
            + (f"\nin {args.out}" if args.out else "")
        )
    return 0


def _require_options(args: argparse.Namespace) -> None:
    """ValueError for options that do not go together."""
    if args.out is None and (args.resume or args.tensorboard):
        flag = "--resume" if args.resume else "--tensorboard"
        raise ValueError(f"{flag} needs --out DIR, the folder of the run")
    if args.stream is not None and args.limit is not None:
        raise ValueError("--limit is for data held in memory: leave it out, or --stream")
    for name in ("op", "width", "depth") if args.model is not None else ():
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name} is for the small network around one operator, which --model {args.model} is not: leave out "
                f"--{name}, or --model"
            )


Build = Callable[[ImageData | StreamData], tuple[nn.Module, dict[str, Any]]]
"""A network for a data set, and what it was made from, as JSON has it."""


def _network(args: argparse.Namespace) -> tuple[str, Build]:
    """What is to be trained, in words, and how it is made."""
    if args.model is not None:
        name = args.model.removeprefix(PREFIX)
        entry_of(name)  # names that are not known are said before data are read

        def create_named(data: ImageData | StreamData) -> tuple[nn.Module, dict[str, Any]]:
            given: dict[str, Any] = {
                "num_classes": len(data.classes),
                "in_chans": data.channels,
                "img_size": list(data.size),
            }
            return create(name, **given), {"model": name, "arguments": given}

        return name, create_named
    operation = parse("conv" if args.op is None else args.op)
    size = {"width": args.width or 32, "depth": args.depth or 2}

    def create_small(data: ImageData | StreamData) -> tuple[nn.Module, dict[str, Any]]:
        given = {"in_channels": data.channels, "classes": len(data.classes), "stride": stem_stride(data.size), **size}
        return SpectrumNet(operation, **given), {"op": str(operation), "arguments": given}

    return str(operation), create_small


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which images."""
    parser.add_argument(
        "--data", default="digits", metavar="SOURCE",
        help="digits (8x8 handwriting, comes along; default), made:NAME (a task of known structure), or a folder of "
        "Hugging Face parquet files, of WebDataset tar files, or of images, train/CLASS/*.png",
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
