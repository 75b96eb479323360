"""`nearfold models`: the networks that have a name, as built and as published."""

from __future__ import annotations

import argparse

from nearfold.models import pretrained
from nearfold.models.table import table

EXAMPLES = """\
examples:
  nearfold models
  nearfold models --pretrained
  nearfold models "acmix_*"
  nearfold models resnet50_hybrid"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a shell pattern (default: all)")
    parser.add_argument(
        "--pretrained", action="store_true", help="those whose weights come along, and how accurate these are"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table: the exit code."""
    print(pretrained.table(args.pattern) if args.pretrained else table(args.pattern))
    return 0
