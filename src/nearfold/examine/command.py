"""`nearfold xray`: where every layer of a network looks, as a table, a page and JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time

from torch import Tensor

from nearfold.examine.images import images_of, normalised
from nearfold.examine.page import page
from nearfold.examine.report import XRay
from nearfold.examine.suggest import suggest
from nearfold.examine.xray import xray
from nearfold.models.named import WHAT, named
from nearfold.options import file, sizes, whole

EXAMPLES = """\
examples:
  nearfold xray resnet8s_hybrid --pretrained --data cifar10=path/to/cifar10
  nearfold xray resnet8s_hybrid --pretrained --against resnet8s_attention
  nearfold xray timm:swin_tiny_patch4_window7_224 --data photographs --images 8 --out swin.html
  nearfold xray transformers:ViTModel --images 4
  nearfold xray my_network.py:make_model --input 3,64,64 --suggest"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("model", metavar="MODEL", help=WHAT)
    parser.add_argument(
        "--data", metavar="FOLDER",
        help="images: a folder of image files, or a data set as `nearfold train` takes it (default: crops of two "
        "photographs of scikit-learn)",
    )  # fmt: skip
    parser.add_argument("--images", type=whole(2, 10000), default=16, metavar="N", help="how many (default: 16)")
    parser.add_argument(
        "--input", type=_size, metavar="C,H,W", help="size of an image (default: the one the network is for)"
    )
    parser.add_argument("--pretrained", action="store_true", help="with the weights that come along")
    parser.add_argument("--against", metavar="MODEL", help="a second network, beside the first on the page")
    parser.add_argument("--suggest", action="store_true", help="rules for nearfold.convert, each tried on the images")
    parser.add_argument("--out", type=file, metavar="FILE", default="xray.html", help="default: xray.html")
    parser.add_argument("--json", type=file, metavar="FILE", help="all numbers as JSON")


def _size(written: str) -> tuple[int, ...]:
    return sizes(written, 3, "channels, height and width, such as 3,224,224")


def run(args: argparse.Namespace) -> int:
    """Examine, print the table, write the page: the exit code."""
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {args.out}: the page is HTML: name it .html")
    shown: list[tuple[str, XRay, Tensor]] = []
    for spec in filter(None, (args.model, args.against)):
        model, size = named(spec, args.pretrained)
        model.eval()
        size = args.input or size
        if size is None or len(size) != 3:
            raise ValueError(f"--input must say the size of an image for {spec}, such as --input 3,224,224")
        pixels = images_of(args.data, args.images, (size[0], size[1], size[2]))
        images, note = normalised(model, pixels)
        images = images.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype))
        seen = xray(model, images, progress=_Clock(spec))
        shown.append((spec, seen, pixels[0]))
        print(seen)
        small = "a small configuration: layers of the same kinds, fewer and narrower, with random weights"
        for said in (note, small if spec.startswith("transformers:") else ""):
            if said:
                print(f"note: {said}")
        if args.suggest:
            suggestions = suggest(model, images, seen)
            print(
                "", "what could stand there, tried on these images:" if suggestions else "nothing to suggest", sep="\n"
            )
            for one in suggestions:
                print(f"  {one}")
        print()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(shown), encoding="utf-8")
    print(args.out)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{spec} (2)" if i and spec == shown[0][0] else spec for i, (spec, _, _) in enumerate(shown)]
        content = {name: seen.to_dict() for name, (_, seen, _) in zip(names, shown, strict=True)}
        args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
        print(args.json)
    return 0


class _Clock:
    """Progress and time left, on a terminal's last line."""

    def __init__(self, what: str) -> None:
        self.what, self.began = what, time.monotonic()

    def __call__(self, done: int, of: int, name: str) -> None:
        if not sys.stderr.isatty():
            return
        left = (time.monotonic() - self.began) / done * (of - done)
        end = "\n" if done == of else ""
        print(
            f"\r\033[K{self.what}: {done} of {of}, {left:.0f} s left: {name}"[:110],
            end=end,
            file=sys.stderr,
            flush=True,
        )
