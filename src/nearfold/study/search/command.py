"""`nearfold search`: operators proposed from the language, against the known ones."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from nearfold.options import PIXELS, above, folder, whole
from nearfold.study.fourteen import FOURTEEN
from nearfold.study.search.budget import UNITS, Budget
from nearfold.study.search.search import Settings, open_search

EXAMPLES = """\
examples:
  nearfold search --data made:pairs --flops 4200000
  nearfold search --data path/to/images --params 40000 --trials 90 --jobs 8
  nearfold search --data made:stripes --latency-ms 2 --minutes 30

A finished run is never run again: interrupt it when you like, the same command goes on where it was. The known
operators it starts from, and has to beat:
""" + "\n".join(f"  {title:<28} {notation}" for title, notation in FOURTEEN.items())

NUMBERS: dict[str, tuple[str, int, int]] = {
    "trials": ("operations to propose and train", 1, 100_000),
    "epochs": ("passes over the training images, of the longest runs", 1, 100_000),
    "width": ("channels of the network", 1, PIXELS),
    "finalists": ("of each side, that are trained anew", 1, 1000),
    "seeds": ("runs of every finalist", 2, 1000),
}
"""Options that are fields of `Settings`: what they are, and their range."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    from nearfold.train.command import data_arguments

    data_arguments(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--params", type=above(0), metavar="N", help="budget: parameters of a network")
    budget.add_argument("--flops", type=above(0), metavar="N", help="budget: FLOPs of one image, forward")
    budget.add_argument(
        "--latency-ms",
        type=above(0),
        metavar="T",
        help="budget: at most so long for one image, forward, on this machine",
    )
    for name, (text, least, most) in NUMBERS.items():
        usual = getattr(Settings, name)
        parser.add_argument(
            f"--{name}", type=whole(least, most), default=usual, metavar="N", help=f"{text} (default: {usual})"
        )
    parser.add_argument(
        "--minutes", type=above(0), metavar="M", help="propose no more when all of it would take longer than this"
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="default: runs/search-DATA")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="who runs (default: local)")
    parser.add_argument("--address", default="auto", metavar="A", help="of the Ray cluster (default: auto)")
    parser.add_argument("--jobs", type=whole(1, 1000), metavar="N", help="runs side by side (default: one a core)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, ... (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Search, print what was found and write it down: the exit code."""
    from nearfold.study.local import Local, default_jobs
    from nearfold.study.ray import Ray, connect
    from nearfold.study.search.report import leave
    from nearfold.train.distributed import join

    device = join(args.device).device
    kind = next(kind for kind in UNITS if getattr(args, kind) is not None)
    settings = Settings(
        args.data, Budget(kind, getattr(args, kind)), args.limit, minutes=args.minutes, device=args.device,
        out=args.out or Path("runs") / f"search-{os.path.basename(os.path.realpath(args.data)).replace(':', '-')}",
        **{name: getattr(args, name) for name in NUMBERS},
    )  # fmt: skip
    search = open_search(settings)
    if args.engine == "ray":
        connect(args.address)
    engine = Ray(args.address) if args.engine == "ray" else Local(args.jobs or default_jobs(device))
    print(f"every network: {settings.budget}; results in {settings.out}", flush=True)
    found = search.run(engine, lambda text: print(text, flush=True))
    text, paths = leave(found, command_line(args), settings.out)
    print("\n" + text.partition("\n## The known operators")[0] + "\n" + "\n".join(map(str, paths)))
    failed = sum(spent.failed for spent in found.spent.values())
    if failed:
        print(f"nearfold: {failed} runs failed: see {settings.out}/failed", file=sys.stderr)
    return 0


def command_line(args: argparse.Namespace) -> str:
    """The command that asks for the same search."""
    words = ["nearfold", "search", "--data", str(args.data)]
    for name in (*UNITS, "limit", *NUMBERS, "minutes"):
        value = getattr(args, name)
        if value is not None and value != getattr(Settings, name, None):
            words += [f"--{name.replace('_', '-')}", f"{value:.15g}"]
    return shlex.join(words)
