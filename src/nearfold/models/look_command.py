"""`nearfold look`: the command line of `nearfold.look`."""

from __future__ import annotations

import argparse
import re

from nearfold.look.picture import DEFAULT, look
from nearfold.models.look import look_into
from nearfold.options import brief, file, whole

SIZE = 28
EXAMPLES = """\
examples:
  nearfold look sample:china.jpg --at 190,255
  nearfold look photo.jpg --at 120,300 --op conv --op convnn --op "all | row | softmax(heads=4)"
  nearfold look photo.jpg --model resnet8s_hybrid
  nearfold look sample:flower.jpg --size 40 --op swin --op swin_shifted --out swin.png"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser.

    >>> parser = argparse.ArgumentParser()
    >>> arguments(parser)
    >>> parser.parse_args(["photo.jpg", "--at", "10,20"]).at
    (10, 20)
    """
    parser.add_argument(
        "image", metavar="IMAGE", help="a file, or sample:china.jpg or sample:flower.jpg, which come with scikit-learn"
    )
    parser.add_argument(
        "--op", action="append", metavar="NOTATION", dest="operations",
        help="an operator in the notation, or its name in `ops`; give it again for more (default: "
        f"{', '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument(
        "--at", type=_position, metavar="Y,X", help="the position asked, row and column in pixels (default: the middle)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="draw the layers of this trained network instead: one that `nearfold models --pretrained` lists",
    )
    parser.add_argument(
        "--size", type=whole(2, 1000), metavar="N", help=f"the image is seen as N x N patches (default: {SIZE})"
    )
    parser.add_argument("--out", type=file, default="look.png", metavar="FILE", help="default: look.png")


def run(args: argparse.Namespace) -> int:
    """Draw the picture, write it, and say where: the exit code."""
    formats = (".png", ".pdf", ".svg", ".jpg")
    if args.out.suffix.lower() not in formats:
        raise ValueError(f"--out {args.out}: the picture can be written as {', '.join(formats)}")
    if args.model is not None:
        if args.operations or args.size is not None:
            raise ValueError(
                f"--model {args.model} draws the layers of a network as they are: leave out --op and --size, or --model"
            )
        figure = look_into(args.model, args.image, args.at)
    else:
        figure = look(args.image, args.operations or DEFAULT, args.at, size=args.size or SIZE)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(args.out)
    return 0


def _position(text: str) -> tuple[int, int]:
    if not re.fullmatch("[0-9]{1,9},[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"wanted row and column in pixels, such as 190,255; got {brief(text)}")
    row, column = text.split(",")
    return int(row), int(column)
