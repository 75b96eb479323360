"""From a model to a program of core ATen, and from what was written back to the model: the same numbers?"""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from nearfold._images import first_line

Outputs = list[Tensor]
Shapes = tuple[tuple[int, ...], ...]
DRAWS = 3
STEPS = (32, 5)
"""How much longer the open axes are on which an export is compared, besides the size that was given."""
GRIDS = ("length",), ("height", "width"), ("depth", "height", "width")


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it compares with the model.

    Attributes:
        path: the file.
        kind: ``"onnx"``, ``"pt2"`` or ``"aoti"``.
        sizes: of all inputs, for every size at which it was compared.
        difference: the largest of any output number, over the largest number of that output, in all comparisons that
            agree.
        flipped: comparisons that do not, where another draw of inputs of that size does: of nearly equal neighbours a
            search can take another one after other rounding. Their differences are not in `difference`.
        open: the axes of every input that may have other sizes.
        nodes: of the graph, those inside loops and functions not counted.
        operators: how often the graph has each operator.
    """

    path: Path
    kind: str
    sizes: tuple[Shapes, ...]
    difference: float
    flipped: int
    open: tuple[tuple[int, ...], ...]
    nodes: int
    operators: Mapping[str, int]

    def __str__(self) -> str:
        def written(shapes: Shapes) -> str:
            return " and ".join(", ".join(map(str, shape)) for shape in shapes)

        axes = "; ".join(", ".join(map(str, found)) or "none" for found in self.open)
        flips = f"; {self.flipped} more, with nearly equal neighbours, by more" if self.flipped else ""
        return (
            f"{self.path}: {self.path.stat().st_size / 2**20:.1f} MiB, {self.nodes:,} nodes\n"
            f"open axes: {axes}\n"
            f"compared with the model at {' | '.join(map(written, self.sizes))}: differs by {self.difference:.1e} of "
            f"the largest output{flips}"
        )


def tensors(args: Any) -> tuple[Tensor, ...]:
    """The inputs of a model: one tensor or several.

    Raises:
        ValueError: something else.
    """
    given = (args,) if isinstance(args, Tensor) else args
    if not isinstance(given, (tuple, list)) or not given or not all(isinstance(x, Tensor) for x in given):
        raise ValueError(
            f"args must be a tensor or a tuple of tensors, the inputs of the model; got {type(args).__name__}"
        )
    return tuple(given)


def _runs(model: nn.Module, args: Sequence[Tensor], axis: int) -> bool:
    """Whether a model takes inputs that are longer on one axis."""
    longer = [
        _like(x, [n + STEPS[0] * (a == axis) for a, n in enumerate(x.shape)], 0) if x.dim() > axis else x for x in args
    ]
    with torch.no_grad():
        try:
            model(*longer)
        except (ValueError, RuntimeError, AssertionError):
            return False
    return True


def _asked(model: nn.Module, args: Sequence[Tensor], dynamic: Any) -> Any:
    """torch's `dynamic_shapes`."""
    if dynamic is None:
        return None
    if dynamic == "batch":
        return tuple({0: Dim.AUTO} if x.dim() else None for x in args)
    if dynamic == "sizes":
        axes = [axis for axis in range(max(x.dim() for x in args)) if axis == 0 or _runs(model, args, axis)]
        return tuple({axis: Dim.AUTO for axis in axes if axis < x.dim()} for x in args)
    if isinstance(dynamic, (dict, tuple, list)):
        return dynamic
    raise ValueError(
        f"dynamic must be None, 'batch', 'sizes' or what torch.export.export takes as dynamic_shapes; got {dynamic!r}"
    )


def traced(model: nn.Module, args: Sequence[Tensor], dynamic: Any) -> ExportedProgram:
    """The program of a model, with the library's operators.

    Raises:
        ValueError: the model, or a part of it, is in training mode, it does not run on the inputs, or a batch that was
            to be open is not.
    """
    _require_ready(model, args)
    shapes = _asked(model, args, dynamic)
    example = tuple(args)
    if dynamic in ("batch", "sizes"):  # torch takes a size of one for a fixed one
        example = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in args)
    with torch.no_grad(), _quiet():
        program = torch.export.export(model, example, dynamic_shapes=shapes)
        if dynamic == "sizes" and not all(
            0 in axes for axes in opened(program)
        ):  # of two samples, which nobody asked for
            fixed = tuple({axis: Dim.AUTO for axis in each if axis} for each in shapes)
            return torch.export.export(model, tuple(args), dynamic_shapes=fixed)
    if dynamic == "batch" and not all(0 in axes for axes in opened(program)):
        raise ValueError(
            f"dynamic='batch': the model computes with the number {args[0].shape[0]} of samples as such, so that it "
            "cannot be left open; use dynamic=None"
        )
    return program


