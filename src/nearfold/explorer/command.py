"""`nearfold explore`: the page, served to the browser of this machine or written into a folder."""

from __future__ import annotations

import argparse
import sys
import tempfile
import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nearfold.explorer.graphs import kept, layers_to_onnx
from nearfold.explorer.page import write
from nearfold.models.named import WHAT, named
from nearfold.models.pretrained import pretrained
from nearfold.options import brief, folder, whole

EXAMPLES = """\
examples:
  nearfold explore
  nearfold explore --model runs/hybrid/pretrained
  nearfold explore --out page"""
HOST = "127.0.0.1"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser.

    >>> parser = argparse.ArgumentParser()
    >>> arguments(parser)
    >>> parser.parse_args(["--port", "8000"]).port
    8000
    """
    parser.add_argument(
        "--model", action="append", default=[], metavar="MODEL", dest="models",
        help=f"show the layers of this network, too: {WHAT}, or a file that nearfold.explorer.layers_to_onnx wrote; "
        "give it again for more (those of `nearfold models --pretrained` are there)",
    )  # fmt: skip
    parser.add_argument("--out", type=folder, metavar="FOLDER", help="write the page there, and serve nothing")
    parser.add_argument(
        "--runtime", type=Path, metavar="FOLDER",
        help="where onnxruntime-web of npm is unpacked: it comes to lie beside the page, which then needs no network",
    )  # fmt: skip
    parser.add_argument("--port", type=whole(0, 65535), default=0, metavar="N", help="default: one that is free")
    parser.add_argument("--no-browser", action="store_true", help="open no browser")


def run(args: argparse.Namespace) -> int:
    """Write the page, and serve it until Ctrl-C: the exit code."""
    networks = {name: kept(name) for name in pretrained()}
    for spec in args.models:
        networks[Path(spec).stem if Path(spec).suffix == ".onnx" else Path(spec).name] = network(spec)
    if args.out is not None:
        print(write(args.out, networks, args.runtime))
        return 0
    with tempfile.TemporaryDirectory(prefix="nearfold-explore-") as made:
        write(Path(made), networks, args.runtime)
        with server(Path(made), args.port) as serving:
            address = f"http://{HOST}:{serving.server_port}/"
            beside = "" if args.runtime else "; the page fetches ONNX Runtime Web (--runtime: without a network)"
            print(f"{address}  (Ctrl-C ends it{beside})", flush=True)
            if not args.no_browser:
                webbrowser.open(address)
            try:
                serving.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
    return 0


def network(spec: str) -> bytes:
    """What the layers of a network read, as ONNX.

    Raises:
        ValueError: there is no such network or file, or it has no layers that the page could show.
    """
    path = Path(spec)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ValueError(f"--model {brief(spec)}: no such file")
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        model, size = named(spec)
        if size is None and not getattr(model, "pretrained_cfg", None):
            raise ValueError(
                f"--model {brief(spec)} does not say how large its images are: write the file by "
                'nearfold.explorer.layers_to_onnx(network, "file.onnx", size=(H, W)), and name that'
            )
        layers_to_onnx(model, file, size=None if size is None else (size[1], size[2]))
        return file.read_bytes()


class Handler(SimpleHTTPRequestHandler):
    """The files of one folder, for this machine alone, without a word."""

    extensions_map = {  # noqa: RUF012 as the class above has it
        **SimpleHTTPRequestHandler.extensions_map,
        ".html": "text/html; charset=utf-8",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def send_head(self) -> Any:
        # a page of somebody else, whose name leads to this machine, is not answered
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: object) -> None:
        pass


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """What serves a folder to this machine.

    Raises:
        ValueError: the port is taken.
    """
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, directory=str(folder)))
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; name another one, or none") from error
