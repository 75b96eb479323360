"""Operations -> computation: the oracle, the fast backends, and the plan that chooses among them."""

from nearfold.lower import words  # noqa: F401  (its files say what the words mean)
from nearfold.lower.explain import Explanation, backend, explain
from nearfold.lower.looks import looks
from nearfold.lower.parameters import parameters
from nearfold.lower.plan import apply, lower
from nearfold.lower.verdict import Facts, Verdict

__all__ = ["Explanation", "Facts", "Verdict", "apply", "backend", "explain", "looks", "lower", "parameters"]
