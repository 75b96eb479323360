"""The notation: text -> Operation (`parse`). Printing is `str(operation)`.

    operation := term (("+") term)*
    term      := [rate "*"] ( "(" operation ")" | "branch(" number "," operation "," operation ["," "mix"] ")"
                            | path "|" shape "|" weight | a name of the catalogue )
    rate      := a number | a name, whose number is learned | "gate", made of the input
    path      := word ("&" word)*                         several: their union
    weight    := rho ["*" kernel] | kernel
    word      := name ["(" argument ("," argument)* ")"]      argument := value | name "=" value | flag

A hand-written recursive descent over the word classes' own fields, so that errors can point at the place
(docs/decisions/0005).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from typing import Any, NoReturn

from nearfold.grammar.operation import Basic, Branch, Operation, Sum, Weight
from nearfold.grammar.word import WORDS, Word
from nearfold.grammar.words import Ones, Union

NAMES: dict[str, tuple[str, str]] = {}
"""Names that stand for an operation: its notation, and words by which somebody may look for it."""

ENDS = ("", "+", ")", ",")
"""What may follow an operation; a name before it stands alone."""

MAX_DEPTH = 50  # far from Python's recursion limit
SHOWN = 300  # characters of a text in an error

_type_hints = functools.lru_cache(maxsize=1024)(typing.get_type_hints)  # most of the time of a reading, otherwise

_TOKEN = re.compile(r"\s*(?:(?P<number>-?\d+\.?\d*(?:[eE][-+]?\d+)?|-?\.\d+)|(?P<name>[A-Za-z_]\w*)|(?P<sign>.))")


class NotationError(ValueError):
    """The text is not an operation. ``position`` is the offset of the place in ``text``."""

    def __init__(self, message: str, text: str, position: int) -> None:
        self.message, self.text, self.position = message, text, position
        near, at = text, position
        if len(text) > SHOWN:  # its part around the place
            start = max(position - SHOWN // 2, 0)
            near, at = f"...{text[start : start + SHOWN]}...", position - start + 3
        super().__init__(f"{message}\n  {near}\n  {' ' * at}^")

    def __reduce__(self) -> tuple[Any, ...]:  # so that it crosses process boundaries
        return type(self), (self.message, self.text, self.position)


def parse(text: str) -> Operation:
    """Read an operation from its notation.

    Args:
        text: for instance ``"nearest(9, cosine) | ranked | kernel"``, or a name of the catalogue, such as ``"convnn"``,
            which may stand inside of others as well: ``"branch(0.5, convnn, conv)"``.

    Returns:
        A frozen, hashable `Operation`; ``parse(str(operation)) == operation``.

    Raises:
        NotationError: with the place and the choices there.

    >>> print(parse("nearest(9,cosine)|ranked|softmax * depthwise"))
    nearest(9, cosine) | ranked | softmax*depthwise
    >>> print(parse("branch(0.5, convnn, conv)"))
    branch(0.5, nearest(9, cosine, self) | ranked | kernel, window(3) | box | kernel)
    >>> print(parse("a*(all | row | softmax(heads=4)) + b*(window(3) | box | kernel)"))
    a*(all | row | softmax(heads=4)) + b*(window(3) | box | kernel)
    """
    if not isinstance(text, str):
        raise ValueError(f"parse: text must be a str in the notation, got {type(text).__name__}")
    flat = " ".join(text.split())
    if not flat:
        raise NotationError("empty notation; write path | shape | weight, such as window(3) | box | kernel", flat, 0)
    return _parse(flat, Word.registered)


def did_you_mean(name: str) -> str:
    """Names of the catalogue that somebody may have meant, in brackets; empty where none is close.

    By letters, and by the words of an operator's title and source.

    >>> did_you_mean("swim"), did_you_mean("involutoin"), did_you_mean("convolution")
    (' (did you mean swin?)', ' (did you mean involution?)', ' (did you mean conv or conv_strided or conv_dilated?)')
    """
    low = name.lower().replace("-", "_")
    words = {known: f" {known} {about} ".lower().replace("-", "_") for known, (_, about) in NAMES.items()}
    plain = low.replace("_", " ")
    close = [low] if low in NAMES else [known for known, about in words.items() if f" {low} " in about]
    close += [known for known, about in words.items() if f" {plain} " in about.replace("_", " ")]
    close += difflib.get_close_matches(low, NAMES, 3)
    close += [known for known, about in words.items() if len(low) > 2 and low in about]
    found = list(dict.fromkeys(close))[:3]
    return f" (did you mean {' or '.join(found)}?)" if found else ""


@functools.lru_cache(maxsize=1024)
def _parse(flat: str, registered: int) -> Operation:
    return _Parser(flat).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        for m in _TOKEN.finditer(text):
            kind = m.lastgroup or "sign"
            self.tokens.append((kind, m.group(kind), m.start(kind)))
        self.tokens.append(("end", "", len(text)))
        self.at = self.depth = 0

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        raise NotationError(message, self.text, self.tokens[self.at][2] if position is None else position)

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)][1]

    def take(self, sign: str, why: str) -> None:
        if self.peek() != sign:
            found = self.peek() or "the end"
            self.fail(f"expected '{sign}' {why}, found {found!r}")
        self.at += 1

    def whole(self) -> Operation:
        op = self.operation()
        if self.tokens[self.at][0] != "end":
            self.fail(f"expected '+' or the end, found {self.peek()!r}")
        return op

    def operation(self) -> Operation:
        start = self.tokens[self.at][2]
        if self.depth == MAX_DEPTH:
            self.fail(f"operations inside operations go at most {MAX_DEPTH} deep")
        self.depth += 1
        terms = [self.term()]
        while self.peek() == "+":
            self.at += 1
            terms.append(self.term())
        self.depth -= 1
        if len(terms) > 1:
            return self.build(start, Sum, tuple(terms))
        rate, op = terms[0]
        if rate is not None:
            self.fail("a rate belongs to a sum: a*(...) + b*(...)", start)
        return op

    def term(self) -> tuple[str | float | None, Operation]:
        rate: str | float | None = None
        kind, value, _ = self.tokens[self.at]
        if self.peek(1) == "*" and kind in ("name", "number"):
            rate = value if kind == "name" else float(value)
            self.at += 2
        if self.peek() == "(":
            self.at += 1
            op = self.operation()
            self.take(")", "to close the operation")
            return rate, op
        return rate, self.branch() if self.peek() == "branch" and self.peek(1) not in ENDS else self.basic()

    def branch(self) -> Operation:
        start = self.tokens[self.at][2]
        self.at += 1
        self.take("(", "after branch: branch(ratio, A, B)")
        kind, value, _ = self.tokens[self.at]
        if kind != "number":
            self.fail(f"branch starts with its ratio, a number between 0 and 1, found {value!r}")
        self.at += 1
        self.take(",", "between ratio and first operand")
        first = self.operation()
        self.take(",", "between the two operands")
        second = self.operation()
        flags = {"mix": False, "split": False}
        while self.peek() == "," and not flags.get(self.peek(1), True):
            flags[self.peek(1)] = True
            self.at += 2
        self.take(")", "to close branch (only the flags mix and split may follow the operands, once each)")
        return self.build(start, Branch, float(value), first, second, **flags)

    def basic(self) -> Operation:
        kind, name, start = self.tokens[self.at]
        if kind == "name" and (self.peek(1) in ENDS or "|" not in self.text):  # no path, with a shape and a weight
            if name not in NAMES or self.peek(1) not in ENDS:
                text = name if self.peek(1) in ENDS else self.text
                self.fail(
                    f"{text!r} is not the name of an operator{did_you_mean(text)}; write path | shape | weight, such "
                    "as window(3) | box | kernel, or a name that `nearfold ops` lists"
                )
            self.at += 1
            return parse(NAMES[name][0])
        path = self.word(("path",))
        if self.peek() == "&":
            paths = [path]
            while self.peek() == "&":
                self.at += 1
                paths.append(self.word(("path",)))
            path = self.build(start, Union, tuple(paths))
        self.take("|", "between path and shape")
        shape = self.word(("shape",))
        self.take("|", "between shape and weight")
        weight_at = self.tokens[self.at][2]
        first = self.word(("rho", "kernel"))
        if first.kind == "rho" and self.peek() == "*":
            self.at += 1
            weight = self.build(weight_at, Weight, first, self.word(("kernel",)))
        elif first.kind == "rho":
            weight = self.build(weight_at, Weight, first)
        else:
            weight = self.build(weight_at, Weight, Ones(), first)
        return self.build(start, Basic, path, shape, weight)

    def build(self, start: int, make: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except NotationError:
            raise
        except (ValueError, TypeError) as e:
            self.fail(str(e), start)

    def word(self, kinds: tuple[str, ...]) -> Word:
        kind, name, start = self.tokens[self.at]
        choices = {n: c for k in kinds for n, c in WORDS[k].items()}
        if kind != "name" or name not in choices:
            close = difflib.get_close_matches(name, choices, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            expected = " or ".join(kinds)
            self.fail(f"{name or 'the end'!r} is not a {expected}{hint}; choose from: {', '.join(choices)}")
        self.at += 1
        cls = choices[name]
        return self.build(start, cls, **self.arguments(cls))

    def arguments(self, cls: type[Word]) -> dict[str, Any]:
        fields = {f.metadata.get("notation", f.name): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = _type_hints(cls)  # type: ignore[arg-type]
        order = [n for n, f in fields.items() if f.default is dataclasses.MISSING or f.metadata.get("positional")]
        found: dict[str, Any] = {}
        opened = self.peek() == "("
        if opened:
            self.at += 1
            while self.peek() != ")":
                self.argument(cls, fields, hints, order, found)
                if self.peek() == ",":
                    self.at += 1
                elif self.peek() != ")":
                    self.fail(f"expected ',' or ')' in {cls.word}(...), found {self.peek() or 'the end'!r}")
            self.at += 1
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING and f.name not in found]
        if required:
            self.fail(f"{cls.word} needs {required[0]}: {cls.word}({', '.join(order)})", self.tokens[self.at - 1][2])
        return found

    def argument(self, cls: type[Word], fields: Any, hints: Any, order: list[str], found: dict[str, Any]) -> None:
        kind, value, start = self.tokens[self.at]
        flag = kind == "name" and value in fields and _accepts(hints[fields[value].name], bool)
        if kind == "name" and self.peek(1) == "=":
            if value not in fields:
                close = difflib.get_close_matches(value, fields, 1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                self.fail(f"{cls.word} has no argument {value!r}{hint}; it takes: {', '.join(fields) or 'none'}")
            name = value
            self.at += 2
            parsed = self.value(hints[fields[name].name])
        elif flag and self.peek(1) in (",", ")"):
            name, parsed = value, True
            self.at += 1
        else:
            if kind == "name" and value in fields:
                self.fail(f"{cls.word}: {value} needs a value: {value}=...")
            open_names = [n for n in order if fields[n].name not in found]
            if not open_names:
                self.fail(f"{cls.word} takes no such argument: {value!r}; it takes: {', '.join(fields) or 'none'}")
            name, parsed = self.positional(open_names, fields, hints)
        if fields[name].name in found:
            self.fail(f"{cls.word}: {name} is given twice", start)
        found[fields[name].name] = parsed

    def positional(self, names: list[str], fields: Any, hints: Any) -> tuple[str, Any]:
        """A value without a name goes to the first open field that can hold it."""
        kind, value, _ = self.tokens[self.at]
        if kind == "name":
            for name in names:
                target = hints[fields[name].name]
                if any(value in WORDS[kind] for kind in _word_kinds(target)):
                    return name, self.value(target)
        return names[0], self.value(hints[fields[names[0]].name])

    def value(self, hint: Any) -> Any:
        kind, value, start = self.tokens[self.at]
        if word_kinds := _word_kinds(hint):
            return self.word(word_kinds)
        if value == "(":
            self.at += 1
            if self.peek() == ")":
                self.at += 1
                return ()
            items = [self.entry()]
            while self.peek() == ",":
                self.at += 1
                if self.peek() != ")":
                    items.append(self.entry())
            self.take(")", "to close the tuple")
            return tuple(items)
        self.at += 1
        if kind == "number":
            return self.number(value, start)
        if kind == "name" and value in ("true", "false") and _accepts(hint, bool):
            return value == "true"
        if kind == "name" and _accepts(hint, str):
            return value
        self.fail(f"expected {_describe(hint)}, found {value or 'the end'!r}", start)

    def entry(self) -> int | float:
        """One number of a tuple."""
        kind, value, start = self.tokens[self.at]
        if kind != "number":
            self.fail(f"expected an integer, found {value or 'the end'!r}")
        self.at += 1
        return self.number(value, start)

    def number(self, value: str, start: int) -> int | float:
        try:
            return float(value) if re.search(r"[.eE]", value) else int(value)
        except ValueError:  # Python's limit on the digits of an integer
            self.fail(f"a number of {len(value)} digits is too long", start)


def _members(hint: Any) -> tuple[Any, ...]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(m for h in typing.get_args(hint) for m in _members(h))
    return (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return kind in _members(hint)


def _word_kinds(hint: Any) -> tuple[str, ...]:
    return tuple(m.kind for m in _members(hint) if isinstance(m, type) and issubclass(m, Word))


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "a flag", str: "a name"}
    return " or ".join(names[m] for m in _members(hint) if m in names) or "a value"


def parse_word(kind: str, text: str | Word) -> Any:
    """One word of a kind from its notation, or the word itself: ``parse_word("similarity", "blend(0.3)")``.

    Raises:
        NotationError: when the text is not a word of this kind.
        ValueError: when given a word of another kind.
    """
    if isinstance(text, Word):
        if text.kind != kind:
            raise ValueError(f"{kind} must be one of {', '.join(WORDS[kind])}, got {text} (a {text.kind})")
        return text
    if not isinstance(text, str):
        raise ValueError(f"{kind} must be notation or a word, got {text!r}")
    parser = _Parser(" ".join(text.split()))
    word = parser.word((kind,))
    if parser.tokens[parser.at][0] != "end":
        parser.fail(f"expected the end of the {kind}, found {parser.peek()!r}")
    return word
