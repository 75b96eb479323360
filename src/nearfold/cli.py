"""The command line: `nearfold ops`, `explain`, `look`, `describe`, `models`, `train` and `study spectrum`.

Exit codes: 0 done, 1 a study some of whose runs failed, 2 what was asked cannot be done (one clear message on stderr),
3 a fault of nearfold itself (one line; with NEARFOLD_DEBUG=1 in the environment the traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from nearfold import __version__, look_command
from nearfold.grammar import NotationError, parse
from nearfold.options import PIXELS, above, brief, folder, line, sizes, whole

INTRODUCTION = """\
Convolution and self-attention are two ends of one operator: look somewhere (path), in some
form (shape), and value what is found (weight). An operator is written in these three words:

    window(3) | box | kernel                    a 3x3 convolution
    all | row | softmax(heads=4)                self-attention
    nearest(9, cosine, self) | ranked | kernel  in between: read the 9 most similar positions"""

EXAMPLES = {
    "look": look_command.EXAMPLES,
    "": """\
start here:
  nearfold study spectrum        the main job: a few minutes on a laptop, ends with an HTML report
  nearfold ops                   the operators that have a name
  nearfold look sample:china.jpg where six of them look in a photograph
  nearfold describe torchvision:resnet18
                                 a network in these words, and its complexity
  nearfold explain "all | row | softmax(heads=4)" --shape 8,64,32,32
                                 which code would run, why, and what it costs
  nearfold train --op convnn     train one network around one operator""",
    "ops": """\
examples:
  nearfold ops
  nearfold ops swin deformable mamba convnn""",
    "explain": """\
examples:
  nearfold explain "window(3) | box | kernel" --shape 16,64,32,32
  nearfold explain "nearest(9, cosine, self) | ranked | kernel" --shape 16x64x32x32 --dtype bfloat16
  nearfold explain convnn --shape 8,32,100 --no-grad""",
    "describe": """\
examples:
  nearfold describe torchvision:resnet50 --input 3,224,224
  nearfold describe timm:swin_tiny_patch4_window7_224
  nearfold describe transformers:ViTModel
  nearfold describe my_network.py:make_model --input 3,32,32""",
    "models": """\
examples:
  nearfold models
  nearfold models "acmix_*"
  nearfold models resnet50_hybrid""",
    "train": """\
examples:
  nearfold train
  nearfold train --op convnn --epochs 30 --out runs/convnn
  nearfold train --op "all | row | softmax(heads=4)" --data path/to/cifar10 --augment crop_flip
  nearfold train --op convnn --epochs 30 --out runs/convnn --resume
  torchrun --nproc-per-node 2 -m nearfold train --batch-size 256
  torchrun --nproc-per-node 8 --max-restarts 3 -m nearfold train --op convnn --parallel fsdp --out runs/convnn""",
    "study": """\
example:
  nearfold study spectrum --help""",
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None: those of the process.

    Returns:
        The exit code.

    >>> main(["explain", "window(3) | box | kernel", "--shape", "nonsense"])
    2
    """
    try:
        args = _parser().parse_args(argv)
        return int(args.command(args))
    except SystemExit as stop:  # argparse's way to say that help was shown (0) or an argument was wrong (2)
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _say(error)


