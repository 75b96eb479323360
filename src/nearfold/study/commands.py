"""`nearfold study`: its commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nearfold.options import Fill, Parser
from nearfold.study import command
from nearfold.train.command import data_arguments

EXAMPLES = """\
example:
  nearfold study spectrum --help"""


def _filled(name: str, add: Callable[[argparse.ArgumentParser], None]) -> Fill:
    def fill(parser: Parser) -> None:
        parser.epilog = command.EXAMPLES[f"study {name}"]
        add(parser)

    return fill


def _spectrum(parser: Parser) -> None:
    from nearfold.study import spectrum_command

    parser.epilog = spectrum_command.EXAMPLES
    data_arguments(parser)
    spectrum_command.arguments(parser)
    parser.set_defaults(command=spectrum_command.run)


def _list(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=command.show)


COMMANDS: dict[str, tuple[str, Fill]] = {
    "spectrum": ("swap the mixing layer from convolution to attention", _spectrum),
    "list": ("the studies of published claims", _filled("list", _list)),
    "run": ("do the runs of a study that are left, and write its report", _filled("run", command.add_run)),
    "page": ("draw a study's page again, from its results.json", _filled("page", command.add_page)),
    "budget": ("the best layer for a budget, by the study `budget`", _filled("budget", command.add_budget)),
}


def arguments(parser: Parser) -> None:
    """Add the studies' commands to the parser."""
    parser.add_commands("studies", "STUDY", COMMANDS)
