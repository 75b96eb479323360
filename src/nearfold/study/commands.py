"""`nearfold study`: its commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nearfold.options import Fill, Parser
from nearfold.study import command

EXAMPLES = """\
example:
  nearfold study spectrum --help"""


def _filled(name: str, add: Callable[[argparse.ArgumentParser], None]) -> Fill:
    def fill(parser: Parser) -> None:
        parser.epilog = command.EXAMPLES[f"study {name}"]
        add(parser)

    return fill


COMMANDS: dict[str, tuple[str, Fill]] = {
    "spectrum": ("swap the mixing layer from convolution to attention", "nearfold.study.spectrum_command"),
    "list": (
        "the studies of published claims",
        _filled("list", lambda parser: parser.set_defaults(command=command.show)),
    ),
    "run": ("do the runs of a study that are left, and write its report", _filled("run", command.add_run)),
    "page": ("draw a study's page again, from its results.json", _filled("page", command.add_page)),
    "budget": ("the best layer for a budget, by the study `budget`", _filled("budget", command.add_budget)),
}


def arguments(parser: Parser) -> None:
    """Add the studies' commands to the parser."""
    parser.add_commands("studies", "STUDY", COMMANDS)
