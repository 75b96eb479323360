"""Search over the language: operators proposed from the grammar, halved by validation, compared once with the known.

docs/search.md says how, and what to read from it.
"""

from nearfold.study.search.budget import Budget
from nearfold.study.search.search import Settings, open_search

__all__ = ["Budget", "Settings", "open_search"]
