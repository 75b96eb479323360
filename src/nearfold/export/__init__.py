"""Models with the library's layers in the formats of others: ONNX, programs of core ATen, AOTInductor's packages.

Every operator of the library has a form in core ATen (`decompositions`), so that what is written here loads and runs
where nearfold is not installed. Each function compares what it has written with the model before it puts the file in
its place, at more sizes than one where sizes are open.
"""

from nearfold.export.int8 import Int8, to_int8
from nearfold.export.program import Exported
from nearfold.export.table import decompositions
from nearfold.export.ways import to_aoti, to_onnx, to_pt2

__all__ = ["Exported", "Int8", "decompositions", "to_aoti", "to_int8", "to_onnx", "to_pt2"]
