"""The explorer: a page in which operators run on a photograph, and show where they look (docs/explorer.md)."""

from nearfold.explorer.graphs import layers_to_onnx
from nearfold.explorer.page import write

__all__ = ["layers_to_onnx", "write"]
