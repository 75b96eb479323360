"""`union`: several paths under one weight, where one of them searches; unions of tables alone are `gather`'s.

The search runs by tiles, as in `knn`, and the other paths' scores touch the rows that they read: nothing of size
outputs x positions exists.

Shape legend: B batch, H heads, N positions, M outputs, S slots.
"""

from __future__ import annotations

from torch import Tensor

from nearfold.grammar.words import Experts, Max, Nearest, Union
from nearfold.kernels.names import DOT_LIKE
from nearfold.lower.call import Call, refuse_derivatives
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.windows import is_table
from nearfold.lower.words.slots import slots, summed, weighed

NAME = "union"


def supports(facts: Facts) -> Verdict:
    """Unions with a search; scores of a dot product only, where a table's scores are read."""
    op = facts.op
    if not isinstance(op.path, Union):
        return Verdict.no(f"path is {op.path.word}, not a union")
    if is_table(op.path):
        return Verdict.no("none of its paths searches")
    odd = next((path for path in op.path.paths if not (isinstance(path, Nearest) or is_table(path))), None)
    if odd is not None:
        return Verdict.no(f"{odd} is neither a search nor a table")
    tables = any(is_table(path) for path in op.path.paths)
    if tables and op.weight.rho.needs_score and op.path.similarity.reduced not in DOT_LIKE:
        return Verdict.no(f"similarity {op.path.similarity} is not a dot product")
    if isinstance(op.weight.rho, Max) or isinstance(op.weight.kernel, Experts):
        return Verdict.no(f"weight {op.weight} is another one for every channel or input")
    return Verdict.yes("selection by tiles, scores of the other slots, sums over all of them", "roundoff")


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    score, at = slots(call)
    return summed(call, at, weighed(call, score, at))
