"""Descriptive complexity C_D: how many ideas an operation is made of, by GWO (doi 10.5281/zenodo.17103133).

Every word names its primitive and the primitive's score: 1 for what is the same for every input, 2 for what depends on
it. GWO asks the author of a layer for the number; here it is derived from the words. The rules, with their reasons, are
in docs/complexity.md.
"""

from __future__ import annotations

from nearfold.grammar.operation import Basic, Operation
from nearfold.grammar.similarity import Similarity
from nearfold.grammar.words import Shift

POINTWISE = "POINTWISE"


def primitives(op: Operation) -> dict[str, float]:
    """Score by primitive, added over the words of an operation; a primitive whose score is zero is left out.

    >>> from nearfold import parse
    >>> primitives(parse("all | row | softmax(heads=8)"))
    {'GLOBAL_INDEXED': 1.0, 'FULL_ROW': 1.0, 'DYNAMIC_ATTENTION': 2.0}
    >>> primitives(parse("nearest(9, blend(0.25)) | ranked | kernel"))
    {'STATIC_SLIDING': 0.75, 'CONTENT_AWARE': 0.5, 'RANKED': 1.0, 'SHARED_KERNEL': 1.0}
    """
    found: dict[str, float] = {}
    for scores in _scores(op):
        for name, score in scores.items():
            found[name] = found.get(name, 0.0) + score
    return {name: score for name, score in found.items() if score}


def c_d(op: Operation) -> float:
    """The descriptive complexity: the sum of all scores.

    >>> from nearfold import parse
    >>> c_d(parse("window(3) | box | kernel")), c_d(parse("window(3) | box | separable"))
    (3.0, 4.0)
    """
    return sum(primitives(op).values())


def content_share(op: Basic) -> float:
    """How far features decide where this operation looks or what it values: 0 (not at all) to 1.

    >>> from nearfold import parse
    >>> [content_share(parse(f"{words} | kernel")) for words in ("window(3) | box", "nearest(9, blend(0.25)) | ranked")]
    [0.0, 0.25]
    """
    if any(word.dynamic for word in (op.path, op.weight.rho, op.weight.kernel) if word is not None):
        return 1.0
    compares = op.weight.rho.needs_score or op.path.searches
    return features_share(op.path.similarity) if compares else 0.0


def features_share(similarity: Similarity) -> float:
    """What part of a comparison features have: all, none (position alone), or a blend's lam.

    >>> from nearfold.grammar.similarity import Blend, Cosine, Position
    >>> features_share(Cosine()), features_share(Blend(0.25)), features_share(Position())
    (1.0, 0.25, 0.0)
    """
    return float(getattr(similarity, "lam", 1.0 if similarity.uses_features else 0.0))


def _scores(op: Operation) -> list[dict[str, float]]:
    if isinstance(op, Basic):
        return [op.path.primitives, op.shape.primitives, *_weight_scores(op)]
    return [scores for operand in op.present for scores in _scores(operand)] + ([{POINTWISE: 1}] if op.mix else [])


def _weight_scores(op: Basic) -> list[dict[str, float]]:
    rho, kernel = op.weight.rho, op.weight.kernel
    scores = rho.primitives
    if rho.needs_score:  # as far as the comparison is one of positions, its outcome is the same for every input
        share = features_share(op.path.similarity)
        scores = {"IDENTITY": 1 - share} | {name: score * share for name, score in scores.items()}
    if kernel is None:
        found = [scores]
    else:  # a constant times a learned kernel is a learned kernel
        found = [{name: score for name, score in scores.items() if name != "IDENTITY"}, kernel.primitives]
    if not isinstance(kernel, Shift):
        # projections that generate something are counted in C_P; around a static operation they are pointwise maps:
        # ones(project=o)*depthwise is separable. Shift's three are the first half of its kernel.
        found += [{POINTWISE: 1 - content_share(op)} for letter in op.weight.projections if letter in "vo"]
    return found
