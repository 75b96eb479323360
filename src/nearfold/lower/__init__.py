"""Operations -> computation: the oracle, the fast backends, and the plan that chooses among them."""

from typing import TYPE_CHECKING, Any

from nearfold.lower import words  # noqa: F401  (its files say what the words mean)
from nearfold.lower.explain import Explanation, backend, explain
from nearfold.lower.parameters import parameters
from nearfold.lower.plan import apply, lower
from nearfold.lower.verdict import Facts, Verdict

if TYPE_CHECKING:
    from nearfold.look import looks

__all__ = ["Explanation", "Facts", "Verdict", "apply", "backend", "explain", "looks", "lower", "parameters"]


def __getattr__(name: str) -> Any:
    """`looks` is in `nearfold.look`, above this package; users have it here."""
    if name == "looks":
        from nearfold.look import looks

        return looks
    raise AttributeError(f"module 'nearfold.lower' has no attribute {name!r}")
