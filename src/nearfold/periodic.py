"""`nearfold ops`: the catalogue as a table, one row an operator, one column a word: rows differ where operators do."""

from __future__ import annotations

import argparse
import textwrap

from nearfold.grammar import CATALOGUE, Basic, Branch, Entry, Operation, Sum
from nearfold.grammar.complexity import c_d, primitives
from nearfold.grammar.presets import FAMILIES, entry_of
from nearfold.lower import Explanation, explain

WIDTHS = (23, 43, 12, 31, 4)  # name, path, shape, weight, C_D; the backend follows
HEAD = ("", "PATH: where to look", "SHAPE: form", "WEIGHT: what to value", "C_D", "runs on")
EXAMPLES = """\
examples:
  nearfold ops
  nearfold ops swin deformable mamba convnn"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="operators to say more about")


def run(args: argparse.Namespace) -> int:
    """Print the table, or all about some operators: the exit code."""
    print("\n\n".join(card(name) for name in args.names) if args.names else table())
    return 0


def table() -> str:
    """All operators that have a name, by family.

    >>> print(table().splitlines()[2])
    fixed window
    """
    lines = [_row(HEAD), ""]
    for family, names in FAMILIES.items():
        lines.append(family)
        for name in names:
            lines += _rows(CATALOGUE[name])
    lines += [
        "",
        "A row is the notation of an operator: path | shape | weight. C_D counts what has to be said to describe it",
        "(docs/complexity.md). `nearfold ops NAME ...` says more about some of them.",
    ]
    return "\n".join(lines)


def card(name: str) -> str:
    """One operator: its notation, its words in prose, its complexity and which code runs it on a CPU.

    Raises:
        ValueError: when the catalogue has no such name.

    >>> print(card("conv").splitlines()[0])
    conv: Convolution 3x3 (nn.Conv2d)
    """
    entry = entry_of(name)
    op = entry.operation
    scores = " + ".join(f"{word} {score:g}" for word, score in primitives(op).items())
    lines = [f"{entry.name}: {entry.title} ({entry.source})", f"  {entry.notation}"]
    lines += [f"  {place:<7} {text}" for place, text in zip(("path", "shape", "weight"), entry.words, strict=True)]
    lines += [f"  C_D     {c_d(op):g} = {scores}", ""]
    lines += [f"  {line}" for line in str(_explained(entry)).splitlines()[1:]]
    return "\n".join(lines)


def _explained(entry: Entry) -> Explanation:
    grid = (64,) if entry.operation.for_sequences else (8, 8)
    return explain(entry.notation, (1, 16, *grid))


def _rows(entry: Entry) -> list[str]:
    op, parts = entry.operation, _explained(entry).parts
    found: list[str] = []
    for i, (lead, part) in enumerate(_parts(op)):
        name = f"  {entry.name}" if i == 0 else f"    {lead}"
        if i == 0 and lead:
            found.append(_row((name, *("",) * 3, f"{c_d(op):g}", "")))
            name = f"    {lead}"
        # what does not fit into its column goes on below it
        weight = textwrap.wrap(str(part.weight), WIDTHS[3] - 1, break_long_words=False)
        score = f"{c_d(op):g}" if not lead else ""
        found.append(_row((name, str(part.path), str(part.shape), weight[0], score, parts[i].backend)))
        found += [_row(("", "", "", f"  {more}", "", "")) for more in weight[1:]]
    return found


def _parts(op: Operation) -> list[tuple[str, Basic]]:
    """The rows of an operator, each with what stands before it."""
    if isinstance(op, Basic):
        return [("", op)]
    if isinstance(op, Branch):
        shares = (f"{op.ratio:g} of channels", "the others")
        return [(share, part) for share, side in zip(shares, (op.first, op.second), strict=True) for part in side.parts]
    assert isinstance(op, Sum)
    return [("+ " + (f"{rate} *" if rate is not None else ""), part) for rate, term in op.terms for part in term.parts]


def _row(cells: tuple[str, ...]) -> str:
    *columns, last = cells
    texts = [f"{text:<{width}}" for text, width in zip(columns[:-1], WIDTHS[:-1], strict=True)]
    return ("".join(texts) + f"{columns[-1]:>{WIDTHS[-1]}}  {last}").rstrip()
