"""The formats: each a thin layer over torch's exporter, and a comparison with the model."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nearfold.export.program import (
    Exported,
    _quiet,
    cause,
    compare,
    in_place,
    opened,
    shorten,
    symbols,
    tensors,
    traced,
)
from nearfold.export.table import decompositions

OPSET = 20
TOLERANCE = 1e-3
MOST = 1_800_000_000  # bytes of weights within an ONNX file, which holds 2 GB


def to_onnx(
    model: nn.Module,
    args: Tensor | tuple[Tensor, ...],
    path: Path | str,
    *,
    dynamic: Any = None,
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a model as ONNX, of standard operators only, and compare it with the model in onnxruntime.

    Of equal scores ONNX's TopK takes the lowest index, as the library does. Scans are Scan nodes; a window is one
    Gather for all of its slots. An ONNX file has no guards: at sizes for which the model's graph would be another one
    (fewer positions than a kernel has frequencies, say) it may fail or be wrong.

    Args:
        model: in evaluation mode, on the CPU.
        args: its inputs, one tensor or several.
        path: ends in ``.onnx``; weights beyond 1.8 GB come to lie beside it.
        dynamic: which sizes stay open: None for none, ``"batch"``, ``"sizes"`` for every axis that the model leaves
            open (batch, height and width, length), or what `torch.export.export` takes as ``dynamic_shapes``.
        opset: of ONNX, 20 at least.
        tolerance: the largest difference that is accepted, of the largest output.

    Returns:
        What was written and how it compares.

    Raises:
        ValueError: an argument does not fit, or it differs from the model by more, for several draws of inputs; nothing
            is written then.
        ImportError: onnx, onnxscript or onnxruntime is not installed.

    Example:
        >>> import tempfile, torch
        >>> from nearfold.nn import ConvNN2d
        >>> folder = tempfile.TemporaryDirectory()
        >>> made = to_onnx(ConvNN2d(4, 4, k=3).eval(), torch.randn(1, 4, 6, 6), folder.name + "/layer.onnx")
        >>> made.difference < 1e-5, made.operators["TopK"] > 0
        (True, True)
        >>> folder.cleanup()
    """
    _require_onnx()
    import onnx
    import onnxruntime

    newest = onnx.defs.onnx_opset_version()
    if type(opset) is not int or not OPSET <= opset <= newest:
        raise ValueError(f"opset must be from {OPSET} to {newest}, got {opset!r}")
    given = tensors(args)
    with in_place(path, ".onnx") as file:
        program = traced(model, given, dynamic)
        with _quiet(), torch.no_grad():
            lowered = program.run_decompositions(decompositions(stable_topk=True))
            shorten(lowered)
            _write(lowered, file, opset)
        graph = onnx.load(file, load_external_data=False)
        made = {imported.domain: imported.version for imported in graph.opset_import}
        if made.get("") != opset:
            raise ValueError(f"opset={opset} is more than torch {torch.__version__} writes: it wrote {made.get('')}")
        if words := symbols(program):
            _rename(graph, words)
            onnx.save(graph, file)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no base of their own
            types = ", ".join(sorted({str(p.dtype) for p in model.parameters()} | {str(x.dtype) for x in given}))
            said = cause(error).replace(str(file), str(path))
            raise ValueError(f"onnxruntime does not take the file ({types}): {said}") from error

        def run(*inputs: Tensor) -> list[Tensor]:
            named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
            return [torch.from_numpy(y) for y in session.run(None, named)]

        found = compare(model, program, given, run, tolerance)
        operators = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.graph.node)
    return Exported(
        Path(path), "onnx", **vars(found), open=opened(program), nodes=operators.total(), operators=operators
    )


def _write(program: ExportedProgram, file: Path, opset: int) -> None:
    """Write a program as ONNX.

    Raises:
        ValueError: torch has no way to say one of its operators.
    """
    large = _bytes(program) > MOST
    try:
        torch.onnx.export(program, (), file, dynamo=True, opset_version=opset, verbose=False, external_data=large)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"torch has no ONNX for the model: {cause(error)}") from error


def _bytes(program: ExportedProgram) -> int:
    return sum(t.numel() * t.element_size() for t in program.state_dict.values())


def _require_onnx() -> None:
    import importlib.util

    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'to_onnx needs {name}: pip install "nearfold[onnx]"')


def _rename(model: Any, words: dict[str, str]) -> None:
    """Give the open sizes of an ONNX model names that one can read, wherever they stand."""
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b")

    def visit(graph: Any) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.HasField("tensor_type"):
                for dim in value.type.tensor_type.shape.dim:
                    if dim.dim_param:
                        dim.dim_param = pattern.sub(lambda found: words[found[1]], dim.dim_param)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g)

    visit(model.graph)
    for function in model.functions:
        for value in function.value_info:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = pattern.sub(lambda found: words[found[1]], dim.dim_param)


def _program(
    model: nn.Module, args: tuple[Tensor, ...], dynamic: Any, own: bool
) -> tuple[ExportedProgram, Counter[str]]:
    program = traced(model, args, dynamic)
    with _quiet(), torch.no_grad():
        lowered = program if own else program.run_decompositions(decompositions())
    return lowered, Counter(str(node.target) for node in lowered.graph.nodes if node.op == "call_function")


def to_pt2(
    model: nn.Module,
    args: Tensor | tuple[Tensor, ...],
    path: Path | str,
    *,
    dynamic: Any = None,
    own_operators: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a model as `torch.export.save` does, load it, and compare it with the model.

    Args:
        model: in evaluation mode.
        args: its inputs, one tensor or several.
        path: ends in ``.pt2``.
        dynamic: as of `to_onnx`.
        own_operators: keep the library's operators: as fast as the model, and ``import nearfold`` is needed where it is
            loaded. Without, torch alone runs it, and holds all scores of a search.
        tolerance: as of `to_onnx`.

    Returns:
        What was written and how it compares.

    Raises:
        ValueError: an argument does not fit, or it differs from the model by more, for several draws of inputs; nothing
            is written then.

    Example:
        >>> import tempfile, torch
        >>> from nearfold.nn import ConvNN2d
        >>> folder = tempfile.TemporaryDirectory()
        >>> made = to_pt2(ConvNN2d(4, 4, k=3).eval(), torch.randn(1, 4, 6, 6), folder.name + "/a.pt2", dynamic="batch")
        >>> made.difference < 1e-5, made.open
        (True, ((0,),))
        >>> folder.cleanup()
    """
    given = tensors(args)
    with in_place(path, ".pt2") as file:
        program, operators = _program(model, given, dynamic, own_operators)
        torch.export.save(program, file)
        found = compare(model, program, given, torch.export.load(file).module(), tolerance)
    return Exported(
        Path(path), "pt2", **vars(found), open=opened(program), nodes=operators.total(), operators=operators
    )


def to_aoti(
    model: nn.Module,
    args: Tensor | tuple[Tensor, ...],
    path: Path | str,
    *,
    dynamic: Any = None,
    own_operators: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Compile a model ahead of time by AOTInductor, load the package, and compare it with the model.

    It runs where torch is, of the same version, and on the kind of processor that compiled it; a C++ compiler is needed
    here, none there. Arguments, result and errors are those of `to_pt2`.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    given = tensors(args)
    with in_place(path, ".pt2") as file:
        program, operators = _program(model, given, dynamic, own_operators)
        with torch.no_grad():
            aoti_compile_and_package(program, package_path=str(file))
        found = compare(model, program, given, aoti_load_package(str(file)), tolerance)
    return Exported(
        Path(path), "aoti", **vars(found), open=opened(program), nodes=operators.total(), operators=operators
    )
