"""From the profile of a data set to an order of operators, each read by its words.

An operation is described by the ideas of its words (`Word.primitives`), and so is every probe, whose name is an
operation. An operator's evidence is what the probe found that is most like it, and what all probes found that share
its path, its shape or its weight.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nearfold.grammar import parse
from nearfold.grammar.complexity import c_d
from nearfold.grammar.operation import Basic, Branch, Operation
from nearfold.grammar.word import as_tuple
from nearfold.study.alignment.labels import ITSELF, PROBES, RINGS
from nearfold.study.alignment.profile import LEAST, Profile

SHARED, READ, SIMPLE = 0.5, 0.1, 0.005
"""What counts beside the gain of the probe most like an operator: the mean gain of its three words, the share of a
position that its path explains, and, against it, every point of descriptive complexity."""
DRAWS = 400
"""Profiles drawn again from the blocks of images, for the confidence."""
FAR = 64
"""The reach that stands for everywhere."""


@dataclass(frozen=True)
class Description:
    """What an operation's words say, in numbers and ideas.

    Attributes:
        path: shares of the ideas of its path.
        shape: the idea of its shape.
        weight: the ideas of its weight, without those that change nothing.
        searches: whether its path compares positions.
        reach: side of what it reads by offsets; `FAR` for everywhere.
        spread: the distance between its slots.
        tall: reach down the columns over reach along the rows, in octaves.
    """

    path: tuple[tuple[str, float], ...]
    shape: str
    weight: frozenset[str]
    searches: bool
    reach: float
    spread: int
    tall: float


@functools.lru_cache(maxsize=1024)
def describe(op: Basic) -> Description:
    """What the words of an operation say.

    >>> describe(parse("window(3, dilation=2) | box | depthwise")).reach
    5.0
    """
    ideas = {name: score for name, score in op.path.primitives.items() if score}
    full = {
        name: 2.0 if name == "CONTENT_AWARE" else 1.0 for name in ideas
    }  # an idea's whole score; a blend has a part
    shares = {name: score / full[name] for name, score in ideas.items()}
    total = sum(shares.values()) or 1.0
    path = tuple(sorted((name, share / total) for name, share in shares.items()))
    rho, kernel = op.weight.rho.primitives, op.weight.kernel.primitives if op.weight.kernel else {}
    weight = frozenset({*rho, *kernel} - {"IDENTITY", "POINTWISE"})
    size, dilation = getattr(op.path, "size", None), getattr(op.path, "dilation", 1)
    reach, spread, tall = float(FAR), 1, 0.0
    if size is not None:
        axes = max(len(v) if isinstance(v, tuple) else 1 for v in (size, dilation))
        steps = as_tuple(dilation, axes, "dilation")
        sides = [(n - 1) * step + 1 for n, step in zip(as_tuple(size, axes, "size"), steps, strict=True)]
        reach, spread = float(max(sides)), max(steps)
        tall = math.log2(sides[0] / sides[-1])
    shape = next(iter(op.shape.primitives), "")
    return Description(path, shape, weight, op.path.searches, reach, spread, tall)


def unlike(a: Description, b: Description) -> float:
    """How far two operations are apart in their words: 0 where they say the same."""
    shares_a, shares_b = dict(a.path), dict(b.path)
    path = sum(abs(shares_a.get(name, 0) - shares_b.get(name, 0)) for name in {*shares_a, *shares_b})
    weight = len(a.weight ^ b.weight) / max(1, len(a.weight | b.weight))
    reach = abs(math.log2(a.reach / b.reach)) if "STATIC_SLIDING" in shares_a and "STATIC_SLIDING" in shares_b else 0.0
    ends = 1.0 * (a.searches != b.searches) + 0.5 * (a.shape != b.shape) + 0.3 * (a.spread != b.spread)
    return 2 * path + 2 * weight + ends + 0.5 * reach + abs(a.tall - b.tall)


@functools.cache
def _probes() -> dict[str, Description]:
    """What the words of the probes say, of those that are one operation of the notation."""
    read = ((name, parse(name)) for name in PROBES if name != RINGS)
    return {name: describe(op) for name, op in read if isinstance(op, Basic)}


@functools.cache
def _joint() -> dict[str, tuple[Description, ...]]:
    """What the words of the probes say that combine operations."""
    read = ((name, parse(name)) for name in PROBES if name != RINGS)
    return {name: tuple(map(describe, op.parts)) for name, op in read if not isinstance(op, Basic)}


@functools.lru_cache(maxsize=1024)
def nearest_probe(op: Basic) -> str:
    """The probe whose words are most like an operation's.

    >>> nearest_probe(parse("window(7) | box | depthwise"))
    'window(7) | box | kernel'
    >>> nearest_probe(parse("nearest(25, dot) | ranked | softmax(heads=4)"))
    'nearest(9, euclidean) | ranked | softmax'
    """
    said = describe(op)
    return min(_probes(), key=lambda name: unlike(said, _probes()[name]))


def features(profile: Profile, notation: str | Operation, drawn: Sequence[int] | None = None) -> dict[str, float]:
    """The evidence that belongs to one operator.

    Args:
        profile: of the data.
        notation: the operator.
        drawn: blocks of images to take it from; None: all.

    Returns:
        ``gain``: accuracy above chance of the probe most like it, less that of positions by themselves;
        ``path``, ``shape``, ``weight``: the mean of this over all probes with that word's idea; ``inputs``: the share
        of a position's variance that its path explains, and what content adds, for a weight that looks at it;
        ``complexity``: of the operation, in GWO's points. Of a sum, each is the largest of its operands; of a branch,
        halfway from there to their mean, weighed by their channels; the gain is that of a probe that combines the same
        paths, where that is more.

    >>> from nearfold.study.alignment.profile import Measure
    >>> none = {name: Measure((0.0, 0.0)) for name in ("itself", *PROBES)}
    >>> found = features(Profile("", 2, (8, 8), 1, 2, {}, none), "window(3) | box | kernel")
    >>> found["gain"], found["complexity"], sorted(found)
    (0.0, 3.0, ['complexity', 'gain', 'inputs', 'path', 'shape', 'weight'])
    """
    op = parse(notation) if isinstance(notation, str) else notation
    return _evidence(op, *_measured(profile, drawn)) | {"complexity": c_d(op)}


def _measured(profile: Profile, drawn: Sequence[int] | None) -> tuple[dict[str, float], dict[str, float]]:
    """The probes' gains over positions by themselves, and the measures of the images."""
    values = {name: measure.of(drawn) for name, measure in profile.labels.items()}
    inputs = {name: max(0.0, measure.of(drawn)) for name, measure in profile.inputs.items()}
    return {name: value - values[ITSELF] for name, value in values.items()}, inputs


