"""int8 by the quantisers of others: weights of projections and kernels are found, positions are left alone."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from nearfold._images import first_line
from nearfold.export.program import _difference, _outputs, _quiet, tensors, traced
from nearfold.export.table import decompositions

aten = torch.ops.aten
WEIGHTED = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
"""What multiplies by a weight, its second operand."""
SOURCES: dict[Any, Callable[..., Any]] = {
    aten.conv1d.default: F.conv1d,
    aten.conv2d.default: F.conv2d,
    aten.conv3d.default: F.conv3d,
    aten.linear.default: F.linear,
    aten.relu.default: F.relu,
    aten.gelu.default: F.gelu,
    aten.silu.default: F.silu,
    aten.hardtanh.default: F.hardtanh,
    aten.hardswish.default: F.hardswish,
    aten.add.Tensor: operator.add,
    aten.max_pool2d.default: F.max_pool2d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
}
"""The function that a quantiser looks for, by which operator it became."""
WHOLE = {aten.add.Tensor: aten.add.Scalar, aten.sub.Tensor: aten.sub.Scalar, aten.mul.Tensor: aten.mul.Scalar}
"""Of an integer and a number: the operator that says so. XNNPACK's quantiser makes the numbers of the others floats."""
ANNOTATION = "quantization_annotation"  # torchao's


@dataclass(frozen=True)
class Int8:
    """A model of which weights, and what is multiplied by them, are int8.

    Attributes:
        model: a graph of torch's operators with quantise and dequantise around what is int8, as `torchao` makes it, for
            ``torch.compile`` (after X86InductorQuantizer) or `torch.export.export` and ExecuTorch (after
            XNNPACKQuantizer).
        weights: names of the parameters that are int8.
        left: names of those with two axes or more that are not.
        share: of all the model's parameters, counted one by one, how many are int8.
        difference: from the model on ``args``, of the largest output.
        moved: of all positions on ``args`` from which a search or a place reads, the share that are others than the
            model's; None where there are none that depend on the input.
    """

    model: nn.Module
    weights: tuple[str, ...]
    left: tuple[str, ...]
    share: float
    difference: float
    moved: float | None

    def __str__(self) -> str:
        moved = "" if self.moved is None else f"; {100 * self.moved:.1f} % of the positions read are others"
        return (
            f"int8: {len(self.weights)} weights, {100 * self.share:.1f} % of all parameters\n"
            f"left as they are: {', '.join(self.left) or 'none'}\n"
            f"differs from the model by {self.difference:.1e} of the largest output{moved}"
        )


def to_int8(
    model: nn.Module,
    args: Tensor | tuple[Tensor, ...],
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    quantizer: Any,
    *,
    dynamic: Any = None,
    stable_topk: bool = False,
) -> Int8:
    """Quantise a model after training by torchao's PT2E, and say what became int8 and how far it is from the model.

    The quantiser is given the model in core ATen. What it annotates of integers, masks and infinite numbers is undone,
    and so is what decides where a search or a place reads, back to the last product with a weight: scores and offsets
    are computed in float32, from what these products give, which some quantisers (XNNPACK's) round to 256 numbers.

    Args:
        model: in evaluation mode, on the CPU.
        args: its inputs, one tensor or several: of the size that it is made for.
        batches: inputs like those it is for, by which the ranges of numbers are set; some 100 samples. Of the size of
            ``args``, but for what ``dynamic`` leaves open.
        quantizer: one of torchao's interface, such as X86InductorQuantizer or XNNPACKQuantizer with its configuration
            set; one quantiser for one model.
        dynamic: as of `to_onnx`.
        stable_topk: as of `decompositions`; ExecuTorch wants it.

    Returns:
        The model, what became int8, and the comparison.

    Raises:
        ValueError: an argument does not fit, or the quantiser finds nothing.
        ImportError: torchao is not installed.

    Example::

        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        made = to_int8(model, images[:1], images.split(32), quantizer, dynamic="batch")
        print(made)
        fast = torch.compile(made.model)
    """
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    except ImportError as error:
        raise ImportError('to_int8 needs torchao: pip install "nearfold[int8]"') from error
    if not all(callable(getattr(quantizer, name, None)) for name in ("annotate", "transform_for_annotation")):
        raise ValueError(
            f"quantizer must be one of torchao's interface, such as X86InductorQuantizer(); got {quantizer!r:.100}"
        )
    given = tensors(args)
    if isinstance(batches, Tensor):
        raise ValueError("batches must be several inputs, a list or a loader: images.split(32), not images")
    with _quiet(), torch.no_grad():
        program = traced(model, given, dynamic).run_decompositions(decompositions(stable_topk))
        plain, graph = _readable(program.module()), _readable(program.module())
        names = _held(graph)
        prepared = prepare_pt2e(graph, _kept(quantizer, given))
        seen = 0
        for batch in batches:
            _calibrate(prepared, tensors(batch), given, dynamic)
            seen += 1
        if not seen:
            raise ValueError("batches holds nothing: give some inputs by which the ranges of numbers are set")
        found = _quantised(prepared, names)
        if not found:
            raise ValueError(f"{type(quantizer).__name__} finds no weights: was its configuration set (set_global)?")
        with _norms_hidden(prepared) as shown:
            made = _settled(shown(convert_pt2e(prepared)))
        apart = _difference(_outputs(made(*given)), _outputs(model(*given)))
        moved = _moved(_positions(plain, given), _positions(made, given))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    weights = tuple(name for name in sizes if name in found)
    left = tuple(name for name, p in model.named_parameters() if p.dim() > 1 and name not in found)
    return Int8(made, weights, left, sum(sizes[n] for n in weights) / sum(sizes.values()), apart, moved)


