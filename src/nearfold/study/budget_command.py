"""`nearfold budget`: how few positions the attention of a model of one's own needs."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfold.options import above, numbers, several, whole
from nearfold.study.compare import signed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nearfold.study.sweep import Images, Measured, Sweep
    from nearfold.train import ImageData

EXAMPLES = """\
examples:
  nearfold budget my_model.py:trained --data path/to/images
  nearfold budget timm:vit_tiny_patch16_224 --weights mine.safetensors --data path/to/images
  nearfold budget path/to/saved --data digits --k 32,16,8 --batch 8

Nothing is trained and nothing is written: the model's attention layers are made to read the k best keys instead of all,
in all layers and in each half of them, and put back. One half of the held-out images chooses a setting, the other
reports. A model is timm:NAME or torchvision:NAME with --weights, path/to/file.py:factory, a function that returns a
trained model, or a folder that a nearfold network's save_pretrained left."""
TOLERANCE = 1.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nearfold budget`."""
    parser.add_argument("model", metavar="MODEL", help="timm:NAME, torchvision:NAME, path/to/file.py:factory, a folder")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="images, as for `nearfold train`")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict: .safetensors, or one of torch.save")
    parser.add_argument("--k", type=_counts, default=(), metavar="A,B", help="default: 1/2, 1/4, 1/8 and 1/16 of all")
    parser.add_argument("--keep", type=_points, default=TOLERANCE, metavar="P", help="points that may go (default: 1)")
    parser.add_argument("--limit", type=whole(), default=2000, metavar="N", help="test images at most (default: 2000)")
    parser.add_argument("--batch", type=whole(), default=1, metavar="N", help="images of a timed call (default: 1)")
    parser.add_argument(
        "--image-size", type=whole(), metavar="N", help="pixels (default: a timm model's, or as they are)"
    )
    parser.add_argument(
        "--mean", type=numbers, metavar="A,B", help="to normalise by, in 0..1 (default: a timm model's,"
    )
    parser.add_argument("--std", type=numbers, metavar="A,B", help="or the training images')")
    parser.add_argument("--device", default="cpu", metavar="D", help="where it runs (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """`nearfold budget`."""
    import torch

    from nearfold.study.given import load
    from nearfold.study.measure import machine
    from nearfold.study.sweep import sweep
    from nearfold.train.distributed import join

    device = join(args.device).device
    model = load(args.model, args.weights).to(device)
    images = held_out(model, args)
    _require_fit(model, images, device, f"{args.model} does not take the images of --data {args.data}")
    there = type(images)(images.x.to(device), images.labels.to(device))
    say = functools.partial(print, "measured:", file=sys.stderr)
    found = sweep(model, there, ks=args.k, batch=args.batch, say=say)
    threads = "" if device.type != "cpu" else f", {torch.get_num_threads()} threads"
    print("\n".join(report(found, args.keep / 100, f"{machine(str(device))}{threads}")))
    return 0


def _require_fit(model: nn.Module, images: Images, device: torch.device, fault: str) -> None:
    """ValueError where the model does not run on the images."""
    import torch

    x = images.x[:2].to(device)
    try:
        with torch.no_grad():
            model.eval()(x)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{fault}, {tuple(x.shape[1:])} (--image-size sets their size): {reason}") from error


def held_out(model: nn.Module, args: argparse.Namespace) -> Images:
    """The test images as the model takes them, in an order drawn once."""
    import torch

    from nearfold.study.given import ways_of
    from nearfold.study.sweep import Images
    from nearfold.train import load_data
    from nearfold.train.evaluation import normalise

    own = ways_of(model)
    data = load_data(
        args.data, test_limit=args.limit, image_size=args.image_size or (own.get("input_size") or [None])[-1]
    )
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    mean, std = (_channels(args, name, own, data) for name in ("mean", "std"))
    return Images(normalise(data.test.images[order], mean, std), data.test.labels[order])


def _channels(args: argparse.Namespace, name: str, own: dict[str, Any], data: ImageData) -> Tensor:
    import torch

    given = getattr(args, name) or own.get(name)
    found = torch.tensor(given, dtype=torch.float32) if given else getattr(data, name)
    if len(found) != data.channels:
        raise ValueError(f"--{name} must have a number for each of {data.channels} channels, got {found.tolist()}")
    return found


def report(found: Sweep, keep: float, machine: str) -> list[str]:
    """The table and the recommendation, as lines.

    Args:
        found: the sweep.
        keep: the share of accuracy that may go.
        machine: what it was measured on.
    """
    from nearfold.study.document import Cell, Table

    layers = ", ".join(f"{name} ({n} positions)" for name, n in found.layers[:3])
    layers += f" and {len(found.layers) - 3} more" if len(found.layers) > 3 else ""
    head = ("k", "layers", "accuracy %", "change, points", "ms", "times as fast", "quartiles")
    texts = [
        (
            str(m.setting.k), m.setting.where, f"{100 * m.accuracy:.1f}", _change(m), f"{m.latency_ms:.2f}",
            f"{m.faster[1]:.2f}", f"{m.faster[0]:.2f} to {m.faster[2]:.2f}",
        )
        for m in found.found
    ]  # fmt: skip
    table = Table("settings", head, [list(map(Cell, line)) for line in texts], left=(0, 1))
    befores = [m.before_ms for m in found.found]
    before = f"{min(befores):.2f} to {max(befores):.2f}" if befores else "not timed"
    return [
        f"attention: {layers}",
        f"as it was: {100 * found.accuracy:.1f} % of {found.images} images, {before} ms a call of {found.batch}",
        "",
        table.text(head),
        "",
        f"Accuracy and its change with 95 % intervals are on {found.images} held-out images that chose nothing. "
        f"Latency: median of calls in turn with the model as it was, on {machine}; it holds for "
        "this machine and this batch.",
        "",
        _recommendation(found, keep),
    ]


def _change(m: Measured) -> str:
    e = m.reported
    return f"{signed(e.mean)} ({signed(e.low)} to {signed(e.high)})"


def _recommendation(found: Sweep, keep: float) -> str:
    if not found.knows:
        return (
            f"Nothing is recommended: the model as it was is hardly better than naming the most frequent class "
            f"({100 * found.most:.1f} %). Are these its weights, its classes in this order, and its --mean and --std?"
        )
    best = found.recommended(keep)
    allowed = f"{100 * keep:g} points"
    if best is not None:
        return (
            f"Keep the accuracy, spend less: k = {best.setting.k} in {best.setting.where} attention layers "
            f"is the fastest that loses at most {allowed} on the images that choose. On the others it has "
            f"{100 * best.accuracy:.1f} %, {_change(best)} points, and is {best.faster[1]:.2f} times as fast "
            f"({best.before_ms:.2f} to {best.latency_ms:.2f} ms)."
        )
    faster = [m for m in found.found if m.faster[0] > 1]
    if not faster:
        return "Keep the model as it is: no setting is faster here. Larger images, or a larger --batch, may differ."
    closest = max(m.chosen.low for m in faster)
    text = f"Keep the model as it is: no faster setting can be said to lose at most {allowed}."
    if all(m.chosen.mean < -keep for m in faster):
        return text
    return (
        f"{text} With {faster[0].chosen.n} images to choose by, the best can be said to lose at most "
        f"{max(0.0, -100 * closest):.1f}: more images, or --keep {math.ceil(-1000 * closest) / 10:g}."
    )


def _points(text: str) -> float:
    value = above(0, allow=True)(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"wanted points of accuracy, from 0 to 100, got {text!r}")
    return value


_counts = several(whole(), "numbers of positions, such as 32,16,8")
