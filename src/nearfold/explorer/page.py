"""The explorer as one page: graphs, photographs, texts and scripts are inside, ONNX Runtime Web beside it or fetched.

Shape legend: H x W pixels.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfold._images import jpeg_uri
from nearfold._pages import environment
from nearfold.explorer.graphs import SIDE, kept
from nearfold.explorer.operators import CHOICES, GRID, LAMBDA, OPERATORS, START
from nearfold.look.layers import FEATURES, SHARPNESS, STEP
from nearfold.look.picture import load_image

VERSION = "1.30.0"
"""Of onnxruntime-web, on npm."""
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"
BESIDE = "runtime/"
RUNTIME = {
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
"""What the page loads of it, code and binary, with the digests without which it does not."""
PIXELS = 448
"""Of a photograph along each side, as it is drawn."""
AT = (11, 13)
"""The patch that is asked at first."""
STOPS = 33


@dataclass(frozen=True)
class Photograph:
    """One of scikit-learn's: its name, what is on it, who made it, where it is from."""

    name: str
    about: str
    author: str
    source: str

    @property
    def uri(self) -> str:
        """The middle square, as JPEG."""
        pixels = load_image(f"sample:{self.name}.jpg")
        side = min(pixels.shape[1:])
        top, left = ((n - side) // 2 for n in pixels.shape[1:])
        return jpeg_uri(pixels[:, top : top + side, left : left + side], PIXELS)


PHOTOGRAPHS = (
    Photograph("flower", "A dahlia", "vultilion", "https://www.flickr.com/photos/vultilion/6056698931/"),
    Photograph(
        "china", "A Chinese temple", "danielbuechele", "https://www.flickr.com/photos/danielbuechele/6061409035/"
    ),
)


TITLES = {"k": "k: how many positions", "window": "Window: places along a side", "heads": "Heads"}
"""Of the sliders that choose between graphs."""


def page(networks: Mapping[str, bytes]) -> str:
    """The page, as one HTML document.

    Args:
        networks: what the layers of networks read, as `layers_to_onnx` writes it, by the names that the page says.

    >>> text = page({})
    >>> text.startswith("<!doctype html>"), text.count("<option"), "data-graph=" in text
    (True, 1, True)
    """
    from markupsafe import Markup

    keys = ["features", *(o.key(**chosen) for o in OPERATORS.values() for chosen in o.variants())]
    graphs = {name: kept(name) for name in keys} | dict(networks)
    return environment("nearfold.explorer").get_template("explorer.html.jinja").render(
        title="Where operators look",
        operators=OPERATORS,
        networks=list(networks),
        photographs=PHOTOGRAPHS,
        sliders=[{"name": name, "title": TITLES[name], "last": len(values) - 1} for name, values in CHOICES.items()],
        graphs={name: base64.b64encode(gzip.compress(graph, mtime=0)).decode() for name, graph in graphs.items()},
        data=Markup(json.dumps(_data(list(networks))).replace("<", "\\u003c")),
        notes=(
            f"No operator here is trained. A patch, of {GRID} × {GRID}, is described by {len(FEATURES)} numbers ("
            f"{', '.join(FEATURES)}), each normalised over the photograph, then each patch to one length. Queries, "
            f"keys and values are these numbers themselves, the query times {SHARPNESS:g}; of several heads each sees "
            "its share of them. Kernels average their slots; the slots of the deformable window slide uphill; a scan "
            f"writes and reads the features, with a step of {STEP:g}. Heads and channels are averaged; of a dense "
            "kernel the size counts.",
            "Colours follow the square root of the weight, up to the largest of each picture; patches without colour "
            "are not read. The layers of a network read the maps that the layers before them have made.",
        ),
        made="Made by nearfold explore. The operators run in ONNX Runtime Web, from graphs that nearfold.export wrote.",
    )  # fmt: skip


def _data(networks: list[str]) -> dict[str, Any]:
    """What the scripts have to know."""
    return {
        "grid": GRID,
        "side": SIDE,
        "at": AT,
        "choices": CHOICES,
        "start": START,
        "lambda": LAMBDA,
        "operators": [
            {
                **{name: getattr(o, name) for name in ("name", "title", "notation", "words", "formula", "blends")},
                "hears": o.hears,
            }
            for o in OPERATORS.values()
        ],
        "photographs": [photograph.name for photograph in PHOTOGRAPHS],
        "networks": networks,
        "colours": _colours(),
        "runtime": {"version": VERSION, "beside": BESIDE, "cdn": CDN, "files": RUNTIME},
    }


def _colours() -> dict[str, dict[str, list[list[int]]]]:
    """Strong weights are dark on white and bright on black; `nearfold.look` has the same on white."""
    from matplotlib import colormaps

    def along(name: str, start: float, end: float) -> list[list[int]]:
        places = [start + (end - start) * i / (STOPS - 1) for i in range(STOPS)]
        return [[round(255 * c) for c in colormaps[name](place)[:3]] for place in places]

    return {
        "light": {
            "plain": along("inferno_r", 0.1, 0.85),
            "below": along("RdBu_r", 0.5, 0.0),
            "above": along("RdBu_r", 0.5, 1.0),
        },
        "dark": {
            "plain": along("inferno", 0.25, 0.95),
            "below": along("Blues_r", 0.1, 0.65),
            "above": along("Oranges_r", 0.1, 0.65),
        },
    }


def write(folder: Path, networks: Mapping[str, bytes], runtime: Path | None = None) -> Path:
    """Write the page into a folder, which is made, and put the runtime beside it.

    Args:
        folder: gets ``index.html``, and ``runtime`` where there is one.
        networks: as for `page`.
        runtime: a folder with the files of `RUNTIME`, or an unpacked package of npm.

    Returns:
        The page.

    Raises:
        ValueError: the runtime is not there, or another version.
    """
    files = {} if runtime is None else {name: _checked(runtime, name) for name in RUNTIME}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        (folder / BESIDE).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / BESIDE / name)
    made = folder / "index.html"
    made.write_text(page(networks), encoding="utf-8")
    return made


def _checked(runtime: Path, name: str) -> Path:
    """A file of the runtime, which is the one that the page asks for."""
    advice = f"onnxruntime-web {VERSION} is wanted: npm pack onnxruntime-web@{VERSION}, and unpack it there"
    for path in (runtime / name, runtime / "dist" / name, runtime / "package" / "dist" / name):
        if path.is_file():
            digest = base64.b64encode(hashlib.sha384(path.read_bytes()).digest()).decode()
            if f"sha384-{digest}" != RUNTIME[name]:
                raise ValueError(f"{path} is another version: {advice}")
            return path
    raise ValueError(f"{runtime} has no {name}: {advice}")