def _say(error: BaseException) -> int:
    """Tell in one line why the command ends, and return the exit code."""
    if os.environ.get("NEARFOLD_DEBUG"):
        traceback.print_exception(error)
    if any(isinstance(cause, KeyboardInterrupt) for cause in _and_before(error)):
        also = "" if isinstance(error, KeyboardInterrupt) else f"; then: {line(error)}"
        print(f"\nnearfold: interrupted{also}", file=sys.stderr)
        return 130
    if isinstance(error, NotationError):  # points at the place, below
        print(f"nearfold: error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        print(f"nearfold: error: not enough memory for this: {line(error)}", file=sys.stderr)
        return 2
    if isinstance(error, (ValueError, ImportError, OSError, NotImplementedError, FloatingPointError)):
        print(f"nearfold: error: {line(error)}", file=sys.stderr)  # the library's errors for users
        return 2
    print(
        f"nearfold: error: this is a fault of nearfold, please report it: {type(error).__name__}: {line(error)} "
        "(NEARFOLD_DEBUG=1 in the environment shows where)",
        file=sys.stderr,
    )
    return 3


_NO_MEMORY = re.compile("allocate memory|out of memory|not enough memory|Storage size calculation overflowed")


def _and_before(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _parser() -> argparse.ArgumentParser:
    parser = _new(_Parser, "", description=INTRODUCTION, prog="nearfold")
    parser.add_argument("--version", action="version", version=f"nearfold {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    ops = _new(commands.add_parser, "ops", "the operators that have a name, in a table; or all about some of them")
    ops.add_argument("names", nargs="*", metavar="NAME", help="operators to say more about")
    ops.set_defaults(command=_ops)

    explain = _new(commands.add_parser, "explain", "say how an operator would run on inputs of one shape")
    explain.add_argument("notation", metavar="NOTATION", help="an operator in the notation, or its name in `ops`")
    explain.add_argument(
        "--shape", type=_shape, required=True, metavar="B,C,H,W",
        help="shape of the input: batch, channels and the grid (B,C,N for sequences)",
    )  # fmt: skip
    explain.add_argument("--out-channels", type=whole(1, PIXELS), metavar="C", help="default: as many as come in")
    explain.add_argument("--dtype", default="float32", help="of the input, as in torch (default: float32)")
    explain.add_argument("--device", default="cpu", help="where it would run (default: cpu)")
    explain.add_argument(
        "--grad",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with gradients (default) or without",
    )
    explain.set_defaults(command=_explain)

    look = _new(commands.add_parser, "look", look_command.SUMMARY)
    look_command.arguments(look)
    look.set_defaults(command=look_command.run)

    describe = _new(
        commands.add_parser, "describe", "say any network in these words, layer by layer, and its complexity"
    )
    describe.add_argument(
        "model",
        metavar="SPEC",
        help="timm:NAME, torchvision:NAME, transformers:NAME or path/to/file.py:factory (the file is run)",
    )
    describe.add_argument(
        "--input", type=_input_size, metavar="C,H,W",
        help="size of one input, for FLOPs and receptive fields (default: what timm and transformers say, else none)",
    )  # fmt: skip
    describe.set_defaults(command=_describe)

    models = _new(
        commands.add_parser,
        "models",
        "the networks that have a name: parameters and multiply-adds, built and published",
    )
    models.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a shell pattern (default: all)")
    models.set_defaults(command=_models)

    train = _new(commands.add_parser, "train", "train the small network around one operator")
    _data_arguments(train)
    train.add_argument(
        "--op", default="conv", metavar="NOTATION",
        help="the mixing layer, in the notation or by its name in `ops` (default: conv)",
    )  # fmt: skip
    train.add_argument(
        "--label-column", metavar="NAME",
        help="the column of parquet files, or the field of KEY.json in tar files, with the labels (default: label, or "
        "fine_label)",
    )  # fmt: skip
    train.add_argument(
        "--stream", type=whole(1, PIXELS), metavar="PIXELS",
        help="read images from parquet, tar or image files when they are needed, and make them so large, instead of "
        "holding all in memory",
    )  # fmt: skip
    train.add_argument("--width", type=whole(1, PIXELS), default=32, metavar="C", help="channels (default: 32)")
    train.add_argument("--depth", type=whole(1, 1000), default=2, metavar="N", help="blocks (default: 2)")
    train.add_argument("--out", type=folder, metavar="DIR", help="keep metrics, checkpoint and weights here")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    train.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events to --out")
    train.add_argument(
        "--checkpoint-every", type=whole(), metavar="N",
        help="steps between checkpoints within an epoch (default: one at the end of every epoch)",
    )  # fmt: skip
    train.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="how the processes of torchrun hold the model: each all of it (ddp, default), or each a part (fsdp)",
    )  # fmt: skip
    train.add_argument("--compile", action="store_true", help="train by torch.compile")
    train.add_argument(
        "--workers", type=whole(0, 1000), default=0, metavar="N",
        help="processes that read ahead, of data that are not in memory (default: 0)",
    )  # fmt: skip
    _recipe_arguments(train)
    train.set_defaults(command=_train)

    from nearfold.study import budget_command, command, spectrum_command

    EXAMPLES.update(command.EXAMPLES, budget=budget_command.EXAMPLES)
    EXAMPLES["study spectrum"] = spectrum_command.EXAMPLES
    study = _new(commands.add_parser, "study", "many runs, one table, one report")
    studies = study.add_subparsers(title="studies", metavar="STUDY", required=True)
    along = _new(studies.add_parser, "study spectrum", "swap the mixing layer from convolution to attention")
    _data_arguments(along)
    spectrum_command.arguments(along)
    along.set_defaults(command=spectrum_command.run)
    budget_command.add(_new(commands.add_parser, "budget", budget_command.SUMMARY))
    _new(studies.add_parser, "study list", "the studies of published claims").set_defaults(command=command.show)
    command.add_run(_new(studies.add_parser, "study run", "do the runs of a study that are left, and write its report"))
    command.add_page(_new(studies.add_parser, "study page", "draw a study's page again, from its results.json"))
    command.add_budget(_new(studies.add_parser, "study budget", "the best layer for a budget, by the study `budget`"))
    return parser


def _new(make: Any, name: str, summary: str = "", **options: Any) -> argparse.ArgumentParser:
    """A parser with a description, and the examples of its command below."""
    if summary:
        options |= {"help": summary, "description": f"{summary[0].upper()}{summary[1:]}."}
    args = (name.split()[-1],) if name else ()
    parser: argparse.ArgumentParser = make(
        *args, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES[name], **options
    )
    return parser


def _data_arguments(parser: argparse.ArgumentParser) -> None:
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
    from nearfold.train import Recipe

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


def _ops(args: argparse.Namespace) -> int:
    from nearfold.periodic import card, table

    print("\n\n".join(card(name) for name in args.names) if args.names else table())
    return 0


def _explain(args: argparse.Namespace) -> int:
    import torch

    from nearfold.lower import explain

    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"--dtype: torch has no dtype {brief(args.dtype)}; an operator works on float32, bfloat16, float16, float64"
        )
    try:
        device = torch.device(args.device).type
    except RuntimeError:
        raise ValueError(f"--device: torch has no device {brief(args.device)}; for instance cpu, cuda") from None
    operation = parse(args.notation)
    print(explain(operation, args.shape, args.out_channels, dtype=dtype, device=device, grad=args.grad))
    return 0


def _describe(args: argparse.Namespace) -> int:
    from nearfold.recognise.command import run

    print(run(args.model, args.input))
    return 0


def _models(args: argparse.Namespace) -> int:
    from nearfold.models.table import table

    print(table(args.pattern))
    return 0


def _train(args: argparse.Namespace) -> int:
    from nearfold.models import SpectrumNet, stem_stride
    from nearfold.train import Recipe, fit, load_data, open_data, require_trainable

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
    import torch

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


def _shape(text: str) -> tuple[int, ...]:
    return sizes(text, 3, "batch, channels and grid, such as 16,64,32,32")


def _input_size(text: str) -> tuple[int, ...]:
    return sizes(text, 2, "channels and grid, such as 3,224,224")