def _calibrate(prepared: GraphModule, batch: tuple[Tensor, ...], given: tuple[Tensor, ...], dynamic: Any) -> None:
    try:
        prepared(*batch)
    except (AssertionError, RuntimeError, TypeError) as error:
        shapes, made = ([tuple(x.shape) for x in each] for each in (batch, given))
        raise ValueError(
            f"batches: the model as it is made from args of {made} does not take {shapes}: {first_line(error)}. "
            f"dynamic={dynamic!r}; 'batch' leaves the number of samples open"
        ) from error


def _quantised(prepared: GraphModule, names: dict[str, set[str]]) -> set[str]:
    """Names of the parameters that multiply behind an observer; ``names`` are those of `_held`."""
    moving, found = _moving(prepared), set()
    for node in prepared.graph.nodes:
        if _weighs(node, moving) and node.args[1].op == "call_module":  # an observer of torchao
            for name in _parameters(node.args[1].args[0]):
                found |= names.get(name, {name})
    return found


def _settled(graph: GraphModule) -> GraphModule:
    """With parameters of its own, for which there are no gradients: a graph of no_grad may not run where there are."""
    for module in graph.modules():
        for name, given in module._parameters.items():
            if given is not None:
                module._parameters[name] = nn.Parameter(given.detach().clone(), requires_grad=False)
    return graph


NORM = aten._native_batch_norm_legit_no_training.default


def _norm(*args: Any) -> Any:
    return NORM(*args)


@contextlib.contextmanager
def _norms_hidden(graph: GraphModule) -> Iterator[Callable[[GraphModule], GraphModule]]:
    """Norms under another name: torchao has folded those behind convolutions, and for others traces 96 patterns."""

    def renamed(of: GraphModule, old: Any, new: Any) -> GraphModule:
        for node in of.graph.nodes:
            node.target = new if node.target is old else node.target
        of.recompile()
        return of

    renamed(graph, NORM, _norm)
    yield lambda made: renamed(made, _norm, NORM)


def _readable(graph: GraphModule) -> GraphModule:
    """The graph with what quantisers look for: which function a node was, and integers that stay integers."""
    for node in graph.graph.nodes:
        node.meta.pop("torch_fn", None)  # of what was decomposed it names what it was a part of
        source = SOURCES.get(node.target)
        node.meta["source_fn_stack"] = [(node.name, source or node.target)]
        value = node.meta.get("val")
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        if whole and node.target in WHOLE and not isinstance(node.args[1], Node):
            node.target = WHOLE[node.target]
    graph.recompile()
    return graph


