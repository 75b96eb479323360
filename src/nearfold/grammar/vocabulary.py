"""What follows from the words' examples: the cases that they are tested by, what is refused, and docs/words.md.

python -m nearfold.grammar.vocabulary > docs/words.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from nearfold.grammar.notation import parse
from nearfold.grammar.operation import Basic, Operation
from nearfold.grammar.presets import CATALOGUE
from nearfold.grammar.word import WORDS, Word

# what combines the words
COMBINED: dict[str, str] = {
    "sum_fixed": "0.5*(window(3) | box | depthwise) + (nearest(3, cosine) | ranked | depthwise)",
    "sum_shift_bias": "a*(block(3, scaled(bias=table), shift=1) | box | softmax(heads=2))"
    " + b*(window(3, mode=reflect, dilation=2) | box | shift(2, bias))",
    "branch_split": "branch(0.25, nearest(3, cosine) | ranked | kernel, all | row | softmax(heads=2), split, mix)",
    "union_local_nearest": "window(3, cosine) & nearest(5, cosine) | ranked | softmax(heads=2)",
    "union_kernel": "window(3, stride=2) & nearest(4, cosine, self, stride=2) | box | kernel",
    "union_sinks": "window(3, dot, mode=inside) & first(2, dot) | box | softmax(heads=2)*depthwise",
    "union_bigbird": "block(2) & scattered(3) & first(1) | box | softmax(heads=2)",
    "union_axial": "axial(0, dot) & nearest(3, dot, random(6), self) | box | softmax(heads=2)",
    "branch_nested": "branch(0.25, all | row | softmax(heads=2),"
    " a*(window(3) | box | kernel) + b*(window(5) | box | kernel))",
}


def words() -> Iterator[type[Word]]:
    """Every word of the moment, those from outside too, by kind."""
    for kind in WORDS.values():
        yield from kind.values()


def words_in(value: object) -> Iterator[Word]:
    """Every word inside an operation or a word, itself included.

    >>> print(*words_in(parse("window(3, dot) | box | softmax")))
    window(3, dot) dot box softmax
    """
    if isinstance(value, Word):
        yield value
    if isinstance(value, tuple):
        for entry in value:
            yield from words_in(entry)
    elif isinstance(value, Operation) and not isinstance(value, Basic):
        for operand in value.operands:
            yield from words_in(operand)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from words_in(getattr(value, f.name))


def cases() -> dict[str, str]:
    """Notations by name: the catalogue, every word's examples, and sums and branches of them."""
    found = {name: entry.notation for name, entry in CATALOGUE.items()}
    for word in words():
        if twice := found.keys() & word.examples.keys():
            raise ValueError(f"{word.__name__}: examples must have names of their own, got {', '.join(twice)} again")
        found |= word.examples
    return found | COMBINED


def example(word: type[Word]) -> tuple[Basic, Word]:
    """The shortest case with a word, or part of one, and the word in it.

    Raises:
        ValueError: for a word that stands in no case.

    >>> from nearfold.grammar.words import Deformable
    >>> print(*example(Deformable), sep=", ")
    deformable(3) | box | kernel, deformable(3)
    """
    found_in = [(part, part is op) for op in map(parse, cases().values()) for part in op.parts]
    having = [(part, found, whole) for part, whole in found_in for found in words_in(part) if type(found) is word]
    if not having:
        raise ValueError(
            f"{word.kind} {word.word} stands in no case: give {word.__name__} examples = {{name: notation}}"
        )
    # what is meant where nothing is said comes last, and parts of sums and branches before it
    part, found, _ = min(having, key=lambda one: (str(one[1]) not in str(one[0]), not one[2], len(str(one[0]))))
    return part, found


def misuse() -> dict[str, str]:
    """Notations that are refused, made from the words' examples, and what is said of each.

    >>> misuse()["windowx(3) | box | kernel"]
    '(did you mean window?)'
    """
    found = {}
    for word in words():
        part, said = example(word)
        whole, text, name = str(part), str(said), word.word
        if text not in whole:
            continue
        bare = text.removeprefix(name)
        inside = f"{name}(nonsense=1" + (f", {bare[1:]}" if bare else ")")
        found[whole.replace(text, inside, 1)] = f"{name} has no argument 'nonsense'"
        found[whole.replace(text, f"{name}x{bare}", 1)] = f"(did you mean {name}?)"
        if any(f.default is dataclasses.MISSING for f in dataclasses.fields(word)):  # type: ignore[arg-type]
            found[whole.replace(text, name, 1)] = f"{name} needs "
    for path in WORDS["path"].values():
        part, _ = example(path)
        for shape in WORDS["shape"].values():
            if shape.word not in path.shapes:  # type: ignore[attr-defined]
                other = example(shape)[1]
                found[f"{part.path} | {other} | {part.weight}"] = f"does not go with path {path.word}"
        for rho in WORDS["rho"].values():
            if rho.paths and path.word not in rho.paths:  # type: ignore[attr-defined]
                other = example(rho)[1]
                found[f"{part.path} | {part.shape} | {other}"] = "goes with "
    return found


def _goes_with(word: type[Word]) -> str:
    sides = (("shapes", "shape"), ("rhos", "weight"), ("paths", "path"))
    return "; ".join(
        f"{name} {' or '.join(f'`{w}`' for w in allowed)}"
        for side, name in sides
        if (allowed := getattr(word, side, ()))
    )


def page() -> str:
    """All words as tables, in Markdown."""
    lines = [
        "# The words",
        "",
        "Every word, by the place where it may stand: path \\| shape \\| rho*kernel. Similarities and candidates are",
        "arguments of a path. Several paths with & between them are a union: a position that two of them reach is read",
        "once, by the first that reaches it. Each example is a case of the conformance suite. This page is made",
        "from the words, by `python -m nearfold.grammar.vocabulary`.",
    ]
    for kind in ("path", "similarity", "candidates", "selector", "shape", "rho", "kernel"):
        lines += ["", f"## {kind.capitalize()}", "", "| word | meaning | goes with | example |", "|---|---|---|---|"]
        for word in WORDS[kind].values():
            said = " ".join((word.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
            shown = str(example(word)[0]).replace("|", "\\|")
            lines.append(f"| `{word.word}` | {said} | {_goes_with(word)} | `{shown}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
