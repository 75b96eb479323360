"""The tables of docs/howto/int8.md: accuracy in int8 and in low precision, and how many neighbours are others.

    python recipes/int8.py [--cifar10 FOLDER] [--page]

Networks for digits are trained here, in half a minute each; those for CIFAR-10 come along. Results are kept in
benchmarks/results/int8.json, so that a part can be run again; the page shows all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfold.export import to_int8, to_onnx
from nearfold.grammar import CATALOGUE
from nearfold.models import create
from nearfold.models.pretrained import pretrained
from nearfold.models.resnet8 import LAYERS
from nearfold.models.small import SpectrumNet
from nearfold.nn import select_in_float32
from nearfold.train import Recipe, fit, load_data, prepare
from nearfold.train.evaluation import normalise

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "howto" / "int8.md", ROOT / "benchmarks" / "results" / "int8.json"
MARK = "<!-- tables: recipes/int8.py -->\n"
LAYER = ("conv", "hybrid", "convnn", "kvt", "attention", "acmix")
EPOCHS, CALIBRATION, TESTED = 12, 64, 1000
"""Of the networks for digits; training images that set ranges; images of CIFAR-10."""
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Batches = tuple[Tensor, Tensor, Tensor]
"""Calibration images, test images, their labels."""


def digits(layer: str) -> tuple[nn.Module, Batches]:
    """A network of two blocks, trained on digits, and the images."""
    data = load_data("digits")
    torch.manual_seed(0)
    net = SpectrumNet(LAYERS[layer].notation if layer in LAYERS else CATALOGUE[layer].notation, 1, 10)
    fit(net, data, Recipe(epochs=EPOCHS, batch_size=64, lr=3e-3), progress=False)
    images = prepare(data.train.images[:CALIBRATION], data), prepare(data.test.images, data)
    return net.eval(), (*images, data.test.labels)


def cifar10(name: str, folder: str) -> tuple[nn.Module, Batches]:
    """A network that comes along, and the images."""
    stated, data = pretrained()[name], load_data(folder)
    mean, std = torch.tensor(stated.mean), torch.tensor(stated.std)
    images = (normalise(x, mean, std) for x in (data.train.images[:CALIBRATION], data.test.images[:TESTED]))
    return create(name, pretrained=True).eval(), (*images, data.test.labels[:TESTED])


class Chosen(TorchDispatchMode):
    """All neighbours that searches find."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.nearfold.select.default:
            self.found.append(made[1])
        return made


