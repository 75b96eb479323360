"""`nearfold study spectrum`: the mixing layer of one network, swapped from convolution to attention."""

from __future__ import annotations

import argparse

from nearfold.options import PIXELS, folder, whole
from nearfold.study.command import carry_out
from nearfold.study.local import Local, default_jobs
from nearfold.study.spectrum import RECIPE, SPECTRUM, Settings, command_line, open_study
from nearfold.train.distributed import join

EXAMPLES = """\
examples:
  nearfold study spectrum
  nearfold study spectrum --only conv,convnn,attention --seeds 5
  nearfold study spectrum --data path/to/cifar10 --limit 5000 --epochs 20

A finished run is never run again: interrupt it when you like, the same command goes on. More
seeds or operators are added to what is there; failed runs are tried again.

operators:
""" + "\n".join(f"  {stop.name:<14} {stop.notation}" for stop in SPECTRUM)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser, beside those that say what the data are."""
    parser.add_argument(
        "--epochs", type=whole(), metavar="N",
        help=f"passes over the training images (default: {RECIPE.epochs})",
    )  # fmt: skip
    parser.add_argument("--seeds", type=whole(1, 10_000), metavar="N", help="runs of every operator (default: 3)")
    parser.add_argument("--only", type=_names, metavar="A,B", help="only these operators, listed below")
    parser.add_argument("--width", type=whole(1, PIXELS), metavar="C", help="channels of the network (default: 32)")
    parser.add_argument("--out", type=folder, metavar="DIR", help="default: runs/spectrum-DATA")
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--jobs", type=whole(1, 1000), metavar="N",
        help="runs side by side (default: one a core up to 8 on the CPU, one on CUDA)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do the runs that are left, and write the report: the exit code."""
    given = ("data", "limit", "epochs", "seeds", "only", "width", "out", "device")
    settings = Settings(**{k: getattr(args, k) for k in given if getattr(args, k) is not None})
    study = open_study(settings)
    engine = Local(args.jobs or default_jobs(join(settings.device).device))
    return carry_out(study, engine, settings.folder, command_line(settings), retry=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