def _require_ready(model: nn.Module, args: Sequence[Tensor]) -> None:
    """ValueError where there is nothing that could be exported."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        which = f"its part {training[0]!r}" if training[0] else "the model"
        raise ValueError(f"{which} is in training mode, in which it may drop and draw: call model.eval() first")
    try:
        with torch.no_grad():
            model(*(x.clone() for x in args))
    except Exception as error:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in args)
        raise ValueError(f"args: the model does not run on {shapes}: {first_line(error)}") from error


ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def cause(error: BaseException) -> str:
    """The first line of what an error came of, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return ESCAPES.sub("", first_line(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def inputs_of(program: ExportedProgram) -> list[torch.Size]:
    """The shapes of a program's inputs; integers, and symbols where they are open."""
    names = set(program.graph_signature.user_inputs)
    return [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def is_open(n: int | torch.SymInt) -> bool:
    """Whether a size is open: a symbol may have become the number of the example."""
    return isinstance(n, torch.SymInt) and not n.node.expr.is_number


def opened(program: ExportedProgram) -> tuple[tuple[int, ...], ...]:
    """The open axes of every input."""
    return tuple(tuple(axis for axis, n in enumerate(shape) if is_open(n)) for shape in inputs_of(program))


def symbols(program: ExportedProgram) -> dict[str, str]:
    """A word for every symbol that is an axis of an input: batch, and height and width of (B, C, H, W)."""
    words: dict[str, str] = {}
    for shape in inputs_of(program):
        if len(shape) < 1:
            continue
        grid = GRIDS[len(shape) - 3] if 3 <= len(shape) <= 5 and not is_open(shape[1]) else None
        for axis, n in enumerate(shape):
            if is_open(n) and str(n).isidentifier():
                other = "length" if len(shape) == 3 else f"axis{axis}"
                word = "batch" if axis == 0 else grid[axis - 2] if grid else other
                taken = set(words.values())
                words.setdefault(str(n), word if word not in taken else f"{word}{len(taken)}")
    return words


def _like(x: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    if x.is_floating_point():
        return torch.randn(*shape, generator=draws).to(x.device, x.dtype)
    if x.dtype == torch.bool:
        return (torch.rand(*shape, generator=draws) < 0.5).to(x.device)
    return torch.randint(int(x.min()), int(x.max()) + 1, tuple(shape), generator=draws).to(x.device, x.dtype)


def _trials(program: ExportedProgram, args: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, ...]]]:
    """For the size that was given and for others, where sizes are open: some inputs, at first those that were given."""
    shapes = inputs_of(program)
    batches = {str(shape[0]) for shape in shapes if len(shape)}
    for more, step in enumerate((0, *STEPS) if any(opened(program)) else (0,)):
        each = [
            [n + (more if str(s) in batches else step) * is_open(s) for n, s in zip(x.shape, shape, strict=True)]
            for x, shape in zip(args, shapes, strict=True)
        ]
        draws = [tuple(_like(x, n, seed) for x, n in zip(args, each, strict=True)) for seed in range(DRAWS)]
        yield draws if step else [tuple(args), *draws[1:]]


def _outputs(found: Any) -> Outputs:
    leaves = torch.utils._pytree.tree_leaves(found)
    return [x for x in leaves if isinstance(x, Tensor)]


@dataclass(frozen=True)
class Comparison:
    """Fields of `Exported`."""

    sizes: tuple[Shapes, ...]
    difference: float
    flipped: int


def compare(
    model: nn.Module, program: ExportedProgram, args: Sequence[Tensor], run: Callable[..., Any], tolerance: float
) -> Comparison:
    """Compare what `run` computes with the model. A wrong graph is wrong for every draw, a flipped search for few.

    Raises:
        ValueError: it differs by more than the tolerance of the largest output, or no other size can be compared
            although sizes are open.
    """
    sizes, most, flipped, apart = [], 0.0, 0, 0.0
    guarded = program.module() if any(opened(program)) else None
    for i, draws in enumerate(_trials(program, args)):
        for draw, inputs in enumerate(draws):
            try:
                with torch.no_grad():
                    wanted = _outputs(model(*inputs))
                    if i and guarded is not None:
                        guarded(*inputs)
            except (ValueError, RuntimeError, AssertionError):
                if not i:
                    raise
                break  # a size that the model refuses, or for which the graph does not hold
            with torch.no_grad():
                apart = _difference(_outputs(run(*inputs)), wanted)
            if apart <= tolerance:
                sizes.append(tuple(tuple(x.shape) for x in inputs))
                most, flipped = max(most, apart), flipped + draw
                break
        else:
            raise ValueError(
                f"the export differs from the model by {apart:.1e} of the largest output, more than tolerance="
                f"{tolerance:g}, for {len(draws)} draws of inputs of {', '.join(str(tuple(x.shape)) for x in inputs)}"
            )
    if guarded is not None and len(sizes) == 1:
        raise ValueError(
            f"the sizes cannot be left open: of {len(program._guards_code)} conditions that the graph puts on them, "
            f"such as {'; '.join(program._guards_code[-2:]) or 'none'}, some hold for sizes like the example's alone. "
            "Export at another size, larger perhaps, or with dynamic='batch' or None"
        )
    return Comparison(tuple(sizes), most, flipped)


def _difference(found: Outputs, wanted: Outputs) -> float:
    if [x.shape for x in found] != [x.shape for x in wanted]:
        got, asked = ([tuple(x.shape) for x in each] for each in (found, wanted))
        raise ValueError(f"the export answers in {got}, the model in {asked}")
    return max((_apart(one, other) for one, other in zip(found, wanted, strict=True)), default=0.0)


def _apart(found: Tensor, wanted: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    if torch.equal(found.isnan(), wanted.isnan()):
        found, wanted = found.nan_to_num(), wanted.nan_to_num()
    largest = wanted.abs().max().item()
    apart = (found.double() - wanted.double()).abs().max().item()
    return apart / largest if largest else apart


@contextlib.contextmanager
def in_place(path: Path | str, ending: str) -> Iterator[Path]:
    """A file beside the path, which becomes it where nothing is raised.

    Raises:
        ValueError: the path does not end so, or its folder is not there.
    """
    path = Path(path)
    if path.suffix != ending:
        raise ValueError(f"path must end in {ending}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} is not there: make it first")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".nearfold-export-") as folder:
        made = Path(folder) / path.name
        yield made
        for file in sorted(Path(folder).iterdir()):
            file.replace(path.parent / file.name)


def shorten(program: ExportedProgram) -> None:
    """Ask every topk for no more than is read of it, in place: the oracle sorts all scores and keeps the first few.

    >>> class Best(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x.topk(20).indices[..., :3]
    >>> program = torch.export.export(Best(), (torch.randn(2, 20),)).run_decompositions()
    >>> shorten(program)
    >>> [node.args[1] for node in program.graph.nodes if node.target is torch.ops.aten.topk.default]
    [3]
    """
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.topk.default or node.kwargs:
            continue
        given: tuple[Any, ...] = (*node.args, *(-1, True, True)[len(node.args) - 2 :])
        x, k, axis, largest, ordered = given
        parts, axes = list(node.users), node.meta["val"][0].dim()
        ends = [_first(use, axes, axis) for part in parts for use in part.users]
        if type(k) is int and ordered and ends and min(ends) > 0 and (most := max(ends)) < k:
            node.args = (x, most, axis, largest)
            node.meta["val"] = tuple(value.narrow(axis, 0, most) for value in node.meta["val"])
            for part in parts:
                part.meta["val"] = node.meta["val"][cast(int, part.args[1])]
    program.graph_module.recompile()


def _first(node: Node, axes: int, axis: int) -> int:
    """Of a slice from the start of this axis, how many it keeps; 0: it is something else."""
    if node.target is not torch.ops.aten.slice.Tensor or node.kwargs:
        return 0
    given: tuple[Any, ...] = (*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :])
    along, start, end, step = given
    if along % axes != axis % axes or start not in (0, None) or step != 1 or type(end) is not int:
        return 0
    return max(0, end)
