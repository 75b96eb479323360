"""Any model in the words: what every layer is, what it costs, and how complex it is. Foreign classes go by name."""

from nearfold.recognise.generating import c_p
from nearfold.recognise.report import Complexity, DescribedLayer, Description, Strange, complexity, describe

Row = DescribedLayer  # its name before

__all__ = ["Complexity", "DescribedLayer", "Description", "Row", "Strange", "c_p", "complexity", "describe"]