def _evidence(op: Operation, gains: Mapping[str, float], inputs: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(op, Basic):
        parts = [_evidence(operand, gains, inputs) for operand in op.present]
        found = {name: max(part[name] for part in parts) for name in parts[0]}
        if isinstance(op, Branch) and len(parts) > 1:
            shares = (op.ratio, 1 - op.ratio)
            for name in found:
                found[name] = (found[name] + sum(s * part[name] for s, part in zip(shares, parts, strict=True))) / 2
        paths = {(said.path, said.searches) for said in map(describe, op.parts)}
        joint = (n for n, both in _joint().items() if {(said.path, said.searches) for said in both} <= paths)
        return found | {"gain": max(found["gain"], *(gains[name] for name in joint), -math.inf)}
    said, probes = describe(op), _probes()
    by_content = inputs.get("content", 0.0) if said.weight - {"SHARED_KERNEL", "LARGEST"} else 0.0
    return {
        "gain": gains[nearest_probe(op)],
        "path": _mean(gains, {name: _shared(said, other) for name, other in probes.items()}),
        "shape": _mean(gains, {name: float(other.shape == said.shape) for name, other in probes.items()}),
        "weight": _mean(gains, {name: float(other.weight == said.weight) for name, other in probes.items()}),
        "inputs": sum(share * _read(idea, said, inputs) for idea, share in said.path) + by_content,
    }


def _shared(a: Description, b: Description) -> float:
    """The share of ideas that two paths have in common; none where one searches and the other does not."""
    other = dict(b.path)
    return sum(min(share, other.get(idea, 0.0)) for idea, share in a.path) if a.searches == b.searches else 0.0


def _mean(gains: Mapping[str, float], weights: Mapping[str, float]) -> float:
    total = math.fsum(weights.values())
    return math.fsum(weight * gains[name] for name, weight in weights.items()) / total if total else 0.0


def _read(idea: str, said: Description, inputs: Mapping[str, float]) -> float:
    """The share of a position's variance that a path of this idea explains."""
    within = {3: "window(3)", 5: "window(5)", 7: "window(7)"}
    if idea in ("STATIC_SLIDING", "STATIC_BLOCK"):
        side = min(within, key=lambda size: abs(size - min(said.reach, 7)))
        return inputs.get("distance 2" if said.spread > 1 else within[side], 0.0)
    if idea == "CONTENT_AWARE":
        own = inputs.get("window(3)", 0.0) + inputs.get("content", 0.0)
        return max(inputs.get("nearest", 0.0), inputs.get("similar", 0.0)) if said.searches else own
    if idea == "RECURRENT":
        return inputs.get("earlier", 0.0)
    return max(inputs.get("everywhere", 0.0), 0.0 if said.weight - {"SHARED_KERNEL"} else inputs.get("table", 0.0))


def score(evidence: Mapping[str, float]) -> float:
    """The rule, which has seen no accuracy of a network: the gain of its probe, and a little of all else.

    >>> score({"gain": 0.5, "path": 0.3, "shape": 0.3, "weight": 0.3, "inputs": 0.0, "complexity": 4.0})
    0.63
    """
    words = (evidence["path"] + evidence["shape"] + evidence["weight"]) / 3
    found = evidence["gain"] + SHARED * words + READ * evidence["inputs"] - SIMPLE * evidence["complexity"]
    return round(found, 12)


def scores(profile: Profile, notations: Sequence[str], drawn: Sequence[int] | None = None) -> dict[str, float]:
    """How strongly the data point to each operator: more is more, and nothing else is meant by the numbers.

    Args:
        profile: of the data.
        notations: the operators.
        drawn: blocks of images to take the measures from; None: all.
    """
    measured, found = _measured(profile, drawn), {}
    for notation in notations:
        op = parse(notation)
        found[notation] = score(_evidence(op, *measured) | {"complexity": c_d(op)})
    return found


def points(profile: Profile) -> bool:
    """Whether the data point to any operator: some probe tells the labels clearly better than `ITSELF`."""
    base = profile.labels[ITSELF]
    return any(measure.above(base) for measure in profile.labels.values())


def confidence(profile: Profile, notations: Sequence[str]) -> dict[str, float]:
    """How often each operator comes first when the blocks of images are drawn again, with replacement, `DRAWS` times.

    Draws in which the first one's gain is not above `LEAST` count for none. The number says how much the order owes to
    which images were seen; whether the rule is right it cannot say.
    """
    draws = random.Random(0)
    blocks = len(profile.labels[ITSELF].blocks)
    firsts = dict.fromkeys(notations, 0)
    for _ in range(DRAWS):
        drawn = draws.choices(range(blocks), k=blocks)
        found = scores(profile, notations, drawn)
        first = max(found, key=lambda notation: found[notation])
        firsts[first] += features(profile, first, drawn)["gain"] > LEAST
    return {notation: count / DRAWS for notation, count in firsts.items()}
