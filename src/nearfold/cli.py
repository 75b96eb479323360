"""The command line: which commands there are, and how each of them ends. What they do stands beside their packages.

Exit codes: 0 done, 1 a study some of whose runs failed, 2 what was asked cannot be done (one clear message on stderr),
3 a fault of nearfold itself (one line; with NEARFOLD_DEBUG=1 in the environment the traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence

from nearfold import __version__
from nearfold.options import Fill, Parser, line

INTRODUCTION = """\
Convolution and self-attention are two ends of one operator: look somewhere (path), in some
form (shape), and value what is found (weight). An operator is written in these three words:

    window(3) | box | kernel                    a 3x3 convolution
    all | row | softmax(heads=4)                self-attention
    nearest(9, cosine, self) | ranked | kernel  in between: read the 9 most similar positions"""
EXAMPLES = """\
start here:
  nearfold study spectrum        the main job: a few minutes on a laptop, ends with an HTML report
  nearfold ops                   the operators that have a name
  nearfold look sample:china.jpg where six of them look in a photograph
  nearfold describe torchvision:resnet18
                                 a network in these words, and its complexity
  nearfold explain "all | row | softmax(heads=4)" --shape 8,64,32,32
                                 which code would run, why, and what it costs
  nearfold train --op convnn     train one network around one operator
  nearfold train --model resnet18_hybrid
                                 train one of the networks that have a name"""
COMMANDS: dict[str, tuple[str, Fill]] = {
    "ops": ("the operators that have a name, in a table; or all about some of them", "nearfold.periodic"),
    "explain": ("say how an operator would run on inputs of one shape", "nearfold.lower.command"),
    "look": (
        "draw what operators read of a photograph for one position, and their mixing matrices",
        "nearfold.models.look_command",
    ),
    "explore": (
        "open a page in which operators run on a photograph, and show where they look",
        "nearfold.explorer.command",
    ),
    "describe": ("say any network in these words, layer by layer, and its complexity", "nearfold.recognise.command"),
    "xray": ("measure where every layer of a network really looks, on images", "nearfold.examine.command"),
    "models": (
        "the networks that have a name: parameters and multiply-adds, built and published",
        "nearfold.models.command",
    ),
    "train": (
        "train the small network around one operator, or one of the networks that have a name",
        "nearfold.train.command",
    ),
    "evaluate": (
        "count how many test images a network whose weights come along classifies correctly",
        "nearfold.train.evaluate_command",
    ),
    "export": (
        "write a network as ONNX, as a program for torch alone, or compiled ahead of time; and compare",
        "nearfold.export.command",
    ),
    "align": (
        "measure what a data set asks of an operator: where to look, in which form, what to value",
        "nearfold.study.alignment.command",
    ),
    "study": ("many runs, one table, one report", "nearfold.study.commands"),
    "search": (
        "propose operators from the language, halve them by training, and compare the best with the known ones",
        "nearfold.study.search.command",
    ),
    "budget": (
        "how few positions a trained model's attention needs: its accuracy against its latency over k",
        "nearfold.study.budget_command",
    ),
}
"""Every command: what it does, and the module that does it, which is loaded when the command is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None: those of the process.

    Returns:
        The exit code.

    >>> main(["explain", "window(3) | box | kernel", "--shape", "nonsense"])
    2
    """
    args = argparse.Namespace()
    try:
        args = _parser().parse_args(argv)
        return int(args.command(args))
    except SystemExit as stop:  # argparse's way to say that help was shown (0) or an argument was wrong (2)
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _say(error, args)


def _parser() -> Parser:
    parser = Parser(prog="nearfold", description=INTRODUCTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"nearfold {__version__}")
    parser.add_commands("commands", "COMMAND", COMMANDS)
    return parser


def _say(error: BaseException, args: argparse.Namespace) -> int:
    """Tell in one line why the command ends, and return the exit code."""

    def option(name: re.Match[str]) -> str:
        """An argument of a function as the option that the user has for it."""
        known = name[1] in vars(args)
        return f"--{name[1].replace('_', '-')}{' ' * bool(name[2])}{name[2]}" if known else name[0]

    if os.environ.get("NEARFOLD_DEBUG"):
        traceback.print_exception(error)
    if any(isinstance(cause, KeyboardInterrupt) for cause in _and_before(error)):
        also = "" if isinstance(error, KeyboardInterrupt) else f"; then: {line(error)}"
        print(f"\nnearfold: interrupted{also}", file=sys.stderr)
        return 130
    from nearfold.grammar import NotationError

    if isinstance(error, NotationError):  # points at the place, below
        print(f"nearfold: error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        print(f"nearfold: error: not enough memory for this: {line(error)}", file=sys.stderr)
        return 2
    if isinstance(error, (ValueError, ImportError, OSError, NotImplementedError, FloatingPointError)):
        said = re.sub(r"\b([a-z_]+)=(\S*)", option, line(error))
        print(f"nearfold: error: {said}", file=sys.stderr)  # the library's errors for users
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
