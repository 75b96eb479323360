"""Any model in the words: what every layer is, what it costs, and how complex it is. Foreign classes go by name."""

from nearfold.recognise.generating import c_p
from nearfold.recognise.report import Complexity, Description, Row, Strange, complexity, describe

__all__ = ["Complexity", "Description", "Row", "Strange", "c_p", "complexity", "describe"]