def _held(graph: GraphModule) -> dict[str, set[str]]:
    """Hold what is computed of parameters and multiplies as a weight of its own: of which parameters, by its name.

    torchao folds norms into the convolutions before them, and takes their weights for parameters.
    """

    def value(node: Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(graph)
        assert callable(node.target)
        return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    made: dict[str, set[str]] = {}
    moving = _moving(graph)
    for node in list(graph.graph.nodes):
        if _weighs(node, moving) and (weight := node.args[1]).op != "get_attr":
            name = f"weight_of_{node.name}"
            graph.register_parameter(name, nn.Parameter(value(weight).contiguous(), requires_grad=False))
            made[name] = set(_parameters(weight))
            with graph.graph.inserting_before(node):
                held = graph.graph.get_attr(name)
            held.meta = dict(weight.meta)
            node.replace_input_with(weight, held)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return made


def _moving(graph: GraphModule) -> set[Node]:
    """What depends on the inputs."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _weighs(node: Node, moving: set[Node]) -> bool:
    return node.target in WEIGHTED and node in moving and node.args[1] not in moving


class _Values(Interpreter):
    """What a graph computes, node by node, by what `read` makes of it."""

    def __init__(self, graph: GraphModule, read: Callable[[Node, Any], None]) -> None:
        super().__init__(graph)
        self.read = read

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.read(n, value)
        return value


def _numbers(value: Any) -> bool:
    """Whether it is floating point and finite."""
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())


def _left_alone(graph: GraphModule, args: tuple[Tensor, ...]) -> tuple[set[Node], set[Node]]:
    """Nodes of no finite numbers on these inputs, and those that decide where is read, back to the last weights."""
    odd: set[Node] = set()
    starts: list[Node] = []
    moving = _moving(graph)

    def read(node: Node, value: Any) -> None:
        if not _numbers(value):
            odd.add(node)
        leaves = value if isinstance(value, (tuple, list)) else (value,)
        if node in moving and any(isinstance(x, Tensor) and not x.is_floating_point() for x in leaves):
            starts.append(node)

    _Values(graph, read).run(*args)
    deciding: set[Node] = set()
    while starts:
        node = starts.pop()
        if node not in deciding and not _weighs(node, moving):
            deciding.add(node)
            starts += [each for each in node.all_input_nodes if each in moving]
    return odd, deciding


def _kept(quantizer: Any, args: tuple[Tensor, ...]) -> Any:
    """The quantiser, of whose annotations some are undone."""
    from torchao.quantization.pt2e.quantizer import Quantizer

    class Kept(Quantizer):
        def transform_for_annotation(self, model: GraphModule) -> GraphModule:
            return quantizer.transform_for_annotation(model)

        def annotate(self, model: GraphModule) -> GraphModule:
            made = quantizer.annotate(model) or model
            _undo(made, *_left_alone(made, args))
            return made

        def validate(self, model: GraphModule) -> None:
            quantizer.validate(model)

    return Kept()


def _undo(graph: GraphModule, odd: set[Node], deciding: set[Node]) -> None:
    """Take annotations away: of what is no number, of what decides, and those that refer to one that is away."""
    noted = {node: node.meta[ANNOTATION] for node in graph.graph.nodes if ANNOTATION in node.meta}
    for node, note in list(noted.items()):
        given = [each for each, spec in note.input_qspec_map.items() if spec is not None]
        if node in deciding or any(each in odd for each in (node, *given)):
            del noted[node]

    def stands(place: Any) -> bool:
        if isinstance(place, tuple):
            return place[1] in noted and noted[place[1]].input_qspec_map.get(place[0]) is not None
        return place in noted and noted[place].output_qspec is not None

    lost = True
    while lost:
        lost = False
        for node, note in list(noted.items()):
            specs = [spec for spec in (*note.input_qspec_map.values(), note.output_qspec) if spec is not None]
            shared = [spec.edge_or_node for spec in specs if hasattr(spec, "edge_or_node")]
            shared += [place for spec in specs for place in getattr(spec, "derived_from", ())]
            if not all(map(stands, shared)):
                del noted[node]
                lost = True
    for node in graph.graph.nodes:
        if node not in noted:
            node.meta.pop(ANNOTATION, None)


def _parameters(node: Node) -> Iterator[str]:
    """Names of what a node is computed from, which depends on no input."""
    if node.op == "get_attr":
        yield str(node.target)
    for each in node.all_input_nodes:
        yield from _parameters(each)


READ = {aten.gather.default: 2, aten.index_select.default: 2}
"""Which operand says where is read."""
VIEWS = (aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.clone.default)


def _positions(graph: GraphModule, args: tuple[Tensor, ...]) -> list[Tensor]:
    """All integers by which something is read and that depend on the inputs, each once."""
    moving, wanted = _moving(graph), {}
    for node in graph.graph.nodes:
        if node.target in READ:
            at = node.args[READ[node.target]]
            while at.target in VIEWS:
                at = at.args[0]
            if at in moving:
                wanted[at] = torch.empty(0)

    def read(node: Node, value: Any) -> None:
        if node in wanted:
            wanted[node] = value.clone()

    _Values(graph, read).run(*args)
    return list(wanted.values())


def _moved(before: list[Tensor], after: list[Tensor]) -> float | None:
    """The share of positions that are others."""
    total = sum(x.numel() for x in before)
    if not total:
        return None
    return sum(int((x != y).sum()) for x, y in zip(before, after, strict=True)) / total
