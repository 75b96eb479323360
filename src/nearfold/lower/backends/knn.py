"""`knn`: nearest neighbours, selected and aggregated by tiles; O(N k) memory, forward and backward.

Shape legend: B batch, H heads, N positions, R candidates, M outputs, S slots, e embedded features.
"""

from __future__ import annotations

from torch import Tensor

from nearfold.grammar.similarity import Cosine, Dot, Euclidean, Scaled
from nearfold.grammar.words import (
    AllCandidates,
    Dense,
    Depthwise,
    Max,
    Nearest,
    Ranked,
    Softmax,
)
from nearfold.kernels import approximate
from nearfold.kernels.neighbors import Neighbors
from nearfold.kernels.select import MOST_SLOTS
from nearfold.kernels.whole import whole
from nearfold.lower.call import Call, Run, refuse_derivatives
from nearfold.lower.frame import Frame
from nearfold.lower.verdict import Facts, Verdict
from nearfold.lower.words.nearest_search import all_ones, recall_of
from nearfold.lower.words.slots import slots, summed, weighed

NAME = "knn"


def supports(facts: Facts) -> Verdict:
    """Path nearest, with anything but the largest value."""
    if not isinstance(facts.op.path, Nearest):
        return Verdict.no(f"path is {facts.op.path.word}, not nearest")
    if isinstance(facts.op.weight.rho, Max):
        return Verdict.no("weight max is another one for every channel")
    if recall_of(facts.op) == 1:
        return Verdict.yes("selection and aggregation by tiles", "roundoff")
    method = approximate.describe(facts.op.path.similarity.reduced)
    exactness = "roundoff" if method == "exact" else "recall"
    return Verdict.yes(f"selection with recall={facts.op.path.recall} ({method}), aggregation by tiles", exactness)


def prepare(at: Frame) -> Run:
    """What runs on this frame: one call of the compiled engine where it knows all of the words."""
    settled = _settled(at)
    if settled is None:
        return run

    def at_once(call: Call) -> Tensor:
        if call.keep is not None:
            return run(call)
        value, query, key = call.value, call.query, call.key
        key = None if key is query else key
        query = None if query is value and key is None else query
        places = call.query_index() if settled.partial else None
        operands = (query, key, value, call.params.get("weight"), call.params.get("bias"), places)

        def again(query: Tensor | None, key: Tensor | None, value: Tensor, *others: Tensor | None) -> Tensor:
            given = zip(("weight", "bias"), others, strict=False)
            params = call.params | {name: tensor for name, tensor in given if tensor is not None}
            query = value if query is None else query
            return run(Call(at, params, value, query, query if key is None else key, call.x, call.draw))

        return whole(settled, operands, again)

    return at_once


def _settled(at: Frame) -> Neighbors | None:
    """The layer as the engine takes it, None where it knows some word only in parts."""
    op, path, rho, kernel = at.op, at.op.path, at.op.weight.rho, at.op.weight.kernel
    assert isinstance(path, Nearest)
    near, own = path.similarity, path.include_self
    known = (
        isinstance(near, (Cosine, Dot, Scaled, Euclidean))
        and not (near.coordinates or near.placed)
        and isinstance(path.candidates, AllCandidates)
        and isinstance(op.shape, Ranked)
        and path.again is None
        and path.by is None
        and not path.prunes
        and path.k <= MOST_SLOTS
        and (own is False or (own is True and path.k > 1))
        and recall_of(op) == 1
        and (all_ones(rho) or isinstance(rho, Softmax))
        and (kernel is None or (isinstance(kernel, (Dense, Depthwise)) and not getattr(kernel, "coordinates", False)))
    )
    if not known:
        return None
    scale = float(rho.scale) if isinstance(rho, Softmax) else None
    return Neighbors(
        path.k,
        at.heads,
        0 if isinstance(kernel, Depthwise) else kernel.groups if isinstance(kernel, Dense) else 1,
        near.reduced,
        isinstance(near, Cosine),
        near.squared,
        own is True,
        scale,
        isinstance(near, Scaled),
        at.padding > 0 or any(s != 1 for s in at.stride),
        at.out_grid,
    )


def run(call: Call) -> Tensor:
    """(B, O, *out)."""
    refuse_derivatives(call)
    score, at = slots(call)
    return summed(call, at, weighed(call, score, at))
