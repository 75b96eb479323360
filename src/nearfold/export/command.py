"""`nearfold export`: a network as a file that other runtimes take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from nearfold.export.program import Exported
from nearfold.export.ways import to_aoti, to_onnx, to_pt2
from nearfold.models.named import WHAT, named
from nearfold.options import above, file, sizes

WAYS: dict[str, tuple[Callable[..., Exported], str]] = {
    "onnx": (to_onnx, ".onnx"),
    "pt2": (to_pt2, ".pt2"),
    "aoti": (to_aoti, ".pt2"),
}
EXAMPLES = """\
examples:
  nearfold export resnet8s_hybrid --pretrained --to onnx
  nearfold export resnet18_hybrid --to onnx --input 1,3,224,224 --dynamic sizes
  nearfold export torchvision:resnet18 --to pt2 --input 1,3,224,224
  nearfold export my_network.py:make_model --to aoti --input 1,3,32,32
  nearfold export runs/hybrid/pretrained --to onnx --input 1,3,32,32"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=WHAT,
    )
    parser.add_argument("--to", choices=tuple(WAYS), required=True, help="the format")
    parser.add_argument(
        "--input", type=_size, metavar="B,C,H,W", help="size of the input (default: one of the size the network is for)"
    )
    parser.add_argument("--out", type=file, metavar="FILE", help="the file (default: the network's name, here)")
    parser.add_argument(
        "--dynamic", choices=("batch", "sizes"), help="leave the batch, or all sizes open (default: none)"
    )
    parser.add_argument("--pretrained", action="store_true", help="with the weights that come along")
    parser.add_argument(
        "--tolerance", type=above(0), default=1e-3, metavar="SHARE",
        help="largest difference from the model, of its largest output (default: 0.001)",
    )  # fmt: skip


def _size(written: str) -> tuple[int, ...]:
    return sizes(written, 2, "batch, channels and grid, such as 1,3,224,224")


def run(args: argparse.Namespace) -> int:
    """Export, and say how it compares: the exit code."""
    write, ending = WAYS[args.to]
    model, size = named(args.model, args.pretrained)
    if args.input is None and size is None:
        raise ValueError(f"--input must say the size of an input of {args.model}, such as --input 1,3,224,224")
    shape = args.input or (1, *size)  # type: ignore[misc]
    out = args.out or Path(_name(args.model) + ending)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)
    print(write(model.eval(), x, out, dynamic=args.dynamic, tolerance=args.tolerance))
    return 0


def _name(spec: str) -> str:
    return Path(spec.rpartition(":")[2]).name or "network"
