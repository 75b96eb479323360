"""Your own words: a path, a rho or a similarity in one file outside the package.

A word is a frozen dataclass that derives from `Path`, `Rho` or `Similarity` and says what it goes with (``shapes``,
``rhos``, ``paths``, ``takes_kernel``); from then on the notation knows it. A similarity carries its meaning, ``embed``.
What a path reads and what a rho makes of the scores is registered here; then the word runs on the oracle and on the
compiled engine. docs/howto/own_word.md makes three of them.
"""

from __future__ import annotations

from nearfold.grammar.similarity import Similarity
from nearfold.grammar.word import WORDS, Word, check, number, positive, sizes
from nearfold.grammar.words import Path, Rho
from nearfold.lower.meaning import MEANINGS
from nearfold.lower.weighting import OwnRule, Rule
from nearfold.lower.windows import OwnTable, Reads

__all__ = [
    "Path",
    "Rho",
    "Similarity",
    "Word",
    "check",
    "number",
    "positive",
    "register_path",
    "register_rho",
    "sizes",
]


def register_path(path: type[Path], reads: Reads) -> None:
    """Say what a path reads whose slots follow from the grid alone; outputs lie on the input's grid.

    Args:
        path: a class that derives from `Path`.
        reads: (path, grid, device) -> the raster positions that the slots of every one of the N positions read
            (N, S), int64, and which slots are valid (N, S), bool. The others read nothing, whatever their position is.

    Raises:
        ValueError: for a class that is no path, or one of the library's own.

    >>> from dataclasses import dataclass, field
    >>> import torch
    >>> from nearfold.grammar.similarity import Scaled
    >>> from nearfold.grammar.word import WORDS
    >>> @dataclass(frozen=True)
    ... class Before(Path):  # the position and the one before it
    ...     word = "before"
    ...     shapes = ("box",)
    ...     similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    ...     def slot_shape(self, ndim):
    ...         return (2,)
    >>> def reads(path, grid, device):
    ...     at = torch.arange(torch.Size(grid).numel(), device=device)[:, None] - torch.tensor([1, 0], device=device)
    ...     return at, at >= 0
    >>> register_path(Before, reads)
    >>> from nearfold.nn import Mixer
    >>> Mixer("before | box | mean", 1, ndim=1)(torch.tensor([[[1.0, 3.0, 5.0]]]))
    tensor([[[1., 2., 4.]]])
    >>> del WORDS["path"]["before"]
    """
    _require_own("path", path, Path)
    unknown = [name for name in path.shapes if name not in WORDS["shape"]]
    if unknown or not path.shapes:
        raise ValueError(
            f"path={path.__name__}: shapes must name some of {', '.join(WORDS['shape'])}, got {path.shapes}"
        )
    MEANINGS[path] = OwnTable(reads)


def register_rho(rho: type[Rho], rule: Rule) -> None:
    """Say what a rho makes of the scores.

    Args:
        rho: a class that derives from `Rho`.
        rule: (rho, score, valid) -> alpha (B, H, M, S), differentiable. ``score`` (B, H, M, S) is -inf where ``valid``,
            (B|1, H|1, M, S) bool, is False; alpha must be zero there.

    Raises:
        ValueError: for a class that is no rho, or one of the library's own.
    """
    _require_own("rho", rho, Rho)
    MEANINGS[rho] = OwnRule(rule)


def _require_own(name: str, given: object, kind: type) -> None:
    if not (isinstance(given, type) and issubclass(given, kind) and hasattr(given, "word")):
        raise ValueError(f"{name} must be a class with a word that derives from {kind.__name__}, got {given!r}")
    if given.__module__.startswith("nearfold.grammar"):
        raise ValueError(f"{name}={given.__name__} is the library's own; derive a class with another word")
