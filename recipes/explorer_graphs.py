"""The graphs of the explorer's page, written anew; after a change to what an operator of the page reads.

    python recipes/explorer_graphs.py [NAME ...]

NAME is an operator of the page (all its settings), ``features``, or a network whose weights come along; without one,
all of them: some minutes. What is not named stays as it is in the store.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nearfold.explorer.graphs import SIDE, STORE, Described, layers_to_onnx, operator_graphs, written
from nearfold.explorer.operators import OPERATORS
from nearfold.models import create
from nearfold.models.pretrained import pretrained


def made(name: str) -> Iterator[tuple[str, bytes]]:
    """The graphs that belong to a name."""
    if name == "features":
        yield name, written(Described(), (torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),))
    elif name in OPERATORS:
        yield from operator_graphs(OPERATORS[name])
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            layers_to_onnx(create(name, pretrained=True), path)
            yield name, path.read_bytes()


def stored() -> dict[str, bytes]:
    """What the store has, and the page may still ask for."""
    if not STORE.exists():
        return {}
    wanted = {"features", *pretrained(), *(o.key(**chosen) for o in OPERATORS.values() for chosen in o.variants())}
    with zipfile.ZipFile(STORE) as store:
        found = {name.removesuffix(".onnx"): store.read(name) for name in store.namelist()}
    return {name: graph for name, graph in found.items() if name in wanted}


def store(graphs: dict[str, bytes]) -> None:
    """Write the store: the same bytes from the same graphs."""
    made = STORE.with_suffix(".new")
    with zipfile.ZipFile(made, "w") as file:
        for name in sorted(graphs):
            entry = zipfile.ZipInfo(f"{name}.onnx", (1980, 1, 1, 0, 0, 0))
            file.writestr(entry, graphs[name], zipfile.ZIP_DEFLATED, 9)
    made.replace(STORE)


if __name__ == "__main__":
    everything = ["features", *OPERATORS, *pretrained()]
    for given in sys.argv[1:] or everything:
        if given not in everything:
            raise SystemExit(f"{given}: none of {', '.join(everything)}")
        for name, graph in made(given):
            store(stored() | {name: graph})
            print(f"{name}: {len(graph) / 1e6:.2f} MB", flush=True)