@torch.no_grad()
def accuracy(run: Callable[[Tensor], Tensor], batches: Batches) -> float:
    """Share of the test images that are classified correctly."""
    _, images, labels = batches
    made = torch.cat([run(x).float() for x in images.split(100)])
    return (made.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def chosen(run: Callable[[Tensor], Tensor], batches: Batches) -> list[Tensor]:
    """The neighbours on up to 200 test images, search by search."""
    with Chosen() as seen:
        run(batches[1][:200])
    return seen.found


def others(before: list[Tensor], after: list[Tensor]) -> list[float]:
    """Of every search, the share of slots that read another position."""
    return [(x != y).float().mean().item() for x, y in zip(before, after, strict=True)]


def quantisers() -> dict[str, Callable[[], Any]]:
    """torchao's for x86, and XNNPACK's."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    return {
        "x86": lambda: x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config()),
        "xnnpack": lambda: xnnpack.XNNPACKQuantizer().set_global(config),
    }


def torch_int8(net: nn.Module, batches: Batches, which: str) -> dict[str, Any]:
    """By torchao's PT2E, simulated in float32 as it leaves it."""
    calibration, images, _ = batches
    made = to_int8(net, images[:4], calibration.split(64), quantisers()[which](), dynamic="batch")
    return {"accuracy": accuracy(made.model, batches), "share": made.share, "moved": made.moved, "left": made.left}


def int8_weights(graph: Any) -> int:
    """How many numbers an ONNX graph multiplies by that are held in int8."""
    import math

    held = {x.name: math.prod(x.dims) for x in graph.initializer if x.data_type == 3 and len(x.dims) > 1}
    back = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return sum(held[name] for name in {back.get(each) for node in products for each in node.input} & set(held))


def onnx_int8(net: nn.Module, batches: Batches) -> dict[str, Any]:
    """By onnxruntime's static quantisation of the file that `to_onnx` writes."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static

    calibration, images, _ = batches

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: x.numpy()} for x in calibration.split(32)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, folded, small = (Path(folder) / name for name in ("plain.onnx", "folded.onnx", "int8.onnx"))
        to_onnx(net, images[:2], plain, dynamic="batch")
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        name = onnx.load(folded).graph.input[0].name
        quantize_static(folded, small, Reader(name), per_channel=True)
        session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
        held = int8_weights(onnx.load(small).graph)
        found = accuracy(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), batches)
    return {"accuracy": found, "share": held / sum(p.numel() for p in net.parameters())}


def low(net: nn.Module, batches: Batches) -> dict[str, Any]:
    """In bfloat16 and float16, under autocast and as a whole, as it is and with `select_in_float32`."""
    before, found = chosen(net, batches), {}
    try:
        ways = (False, True) if select_in_float32(net, False) else ()
    except ValueError:  # no search, or none by projections
        ways = (False,)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    for dtype in LOW:
        for precise in ways:
            if precise:
                select_in_float32(net)

            def cast(x: Tensor, dtype: str = dtype) -> Tensor:
                with torch.autocast("cpu", LOW[dtype]):
                    return net(x)

            def whole(x: Tensor, dtype: str = dtype) -> Tensor:
                return net(x.to(LOW[dtype]))

            for how, run in (("autocast", cast), ("whole", whole)):
                if how == "whole":
                    net.to(LOW[dtype])
                key = f"{dtype}, {how}" + (", selected in float32" if precise else "")
                found[key] = {"accuracy": accuracy(run, batches), "others": others(before, chosen(run, batches))}
            net.float().load_state_dict(state)
            if precise:
                select_in_float32(net, False)
    return found


def measured(net: nn.Module, batches: Batches) -> dict[str, Any]:
    """All of it for one network."""
    found: dict[str, Any] = {"float32": {"accuracy": accuracy(net, batches)}, "low": low(net, batches)}
    for which in ("x86", "xnnpack"):
        found[which] = torch_int8(net, batches, which)
    return found | {"onnxruntime": onnx_int8(net, batches)}


def percent(x: float | None, digits: int = 1) -> str:
    """A share."""
    return "–" if x is None else f"{100 * x:.{digits}f}"


def page(kept: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = [
        "| network | float32 | X86Inductor | XNNPACK | onnxruntime | parameters in int8, each | positions that are "
        "others, X86Inductor, XNNPACK |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for name, found in kept.items():
        ways = [found[way] for way in ("x86", "xnnpack", "onnxruntime")]
        cells = [percent(found["float32"]["accuracy"], 2), *(percent(way["accuracy"], 2) for way in ways)]
        shares = ", ".join(percent(way["share"]) for way in ways)
        moved = ", ".join(percent(way["moved"]) for way in ways[:2])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {shares} | {moved} |")
    lines += [
        "",
        "| network | precision | accuracy | slots with another neighbour, search by search |",
        "|---|---|---:|---|",
    ]
    for name, found in kept.items():
        rows = {"float32": found["float32"] | {"others": []}} | found["low"]
        for how, row in rows.items():
            each = ", ".join(percent(x) for x in row["others"]) or "–"
            lines.append(f"| {name} | {how} | {percent(row['accuracy'], 2)} | {each} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what has no result yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", metavar="FOLDER", help="where CIFAR-10 is: the networks that come along, too")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    jobs: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {}
    for layer in () if args.page else LAYER:
        jobs[f"{layer}, digits"] = lambda layer=layer: digits(layer)
    for name in pretrained() if args.cifar10 and not args.page else ():
        jobs[f"{name}, CIFAR-10"] = lambda name=name: cifar10(name, args.cifar10)
    for name, make in jobs.items():
        if name not in kept:
            kept[name] = measured(*make())
            print(name, kept[name], flush=True)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    before, start, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(before + start + "\n" + page(kept))


if __name__ == "__main__":
    main()
