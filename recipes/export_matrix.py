"""The tables of docs/export.md: every row of the catalogue and a network of every kind, by every way out.

    python recipes/export_matrix.py [NAME ...] [--aoti]

Results are kept in benchmarks/results/export.json, so that a part can be run again; the page shows all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.export import Exported, decompositions, to_aoti, to_onnx, to_pt2
from nearfold.export.program import compare, traced
from nearfold.grammar import CATALOGUE
from nearfold.models import MODELS, create
from nearfold.testing import context_for, make

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "export.md", ROOT / "benchmarks" / "results" / "export.json"
GRID = (28, 26)
"""Positions of an example: more than any row's blocks and frequencies need."""
SIX = ("conv", "convnn", "swin", "deformable_v2", "nsa", "mamba")
"""Rows for the ways that take a minute each: a window, a search, blocks, places, all three, a scan."""
NEAR = 1e-4
"""The largest difference, of the largest output, that the tables call none."""


def openvino(model: nn.Module, args: tuple[Tensor, ...], path: Path, *, dynamic: str | None) -> Exported:
    """ONNX, read and run by OpenVINO."""
    import openvino as ov

    onnx = path.with_suffix(".onnx")
    made = to_onnx(model, args, onnx, dynamic=dynamic)
    run = ov.compile_model(onnx, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def outputs(*inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in run([x.numpy() for x in inputs]).values()]

    return replace(made, **vars(compare(model, traced(model, args, dynamic), args, outputs, NEAR)))


def executorch(model: nn.Module, args: tuple[Tensor, ...], path: Path, *, dynamic: str | None) -> Exported:
    """ExecuTorch with XNNPACK, of one size: memory is planned ahead there."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    if dynamic is not None:
        raise ValueError("sizes are fixed")
    program = traced(model, args, None)
    lowered = program.run_decompositions(decompositions(stable_topk=True))
    edge = to_edge_transform_and_lower(
        lowered, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
    )
    path.write_bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")

    def outputs(*inputs: Tensor) -> list[Tensor]:
        return [x.clone() for x in method.execute([x.contiguous() for x in inputs])]

    found = compare(model, program, args, outputs, NEAR)
    operators = Counter(str(node.target) for node in lowered.graph.nodes if node.op == "call_function")
    return Exported(path, "pte", **vars(found), open=((),), nodes=operators.total(), operators=operators)


WAYS: dict[str, tuple[Callable[..., Exported], str]] = {
    "onnx": (to_onnx, ".onnx"),
    "pt2": (to_pt2, ".pt2"),
    "aoti": (to_aoti, ".pt2"),
    "openvino": (openvino, ".pt2"),
    "executorch": (executorch, ".pte"),
}


def row(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer of the catalogue, and what it takes."""
    layer, x = make(CATALOGUE[name].operation, GRID, torch.float32)
    context = context_for(layer.eval(), x)
    return layer, (x,) if context is None else (x, context.detach())


def kinds() -> dict[str, str]:
    """A network of every class, with every layer that networks of that class have, small."""
    found: dict[tuple[Any, str], str] = {}
    for name, entry in MODELS.items():
        found.setdefault((entry.network, str(entry.arguments.get("layer", ""))), name)
    return {name: MODELS[name].text for name in found.values()}


def network(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A small network of a kind, and an image."""
    torch.manual_seed(0)
    entry = MODELS[name]
    return create(name, **entry.tiny).eval(), (torch.randn(1, *entry.input_size),)


def tried(made: tuple[nn.Module, tuple[Tensor, ...]], way: str) -> dict[str, Any]:
    """What came of it: with open sizes, or, where a table or the network fixes them, with an open batch, or none."""
    write, ending = WAYS[way]
    why = ""
    for dynamic in ("sizes", "batch", None):
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = write(*made, Path(folder) / f"made{ending}", dynamic=dynamic)
            except Exception as error:  # what a way cannot do is what is asked
                while error.__cause__ is not None:
                    error = error.__cause__  # type: ignore[assignment]
                why = why or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
        grid = any(axis > 0 for axes in found.open for axis in axes)
        batch = any(0 in axes for axes in found.open)
        return {
            "open": "batch and sizes" if grid else "batch" if batch else "nothing",
            "difference": found.difference,
            "flipped": found.flipped,
            "nodes": found.nodes,
            "why": why,
        }
    return {"open": None, "why": why}


def main() -> None:
    """Run what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows and networks (default: those that have no result yet)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=("onnx", "pt2"))
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for way in () if args.page else args.ways:
        rows = [n for n in CATALOGUE if way in ("onnx", "pt2") or n in SIX]
        names = args.names or [n for n in (*rows, *(kinds() if way == "onnx" else ())) if way not in kept.get(n, {})]
        for name in names:
            made = row(name) if name in CATALOGUE else network(name)
            kept.setdefault(name, {})[way] = tried(made, way)
            print(name, way, kept[name][way], flush=True)
            KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    before, start, _ = PAGE.read_text().partition("<!-- tables: recipes/export_matrix.py -->\n")
    PAGE.write_text(before + start + "\n" + page(kept))


def cell(found: dict[str, Any] | None) -> str:
    """One result in the table."""
    if found is None:
        return ""
    if found["open"] is None:
        return f"no: {found['why']}"
    far = "" if found["difference"] <= NEAR else " (!)"
    flips = f", {found['flipped']} flipped" if found["flipped"] else ""
    return f"{found['difference']:.0e}{far}, open: {found['open']}{flips}"


def page(kept: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    done = [n for n in CATALOGUE if kept.get(n, {}).get("onnx", {}).get("open")]
    wide = [n for n in done if kept[n]["onnx"]["open"] == "batch and sizes"]
    lines = [
        f"Of the {len(CATALOGUE)} rows of the catalogue {len(done)} reach ONNX, {len(wide)} of them with batch and "
        "sizes open. A number is the largest difference from the layer, of its largest output, at all sizes.",
        "",
        "| row | nodes | ONNX, onnxruntime | torch alone (.pt2) | AOTInductor | OpenVINO | ExecuTorch, XNNPACK |",
        "|---|---:|---|---|---|---|---|",
    ]
    for name in CATALOGUE:
        found = kept.get(name, {})
        nodes = found.get("onnx", {}).get("nodes", "")
        lines.append(f"| {name} | {nodes} | " + " | ".join(cell(found.get(way)) for way in WAYS) + " |")
    lines += ["", "Networks, small ones of each kind:", "", "| network | nodes | ONNX, onnxruntime |", "|---|---:|---|"]
    for name in kinds():
        found = kept.get(name, {}).get("onnx")
        lines.append(f"| {name} | {(found or {}).get('nodes', '')} | {cell(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
