"""`nearfold search`: operators proposed from the language, against the known ones."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path

from nearfold.options import PIXELS, above, folder, numbers, whole
from nearfold.study.fourteen import FOURTEEN
from nearfold.study.given import WHAT
from nearfold.study.search.budget import UNITS, Budget
from nearfold.study.search.layers import AS_IT_IS, LayerNetworks, LayerSpace
from nearfold.study.search.search import Search, Settings, open_search

EXAMPLES = """\
examples:
  nearfold search --data made:pairs --flops 4200000
  nearfold search --data path/to/images --params 40000 --trials 90 --jobs 8
  nearfold search --data made:stripes --latency-ms 2 --minutes 30
  nearfold search --data path/to/cifar10 --model resnet8s_conv --layers "groups.*.layer" --flops 60000000

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
    parser.add_argument(
        "--model", metavar="MODEL", help=f"exchange the layers of this network, its weights kept: {WHAT}"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict: .safetensors, or one of torch.save")
    parser.add_argument(
        "--layers", default=Settings.layers, metavar="PATTERN", help="of MODEL, such as 'blocks.*' (default: all)"
    )
    parser.add_argument("--mean", type=numbers, metavar="A,B", help="that MODEL was trained with, in 0..1 (default: a")
    parser.add_argument("--std", type=numbers, metavar="A,B", help="timm model's, or the training images')")
    parser.add_argument("--lr", type=above(0), metavar="R", help="largest learning rate (default: docs/search.md)")
    for name, (text, least, most) in NUMBERS.items():
        usual = getattr(Settings, name)
        parser.add_argument(
            f"--{name}", type=whole(least, most), default=usual, metavar="N", help=f"{text} (default: {usual})"
        )
    parser.add_argument(
        "--minutes", type=above(0), metavar="M", help="propose no more when all of it would take longer than this"
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="default: runs/search-DATA, with -MODEL")
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
        model=args.model, weights=args.weights, layers=args.layers, mean=args.mean, std=args.std, lr=args.lr,
        out=args.out or _folder(args),
        **{name: getattr(args, name) for name in NUMBERS},
    )  # fmt: skip
    if args.model is not None:
        print(f"trying which of the known operators fit each layer of {args.model}", flush=True)
    search = open_search(settings)
    if args.engine == "ray":
        connect(args.address)
    engine = Ray(args.address) if args.engine == "ray" else Local(args.jobs or default_jobs(device))
    bound = "at most " if args.model is not None or settings.budget.measured else ""
    print(f"every network: {bound}{settings.budget}; results in {settings.out}", flush=True)
    if isinstance(search.space, LayerSpace):
        print("\n".join(found_layers(search)), flush=True)
    found = search.run(engine, lambda text: print(text, flush=True))
    text, paths = leave(found, command_line(args), settings.out)
    print("\n" + text.partition("\n## The known operators")[0] + "\n" + "\n".join(map(str, paths)))
    failed = sum(spent.failed for spent in found.spent.values())
    if failed:
        print(f"nearfold: {failed} runs failed: see {settings.out}/failed", file=sys.stderr)
    return 0


def _folder(args: argparse.Namespace) -> Path:
    """Where results go by default."""
    parts = [os.path.basename(os.path.realpath(args.data)), *([Path(args.model).name] if args.model else [])]
    return Path("runs") / "-".join(["search", *parts]).replace(":", "-")


def found_layers(search: Search) -> list[str]:
    """What may be exchanged, as lines; and what the network costs, and how good it is, as it is."""
    space, networks = search.space, search.networks
    assert isinstance(space, LayerSpace) and isinstance(networks, LayerNetworks) and search.before is not None
    lines = [f"{layer.name}: {layer.site.operation}   ({len(layer.known)} known operators)" for layer in space.layers]
    lines += [f"{name}: kept: {why}" for name, why in search.kept.items()]
    with contextlib.suppress(ValueError):  # over the budget: it is counted all the same
        networks.around(AS_IT_IS)
    parameters, flops = networks.costs[AS_IT_IS]
    return [
        *lines,
        f"as it is: {parameters:,} parameters, {flops:,} FLOPs of an image, {100 * search.before:.1f} % of the "
        "validation images before it is trained on",
    ]


def command_line(args: argparse.Namespace) -> str:
    """The command that asks for the same search."""
    words = ["nearfold", "search", "--data", str(args.data)]
    for name in ("mean", "std"):
        if (values := getattr(args, name)) is not None:
            words += [f"--{name}", ",".join(f"{value:.15g}" for value in values)]
    for name in ("model", "weights", "layers"):
        if (value := getattr(args, name)) not in (None, getattr(Settings, name)):
            words += [f"--{name}", str(value)]
    for name in (*UNITS, "limit", *NUMBERS, "lr", "minutes"):
        value = getattr(args, name)
        if value is not None and value != getattr(Settings, name, None):
            words += [f"--{name.replace('_', '-')}", f"{value:.15g}"]
    return shlex.join(words)
