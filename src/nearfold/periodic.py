"""`nearfold ops`: the catalogue as a table, one row an operator, one column a word: rows differ where operators do."""

from __future__ import annotations

import argparse
import re
import textwrap

from nearfold.grammar import CATALOGUE, Basic, Branch, Entry, Operation, Sum
from nearfold.grammar.complexity import c_d, primitives
from nearfold.grammar.presets import FAMILIES, entry_of
from nearfold.lower import Explanation, explain
from nearfold.options import file

WIDTHS = (23, 43, 12, 29, 4)  # name, path, shape, weight, C_D; the backend follows
HEAD = ("", "PATH: where to look", "SHAPE: form", "WEIGHT: what to value", "C_D", "runs on")
EXAMPLES = """\
examples:
  nearfold ops
  nearfold ops --family neighbours --since 2024
  nearfold ops swin deformable mamba convnn
  nearfold ops --html ops.html"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="operators to say more about")
    parser.add_argument("--family", metavar="WORDS", help="only families with these words in their name")
    parser.add_argument("--since", type=int, metavar="YEAR", help="only operators whose paper is of this year or later")
    parser.add_argument(
        "--html", type=file, metavar="FILE",
        help="write the table as one page that can be searched and sorted, with a picture of what each operator mixes",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the table, or all about some operators: the exit code."""
    if args.names and (args.family or args.since):
        raise ValueError("--family and --since choose rows of the table; leave them out where operators are named")
    if args.html is not None:
        return _write(args)
    print("\n\n".join(card(name) for name in args.names) if args.names else table(args.family, args.since))
    return 0


def _write(args: argparse.Namespace) -> int:
    """The page, into a file: the exit code."""
    from nearfold.catalogue_page import page

    if args.names:
        raise ValueError("--html writes the table; leave it out where operators are named")
    if args.html.suffix.lower() not in (".html", ".htm") or args.html.is_dir():
        raise ValueError(f"--html {args.html}: name a file that ends with .html")
    rows = chosen(args.family, args.since)
    text = page({name: [(entry, year(entry)) for entry in entries] for name, entries in rows.items()})
    args.html.parent.mkdir(parents=True, exist_ok=True)
    args.html.write_text(text, encoding="utf-8")
    print(args.html)
    return 0


def year(entry: Entry) -> int | None:
    """The year of an operator's paper; None where its source is not on arXiv.

    >>> year(CATALOGUE["kvt"]), year(CATALOGUE["conv"])
    (2021, None)
    """
    found = re.fullmatch(r"arXiv (\d\d)\d\d\.\d+", entry.source)
    return 2000 + int(found[1]) if found else None


def chosen(family: str | None = None, since: int | None = None) -> dict[str, list[Entry]]:
    """The catalogue by family: families with these words in their name, operators of papers of this year or later.

    Raises:
        ValueError: there are none.

    >>> {family: len(entries) for family, entries in chosen("state").items()}
    {'state spaces': 4}
    """
    names = {name: [CATALOGUE[n] for n in ns] for name, ns in FAMILIES.items() if (family or "").lower() in name}
    if not names:
        raise ValueError(f"family={family!r} is in no family's name: {', '.join(FAMILIES)}")
    found = {name: [e for e in es if since is None or (year(e) or 0) >= since] for name, es in names.items()}
    if not any(found.values()):
        latest = max((year(e) or 0 for es in names.values() for e in es), default=0)
        raise ValueError(f"since={since}: no operator here has a paper that late; the latest is of {latest}")
    return {name: es for name, es in found.items() if es}


def table(family: str | None = None, since: int | None = None) -> str:
    """All operators that have a name, by family, or those that `chosen` chooses.

    >>> print(table().splitlines()[2])
    fixed window
    """
    lines = [_row(HEAD), ""]
    rows = chosen(family, since)
    for name, entries in rows.items():
        lines.append(name)
        for entry in entries:
            lines += _rows(entry)
    lines += [
        "",
        "A row is the notation of an operator: path | shape | weight. C_D counts what has to be said to describe it",
        f"(docs/complexity.md). `nearfold ops NAME ...` says more about some of the {sum(map(len, rows.values()))}.",
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
