"""`nearfold export`: a network as a file that other runtimes take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nearfold.export.program import Exported
from nearfold.export.ways import to_aoti, to_onnx, to_pt2
from nearfold.options import above, brief, sizes

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
        help="a network that `nearfold models` lists, a folder that save_pretrained wrote, timm:NAME, torchvision:NAME "
        "or path/to/file.py:factory (the file is run)",
    )
    parser.add_argument("--to", choices=tuple(WAYS), required=True, help="the format")
    parser.add_argument(
        "--input", type=_size, metavar="B,C,H,W", help="size of the input (default: one of the size the network is for)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file (default: the network's name, here)")
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
    model, size = _loaded(args.model, args.pretrained)
    if args.input is None and size is None:
        raise ValueError(f"--input must say the size of an input of {args.model}, such as --input 1,3,224,224")
    shape = args.input or (1, *size)  # type: ignore[misc]
    out = args.out or Path(_name(args.model) + ending)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    print(write(model.eval(), x, out, dynamic=args.dynamic, tolerance=args.tolerance))
    return 0


def _name(spec: str) -> str:
    return Path(spec.rpartition(":")[2]).name or "network"


def _loaded(spec: str, pretrained: bool) -> tuple[nn.Module, tuple[int, ...] | None]:
    """A network, and the size (C, H, W) it is for where that is known."""
    from nearfold.models import from_pretrained
    from nearfold.models.registry import MODELS, create

    if ":" in spec:
        from nearfold.recognise.load import load_model

        if pretrained:
            raise ValueError("--pretrained is for the networks that `nearfold models --pretrained` lists")
        model = load_model(spec)
        found = (getattr(model, "default_cfg", None) or {}).get("input_size")
        return model, None if found is None else tuple(found)
    if spec in MODELS:
        return create(spec, pretrained=pretrained), MODELS[spec].input_size
    if Path(spec).is_dir():
        return from_pretrained(spec), None
    from nearfold.options import meant

    raise ValueError(
        f"MODEL must be a network that `nearfold models` lists, a folder that save_pretrained wrote, timm:NAME, "
        f"torchvision:NAME or path/to/file.py:factory; got {brief(spec)}{meant(spec, MODELS)}"
    )
