"""The space of a search: which operations are proposed, as choices that lead to a notation.

A table of words whose arguments are left open. What goes with what is not said here: the grammar is asked.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nearfold.grammar import Basic, Branch, Operation, Sum, parse

Value = str | int | float
Suggest = Callable[[str, Sequence[Value]], Value]
"""(name of a choice, what it is among) -> one of them."""


@dataclass(frozen=True)
class Form:
    """A word whose arguments are left open.

    Attributes:
        text: with a place in braces for every argument.
        values: what each may be.
    """

    text: str
    values: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def filled(self) -> Iterator[tuple[dict[str, Value], str]]:
        """Every way to fill it: the arguments, and the text.

        >>> [text for _, text in Form("window({k})", {"k": (3, 5)}).filled()]
        ['window(3)', 'window(5)']
        """
        for chosen in itertools.product(*self.values.values()):
            arguments = dict(zip(self.values, chosen, strict=True))
            yield arguments, self.text.format(**arguments)


SIDES, MANY = (3, 5, 7, 9, 11, 15), (3, 5, 9, 16, 25)
SIMILARITIES = ("scaled", "dot", "cosine", "euclidean")
PATHS: dict[str, Form] = {
    "window": Form("window({k})", {"k": SIDES}),
    "dilated": Form("window({k}, dilation={dilation})", {"k": (3, 5), "dilation": (2, 3, 4)}),
    "inside": Form("window({k}, mode=inside)", {"k": SIDES}),
    "row": Form("window((1, {k}))", {"k": SIDES}),
    "column": Form("window(({k}, 1))", {"k": SIDES}),
    "deformable": Form("deformable({k})", {"k": (3, 5)}),
    "axial": Form("axial({axis})", {"axis": (0, 1)}),
    "both axes": Form("axial(0) & axial(1)"),
    "all": Form("all{similarity}", {"similarity": ("", "(dot)", "(cosine)")}),
    "nearest": Form(
        "nearest({n}, {similarity}{candidates}{own})",
        {
            "n": MANY, "similarity": SIMILARITIES, "own": ("", ", self"),
            "candidates": ("", ", random(32)", ", window(5)", ", grid(5)"),
        },
    ),
    "blend": Form("nearest({n}, blend({lam}){own})", {"n": MANY, "lam": (0.1, 0.25, 0.5, 0.75), "own": ("", ", self")}),
    "window and nearest": Form(
        "window({k}) & nearest({n}, {similarity})", {"k": (3, 5), "n": MANY, "similarity": SIMILARITIES}
    ),
    "scan": Form(
        "scan(state={state}, order={order}{reverse})",
        {"state": (4, 16), "order": ("raster", "columns", "snake"), "reverse": ("", ", reverse")},
    ),
}  # fmt: skip
SHAPES = ("box", "ranked", "row", "causal")
HEADS = (1, 2, 4, 8)
RHOS: dict[str, Form] = {
    "ones": Form("ones"),
    "softmax": Form("softmax(heads={heads})", {"heads": HEADS}),
    "sigmoid": Form("sigmoid(heads={heads})", {"heads": HEADS}),
    "sparsemax": Form("sparsemax(heads={heads})", {"heads": HEADS}),
    "generated": Form("generated(groups={heads})", {"heads": HEADS}),
    "modulated": Form("modulated"),
    "mean": Form("mean"),
    "max": Form("max"),
    "table": Form("table({inputs})", {"inputs": ()}),
    "selective": Form("selective"),
}
KERNELS = ("", "*kernel", "*depthwise", "*separable")
RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Space:
    """Operations for maps of `grid` positions with so many channels.

    >>> space = Space(32, (8, 8))
    >>> space.draw(lambda name, choices: choices[0])
    'window(3) | box | ones'
    >>> space.parameters("window(3) | box | kernel")["path"]
    'window'
    """

    channels: int
    grid: tuple[int, ...]

    @functools.cached_property
    def paths(self) -> dict[str, Form]:
        """The paths whose sizes fit the grid."""
        side, positions = max(self.grid), math.prod(self.grid)
        return _limited(PATHS, {"k": lambda k: k <= side, "n": lambda n: n < positions})

    @functools.cached_property
    def rhos(self) -> dict[str, Form]:
        """The weights, with heads that divide the channels and tables for the grid."""
        table = replace(RHOS["table"], values={"inputs": (math.prod(self.grid),)})
        return _limited({**RHOS, "table": table}, {"heads": lambda heads: self.channels % heads == 0})

    def draw(self, suggest: Suggest) -> str:
        """A notation by choices, which may still be one that the grammar refuses: an argument need not go with all.

        Raises:
            ValueError: it is.
        """
        form = suggest("form", ("one", "sum", "branch"))
        if form == "one":
            return str(parse(self._basic(suggest)))
        first = self._basic(lambda name, among: suggest(f"first {name}", among))
        second = self._basic(lambda name, among: suggest(f"second {name}", among))
        if form == "sum":
            return str(parse(f"a*({first}) + b*({second})"))
        return str(parse(f"branch({suggest('ratio', RATIOS)}, {first}, {second}, mix)"))

    def parameters(self, notation: str) -> dict[str, Value] | None:
        """The choices that lead to an operation; None where it lies outside the space."""
        found = self._chosen(parse(notation))
        if found is None:
            return None
        try:
            again = self.draw(lambda name, among: among[among.index(found[name])])
        except (KeyError, ValueError):
            return None
        return found if again == str(parse(notation)) else None

    def _basic(self, suggest: Suggest) -> str:
        def fill(name: str, form: Form) -> str:
            return form.text.format(**{arg: ask(f"{name} {arg}", among) for arg, among in form.values.items()})

        def ask(name: str, among: Sequence[Value]) -> Value:
            return suggest(name, among) if len(among) > 1 else among[0]

        path = str(suggest("path", tuple(self.paths)))
        looks = fill(path, self.paths[path])
        shape = str(ask(f"{path} shape", self.shapes(path)))
        fitting = self.weights(path, shape)
        rho = str(ask(f"{path} {shape} weight", tuple(fitting)))
        values = fill(rho, self.rhos[rho])
        kernel = ask(f"{path} {shape} {rho} kernel", fitting[rho])
        return f"{looks} | {shape} | {values}{kernel}"

    @functools.lru_cache  # noqa: B019 - a space is small, and there are few
    def shapes(self, path: str) -> tuple[str, ...]:
        """The shapes that go with a path."""
        return tuple(shape for shape in SHAPES if self.weights(path, shape))

    @functools.lru_cache  # noqa: B019
    def weights(self, path: str, shape: str) -> dict[str, tuple[str, ...]]:
        """The kernels by the weights that go with a path, its arguments being the first ones, and a shape."""
        _, looks = next(self.paths[path].filled())
        found = {}
        for rho, form in self.rhos.items():
            _, values = next(form.filled())
            if kernels := tuple(k for k in KERNELS if _parsed(f"{looks} | {shape} | {values}{k}")):
                found[rho] = kernels
        return found

    def _chosen(self, op: Operation) -> dict[str, Value] | None:
        if isinstance(op, Basic):
            return self._chosen_basic(op)
        if isinstance(op, Sum) and op.rates == ("a", "b"):
            found: dict[str, Value] = {"form": "sum"}
        elif isinstance(op, Branch):
            found = {"form": "branch", "ratio": op.ratio}
        else:
            return None
        for side, operand in zip(("first", "second"), op.operands, strict=True):
            inside = self._chosen_basic(operand) if isinstance(operand, Basic) else None
            if inside is None:
                return None
            found |= {f"{side} {name}": value for name, value in inside.items() if name != "form"}
        return found

    def _chosen_basic(self, op: Basic) -> dict[str, Value] | None:
        looks, values = self._paths_by_text.get(str(op.path)), self._weights_by_text.get(str(op.weight))
        if looks is None or values is None:
            return None
        (path, path_arguments), (rho, rho_arguments, kernel) = looks, values
        shape = str(op.shape)
        return {
            "form": "one", "path": path, f"{path} shape": shape, f"{path} {shape} weight": rho,
            f"{path} {shape} {rho} kernel": kernel,
            **{f"{path} {name}": value for name, value in path_arguments.items()},
            **{f"{rho} {name}": value for name, value in rho_arguments.items()},
        }  # fmt: skip

    @functools.cached_property
    def _paths_by_text(self) -> dict[str, tuple[str, dict[str, Value]]]:
        """Form and arguments by a path as the language prints it."""
        found: dict[str, tuple[str, dict[str, Value]]] = {}
        for name, form in self.paths.items():
            shape = self.shapes(name)[0]
            values = [
                next(self.rhos[rho].filled())[1] + kernels[0] for rho, kernels in self.weights(name, shape).items()
            ]
            for arguments, text in form.filled():
                tries = (_parsed(f"{text} | {shape} | {value}") for value in values)  # not every one reads a similarity
                if (op := next(filter(None, tries), None)) is not None:
                    found.setdefault(str(op.parts[0].path), (name, arguments))
        return found

    @functools.cached_property
    def _weights_by_text(self) -> dict[str, tuple[str, dict[str, Value], str]]:
        """Form, arguments and kernel by a weight as the language prints it."""
        places: dict[tuple[str, str], str] = {}  # a path and shape that each rho and kernel go with
        for path in self.paths:
            _, looks = next(self.paths[path].filled())
            for shape in self.shapes(path):
                for rho, kernels in self.weights(path, shape).items():
                    for kernel in kernels:
                        places.setdefault((rho, kernel), f"{looks} | {shape}")
        found: dict[str, tuple[str, dict[str, Value], str]] = {}
        for (rho, kernel), place in places.items():
            for arguments, text in self.rhos[rho].filled():
                if (op := _parsed(f"{place} | {text}{kernel}")) is not None:
                    found.setdefault(str(op.parts[0].weight), (rho, arguments, kernel))
        return found


def _parsed(notation: str) -> Operation | None:
    """An operation, or None where the grammar refuses it."""
    try:
        return parse(notation)
    except ValueError:
        return None


def _limited(forms: Mapping[str, Form], keep: Mapping[str, Callable[[int], bool]]) -> dict[str, Form]:
    """The forms with the values that are kept; without those that then have none."""
    found = {}
    for name, form in forms.items():
        values = {
            arg: tuple(v for v in among if not (isinstance(v, int) and arg in keep) or keep[arg](v))
            for arg, among in form.values.items()
        }
        if all(values.values()):
            found[name] = replace(form, values=values)
    return found
