"""Networks that others trained, out of an ONNX file: a part of its graph becomes a module with the file's weights.

Just the operations that `nearfold.recipes.ocr` meets; any other one is refused by name. The convolutions, norms and
pools are PyTorch's own modules, so that they train, change their dtype and can be exchanged by `nearfold.convert`.

Needs onnx (`pip install onnx`) to read a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Node:
    """One operation of a graph: what it is, what it reads, what it makes, and its settings."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """A graph as the file has it.

    Attributes:
        nodes: in an order in which they can run.
        weights: the tensors that were learned.
        constants: the tensors that were not.
        notes: what else the file says, by name.
    """

    nodes: tuple[Node, ...]
    weights: dict[str, Tensor]
    constants: dict[str, Tensor]
    notes: dict[str, str]

    def tensor(self, name: str) -> Tensor:
        """A weight or a constant, by name.

        Raises:
            ValueError: for another name.
        """
        for kind in (self.weights, self.constants):
            if name in kind:
                return kind[name]
        raise ValueError(f"the graph has no weight and no constant called {name!r}")


def read(file: Path) -> Graph:
    """The graph of an ONNX file; every node of it with one output.

    Raises:
        ImportError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("an ONNX file is read by onnx, which is not installed: pip install onnx") from error
    model = onnx.load(str(file))
    nodes, constants = [], {}
    for node in model.graph.node:
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = torch.from_numpy(onnx.numpy_helper.to_array(settings["value"]).copy())
        else:
            nodes.append(Node(node.op_type, tuple(node.input), node.output[0], settings))
    weights = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    return Graph(tuple(nodes), weights, constants, {note.key: note.value for note in model.metadata_props})


def _conv(node: Node, graph: Graph) -> nn.Module:
    weight, s = graph.tensor(node.inputs[1]), node.settings
    groups = s.get("group", 1)
    made = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        tuple(s.get("strides", (1, 1))),
        _border(node),
        tuple(s.get("dilations", (1, 1))),
        groups,
        bias=len(node.inputs) > 2,
    )
    return filled(made, weight=weight, **({"bias": graph.tensor(node.inputs[2])} if len(node.inputs) > 2 else {}))


def _norm(node: Node, graph: Graph) -> nn.Module:
    found = [graph.tensor(name) for name in node.inputs[1:]]
    made = nn.BatchNorm2d(len(found[0]), eps=node.settings.get("epsilon", 1e-5))
    return filled(made, **dict(zip(("weight", "bias", "running_mean", "running_var"), found, strict=True)))


def _pool(node: Node, graph: Graph) -> nn.Module:
    return nn.AvgPool2d(
        tuple(node.settings["kernel_shape"]), tuple(node.settings.get("strides", (1, 1))), _border(node)
    )


def _border(node: Node) -> tuple[int, int]:
    """Zeros above and left, which must be as many as below and right."""
    top, left, bottom, right = node.settings.get("pads", (0, 0, 0, 0))
    odd = (top, left) != (bottom, right) or node.settings.get("auto_pad", b"NOTSET") != b"NOTSET"
    if odd or node.settings.get("ceil_mode") or (node.kind == "AveragePool" and (top or left)):
        raise ValueError(f"{node.kind} {node.output!r}: its padding {node.settings} is none that is read here")
    return top, left


def filled(module: M, **tensors: Tensor) -> M:
    """A module, its parameters and buffers set to given tensors of their shape."""
    for name, tensor in tensors.items():
        own = getattr(module, name)
        if own.shape != tensor.shape:
            raise ValueError(f"{name} of {type(module).__name__} is {tuple(own.shape)}; got {tuple(tensor.shape)}")
        own.data.copy_(tensor)
    return module


LAYERS: dict[str, Callable[[Node, Graph], nn.Module]] = {
    "Conv": _conv,
    "BatchNormalization": _norm,
    "AveragePool": _pool,
}
"""Operations that own their weights: they read the first input alone."""
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda s, a, b: a + b,
    "Mul": lambda s, a, b: a * b,
    "Div": lambda s, a, b: a / b,
    "Clip": lambda s, x, low, high: torch.minimum(torch.maximum(x, low), high),
    "Concat": lambda s, *tensors: torch.cat(tensors, s["axis"]),
    "GlobalAveragePool": lambda s, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda s, x: (x * s.get("alpha", 0.2) + s.get("beta", 0.5)).clamp(0, 1),
    "ReduceMean": lambda s, x: x.mean(tuple(s["axes"]), keepdim=bool(s.get("keepdims", 1))),
    "Relu": lambda s, x: x.relu(),
    "Sigmoid": lambda s, x: x.sigmoid(),
}
"""The others: a function of the settings and all inputs."""


class Part(nn.Module):
    """What a graph makes of one of its tensors on the way to another one.

    Args:
        graph: of `read`.
        start: name of the tensor that `forward` is given.
        end: name of the tensor that it gives back.

    Raises:
        ValueError: the way to `end` needs something that neither `start` nor the weights give, or an operation or a
            padding that is not read here.
    """

    def __init__(self, graph: Graph, start: str, end: str) -> None:
        super().__init__()
        self.start, self.end, self.layers = start, end, nn.ModuleDict()
        self.nodes = _between(graph, start, end)
        self.held: dict[str, str] = {}
        for number, node in enumerate(self.nodes):
            if node.kind in LAYERS:
                self.layers[str(number)] = LAYERS[node.kind](node, graph)
            elif node.kind in FUNCTIONS:
                for name in node.inputs:
                    self._hold(name, graph)
            else:
                known = ", ".join(sorted((*LAYERS, *FUNCTIONS)))
                raise ValueError(f"{node.kind} ({node.output!r}) is none of the operations that are read here: {known}")

    def _hold(self, name: str, graph: Graph) -> None:
        """Keep a weight as a parameter, or a constant as a buffer."""
        if name not in self.held and (name in graph.weights or name in graph.constants):
            own = self.held[name] = f"tensor{len(self.held)}"
            tensor = graph.tensor(name)
            if name in graph.weights and tensor.is_floating_point():
                self.register_parameter(own, nn.Parameter(tensor))
            else:
                self.register_buffer(own, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor `end`, where `start` is x."""
        made = {self.start: x} | {name: getattr(self, own) for name, own in self.held.items()}
        for number, node in enumerate(self.nodes):
            if node.kind in LAYERS:
                made[node.output] = self.layers[str(number)](made[node.inputs[0]])
            else:
                made[node.output] = FUNCTIONS[node.kind](node.settings, *(made[name] for name in node.inputs))
        return made[self.end]


def _between(graph: Graph, start: str, end: str) -> tuple[Node, ...]:
    """The nodes that make `end` of `start`, in the graph's order."""
    makers = {node.output: node for node in graph.nodes}
    needed, open_ = set(), [end]
    while open_:
        name = open_.pop()
        if name == start or name in needed or name in graph.weights or name in graph.constants:
            continue
        if name not in makers:
            raise ValueError(f"{end!r} needs {name!r}, which is neither made of {start!r} nor a weight of the graph")
        needed.add(name)
        open_ += makers[name].inputs
    return tuple(node for node in graph.nodes if node.output in needed)
