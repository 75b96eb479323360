"""Your own words: a path, a rho, a kernel or a similarity in one file outside the package.

A word is a frozen dataclass that derives from `Path`, `Rho`, `Kernel` or `Similarity` and says what it goes with
(``shapes``, ``rhos``, ``paths``, ``takes_kernel``); from then on the notation knows it. A similarity carries its
meaning, ``embed``. What a path reads and what a rho makes of the scores is registered here; then the word runs on the
oracle and on the compiled engine. docs/howto/own_word.md makes three of them. All else that a word can mean (slots that
depend on the input, an output grid and parameters of its own) is a class of methods, for `register`.
"""

from __future__ import annotations

from nearfold.grammar.similarity import Similarity
from nearfold.grammar.word import WORDS, Word, check, number, positive, sizes
from nearfold.grammar.words import Kernel, Path, Rho
from nearfold.lower.call import Call
from nearfold.lower.meaning import MEANINGS, KernelMeaning, Meaning, PathMeaning, RhoMeaning, Sizes
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.selection import Selection
from nearfold.lower.weighting import OwnRule, Rule
from nearfold.lower.windows import OwnTable, Reads

__all__ = [
    "Call",
    "Kernel",
    "KernelMeaning",
    "Parameter",
    "Path",
    "PathMeaning",
    "Rho",
    "RhoMeaning",
    "Selection",
    "Similarity",
    "Sizes",
    "Word",
    "check",
    "linear",
    "number",
    "positive",
    "register",
    "register_path",
    "register_rho",
    "sizes",
]


KINDS: tuple[tuple[type[Word], type[Meaning]], ...] = (
    (Path, PathMeaning),
    (Rho, RhoMeaning),
    (Kernel, KernelMeaning),
)


def register(word: type[Word], meaning: Meaning) -> None:
    """Say all that a word means.

    Args:
        word: a class that derives from `Path`, `Rho` or `Kernel`.
        meaning: of a class that derives from `PathMeaning`, `RhoMeaning` or `KernelMeaning`. Its methods are given the
            operation, or a `Call` of it: one object serves all operations with the word.

    Raises:
        ValueError: for a class that is no such word, one of the library's own, or a meaning of another kind.

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from nearfold.grammar.word import WORDS
    >>> @dataclass(frozen=True)
    ... class Twin(Kernel):  # one number for every slot, all channels share it
    ...     word = "twin"
    >>> class TwinMeaning(KernelMeaning):
    ...     def parameters(self, op, sizes):
    ...         return {"weight": Parameter((1, 1, *op.path.slot_shape(sizes.ndim)), "constant:1")}
    ...     def weight(self, call):
    ...         channels = call.value.shape[1]
    ...         return call.params["weight"].expand(channels, *call.params["weight"].shape[1:]), channels
    >>> register(Twin, TwinMeaning())
    >>> from nearfold.nn import Mixer
    >>> Mixer("window(3) | box | twin", 1, ndim=1, bias=False)(torch.tensor([[[1.0, 3.0, 5.0]]])).detach()
    tensor([[[4., 9., 8.]]])
    >>> del WORDS["kernel"]["twin"]
    """
    for kind, means in KINDS:
        if isinstance(meaning, means):
            _require_own("word", word, kind)
            MEANINGS[word] = meaning
            return
    names = ", ".join(means.__name__ for _, means in KINDS)
    raise ValueError(f"meaning must be an object of a class that derives from {names}, got {meaning!r}")


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
    register(path, OwnTable(reads))


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
    register(rho, OwnRule(rule))


def _require_own(name: str, given: object, kind: type) -> None:
    if not (isinstance(given, type) and issubclass(given, kind) and hasattr(given, "word")):
        raise ValueError(f"{name} must be a class with a word that derives from {kind.__name__}, got {given!r}")
    if given.__module__.startswith("nearfold.grammar"):
        raise ValueError(f"{name}={given.__name__} is the library's own; derive a class with another word")
