"""`nearfold describe`: a model by name or from a file, described."""

from __future__ import annotations

import argparse

from nearfold._own_code import guarded
from nearfold.options import sizes
from nearfold.recognise import configured
from nearfold.recognise.load import import_library, load_model, transformers_library
from nearfold.recognise.report import Description, describe

__all__ = ["arguments", "described", "guarded", "import_library", "load_model", "run", "text"]

EXAMPLES = """\
examples:
  nearfold describe torchvision:resnet50 --input 3,224,224
  nearfold describe timm:swin_tiny_patch4_window7_224
  nearfold describe transformers:ViTModel
  nearfold describe my_network.py:make_model --input 3,32,32"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument(
        "model",
        metavar="SPEC",
        help="timm:NAME, torchvision:NAME, transformers:NAME or path/to/file.py:factory (the file is run)",
    )
    parser.add_argument(
        "--input", type=_size, metavar="C,H,W",
        help="size of one input, for FLOPs and receptive fields (default: what timm and transformers say, else none)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Describe the model: the exit code."""
    print(text(args.model, args.input))
    return 0


def _size(written: str) -> tuple[int, ...]:
    return sizes(written, 2, "channels and grid, such as 3,224,224")


def text(spec: str, input_size: tuple[int, ...] | None = None) -> str:
    """The description of a model as text.

    Args:
        spec: as `load_model` takes it.
        input_size: channels and grid; without it a timm model is run on the size it was made for, one of
            transformers on pixels, ids or sound as it takes them, and others are not run.

    Raises:
        ValueError: as `load_model` and `describe` do.
    """
    where, _, name = spec.rpartition(":")
    if where == "transformers" and input_size is None:
        small = f"transformers:{name} in a small configuration: layers of the same kinds, fewer and narrower"
        return f"{described(name)}\n{small}"
    model = load_model(spec)
    if input_size is None:
        input_size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    return str(describe(model, None if input_size is None else tuple(input_size)))


def described(name: str) -> Description:
    """The first of the sizes and inputs of a model of transformers on which it runs."""
    errors = []
    for model in configured.models(transformers_library(), name):
        for inputs in configured.inputs(model):
            try:
                return describe(model, inputs=inputs)
            except ValueError as error:
                errors.append(error)
    raise ValueError(f"transformers:{name}: {errors[0]}; describe it without a run from a file") from errors[0]
