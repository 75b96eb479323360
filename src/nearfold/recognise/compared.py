"""Attention that no rule knows, seen in a run: positions that are compared, a softmax over keys, a sum of values.

Scores and weights are followed from the product that makes them to the product that spends them. Each carries a label:
a `Place` whose position is the row of the first product, a query or a key, and whose channel is the column.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nearfold.grammar import Basic, Weight
from nearfold.grammar.words import All, Row, Softmax
from nearfold.recognise.foreign import Match
from nearfold.recognise.operators import Call, entries, follow, rule_of, tensors, views
from nearfold.recognise.operators.axes import SOFTMAXES
from nearfold.recognise.place import SHIFT, Place, number, varies

if TYPE_CHECKING:
    from nearfold.recognise.observation import Frame

PLAIN = ("mm", "bmm")
PRODUCTS = dict.fromkeys(PLAIN, ("self", "mat2")) | {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}
SCALING = ("mul", "div")
Noted = tuple[tuple[str, str], ...]  # operators that were noted to mix, after the module that ran them
HEADS, BIAS = "its heads are mixed", "a bias is added to its scores"


@dataclass(frozen=True)
class Compared:
    """One attention of a module's own forward.

    Attributes:
        heads: how many.
        cross: whether keys are positions of another map than queries.
        few: how many queries there are, where they are fewer positions than keys; 0 where they are not.
        more: what else happens to scores and weights.
        through: names of layers that scores went through.
        parts: names of those, of the layers that were called before, and of the map behind it.
    """

    heads: int
    cross: bool
    few: int
    more: frozenset[str]
    through: frozenset[str] = frozenset()
    parts: set[str] = field(default_factory=set, compare=False)

    def match(self, generating: int) -> Match:
        """For `describe`."""
        notes = ["seen in the run", *sorted(self.more)]
        if self.few:
            notes.append(f"for {self.few} of its positions")
        op = Basic(All(cross=self.cross), Row(), Weight(Softmax(self.heads)))
        return Match(op, generating, axis=-1, note="; ".join(notes))


@dataclass(frozen=True)
class _Pairs:
    """Scores or weights: one number for every query and key.

    Attributes:
        label: rows and columns.
        call: of the module that made them, for there they must be spent.
        rows: positions of the rows.
        columns: positions of the columns.
        heads: how many.
        keyed: behind the softmax, which label is the keys'; empty before it.
        more: as in `Compared`.
        through: as in `Compared`.
        noted: operators that were noted to mix, by the module that ran them.
    """

    label: Place
    call: Frame
    rows: Tensor
    columns: Tensor
    heads: int
    keyed: str = ""
    more: frozenset[str] = frozenset()
    through: frozenset[str] = frozenset()
    noted: Noted = ()


class Comparisons:
    """What is being compared, in one run.

    Args:
        batch: how many inputs run at once.
    """

    def __init__(self, batch: int = 1) -> None:
        self.batch = batch
        self.pairs, self.spent = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.sizes: dict[int, int] = {}  # how many positions a stage has
        self.origin: dict[int, int] = {}  # the stage whose positions a pointwise layer numbered anew

    def see(self, place: Place) -> None:
        """Remember how many positions a stage has, when it is new."""
        flat = place.position.flatten()
        if flat.numel() and not place.wild and int(flat[-1]) // SHIFT not in self.sizes:
            self.sizes[int(flat[-1]) // SHIFT] = int(flat.max()) % SHIFT + 1

    def forget(self, made: list[Tensor]) -> None:
        """What tensors were before they were filled."""
        for t in made:
            self.pairs.pop(t, None)
            self.spent.pop(t, None)

    def alike(self, before: Place, after: Place) -> None:
        """A pointwise layer numbered its positions anew; they are what they were."""
        if before.position.shape == after.position.shape and not before.wild:
            step = (after.position - before.position).flatten()
            same = bool((step == step[0]).all()) and int(step[0]) % SHIFT == 0
            if same and bool((before.position >= SHIFT).all()):
                new, old = (int(p.position.flatten()[0]) // SHIFT for p in (after, before))
                self.origin[new] = self.origin.get(old, old)

    def through(self, x: Tensor, y: Tensor, name: str) -> None:
        """Behind an nn.Linear, which may mix heads."""
        if x in self.spent:
            self.spent[x].parts.add(name)
        pairs = self.pairs.get(x)
        if pairs is not None and not _vary(pairs.label, (x.dim() - 1,)):
            self.pairs[y] = replace(pairs, more=pairs.more | {HEADS}, through=pairs.through | {name})

    def step(self, call: Call, frame: Frame, name: str, noted: bool) -> tuple[Compared, Noted] | None:
        """Follow one operator; where it spends weights, what was compared, and the operators that this explains.

        Args:
            call: of the operator.
            frame: of the module whose forward called it.
            name: of that module.
            noted: whether the operator was noted to mix.
        """
        given = [t for t in tensors(call.given) if t in self.pairs]
        mine = ((name, call.name),) if noted else ()
        if not given:
            self._pass_on(call)
            if call.name in PLAIN and (begun := self._begun(call, frame)):
                self.pairs[call.made[0]] = replace(begun, noted=mine)
            elif "scaled_dot_product" in call.name:
                return self._fused(call, frame, mine)
            return None
        t = given[0]
        pairs: _Pairs = self.pairs[t]
        place = call.place(t)
        done = None
        new: list[_Pairs | None] = [None] * len(call.made)
        sound = place is not None and not place.wild and all(self.pairs[g] is pairs or g is t for g in given)
        if sound and place is not None and call.name in SOFTMAXES:
            new = [None if place.masked else _softened(pairs, call)]
        elif sound and call.name in PRODUCTS:
            if call.name in PLAIN and pairs.keyed and pairs.call is frame and self._spends(pairs, t, call):
                done = self._compared(pairs, frame)
                if done is not None:
                    self.spent[call.made[0]] = done
            else:
                new = [_mixed_heads(pairs, t, call)]
        elif sound:
            new = self._rearranged(pairs, t, call)
        inside = frozenset((name,)) if pairs.call is not frame else frozenset()
        for made, one in zip(call.made, new, strict=False):
            if one is not None:
                self.pairs[made] = replace(one, through=one.through | inside, noted=one.noted + mine)
            else:
                self.pairs.pop(made, None)
        return None if done is None else (done, pairs.noted + mine)

    def _pass_on(self, call: Call) -> None:
        """The result of an attention under another shape."""
        spent = [self.spent[t] for t in tensors(call.given) if t in self.spent]
        if spent and rule_of(call) in (views.viewed, entries.same):
            for made in call.made:
                self.spent[made] = spent[0]

    def _begun(self, call: Call, frame: Frame) -> _Pairs | None:
        """A product of queries and keys: of positions along its rows, and positions along its columns."""
        a, b = (call.tensor(n) for n in PRODUCTS[call.name])
        pa, pb = call.place(a), call.place(b)
        if pa is None or pb is None or pa.wild or pb.wild:
            return None
        dims, shape = call.made[0].dim(), call.made[0].shape
        if (_axes(pa), _axes(pb)) not in (([dims - 2], [dims - 1]), ([], [dims - 1]), ([dims - 2], [])):
            return None
        label = Place(number(shape, (dims - 1,)), number(shape, (dims - 2,)), (), (), (), ())
        heads = shape[:-2].numel() if dims > 2 else 1
        if heads % self.batch:
            return None
        return _Pairs(label, frame, pa.position.flatten(), pb.position.flatten(), heads // self.batch)

    def _rearranged(self, pairs: _Pairs, t: Tensor, call: Call) -> list[_Pairs | None]:
        """Behind views, and what changes every score alone by the same for every input."""
        rule, none = rule_of(call), [None] * len(call.made)
        others = [o for o in tensors(call.given) if o not in self.pairs]
        if any(call.place(o) is not None or (o.numel() > 1 and not call.solid(o)) for o in others):
            return list(none)
        if rule not in (views.viewed, entries.same, entries.pointwise):
            return list(none)
        of_label = Call(call.name, call.func, call.given, lambda o: self._label(o), call.solid, call.made)
        labels, more = follow(of_label), pairs.more
        if rule is entries.pointwise and not (call.name in SCALING and all(o.numel() == 1 for o in others)):
            more |= {BIAS if call.name in ("add", "sub") else f"its scores go through {call.name}"}
        return [
            replace(pairs, label=label, more=more) if _whole(label, pairs.label) and not of_label.mixes else None
            for label in labels
        ]

    def _label(self, t: Tensor) -> Place | None:
        pairs = self.pairs.get(t)
        return None if pairs is None else pairs.label

    def _spends(self, pairs: _Pairs, t: Tensor, call: Call) -> bool:
        """Whether a product sums, over all keys, the values at the same positions."""
        a, b = (call.tensor(n) for n in PRODUCTS[call.name])
        other, axis, its = (b, t.dim() - 1, b.dim() - 2) if a is t else (a, t.dim() - 2, a.dim() - 1)
        queries, keys = pairs.label.position, pairs.label.channel
        if pairs.keyed == "position":
            queries, keys = keys, queries
        place = call.place(other)
        if place is None or place.wild or other in self.pairs or not varies(keys, (axis,)) or varies(queries, (axis,)):
            return False
        if _axes(place) != [its]:
            return False
        where = pairs.columns if pairs.keyed == "channel" else pairs.rows
        return place.position.numel() == where.numel() and torch.equal(
            self._origins(place.position.flatten()), self._origins(where)
        )

    def _fused(self, call: Call, frame: Frame, mine: Noted) -> tuple[Compared, Noted] | None:
        """torch's function for all of it."""
        bias = next((b for n in ("attn_mask", "attn_bias") if (b := call.given.get(n)) is not None), None)
        if call.given.get("is_causal") or (bias is not None and not call.solid(bias)):
            return None
        q, k, v = (call.tensor(n) for n in ("query", "key", "value"))
        places = [call.place(t) for t in (q, k, v)]
        positions = []
        for t, place in zip((q, k, v), places, strict=True):
            if place is None or place.wild or _axes(place) not in ([t.dim() - 2], []):
                return None
            positions.append(self._origins(place.position.flatten()))
        heads = q.shape[:-2].numel()
        if not torch.equal(positions[1], positions[2]) or heads % self.batch:
            return None
        pairs = _Pairs(places[0], frame, positions[0], positions[1], heads // self.batch, "channel", noted=mine)  # type: ignore[arg-type]
        pairs = replace(pairs, more=frozenset() if bias is None else frozenset((BIAS,)))
        done = self._compared(pairs, frame)
        if done is None:
            return None
        self.spent[call.made[0]] = done
        return done, mine

    def _compared(self, pairs: _Pairs, frame: Frame) -> Compared | None:
        """What it is in all, if every position of the module's input is a key, or of another map made in the module."""
        queries, keys = (pairs.rows, pairs.columns) if pairs.keyed == "channel" else (pairs.columns, pairs.rows)
        queries, keys = self._origins(queries), self._origins(keys)
        if keys.numel() < 2 or frame.position is None:
            return None
        own = torch.equal(keys.sort().values, self._origins(frame.position.flatten()).sort().values)
        if not own and not self._complete(keys):
            return None
        cross = not bool(torch.isin(queries, keys).all())
        if not own and not cross:
            return None
        few = queries.numel() if not cross and queries.numel() < keys.numel() else 0
        parts = {*pairs.through, *frame.called}
        return Compared(pairs.heads, cross, few, pairs.more, pairs.through, parts)

    def _complete(self, keys: Tensor) -> bool:
        """Whether they are all positions of some stages."""
        stages = keys // SHIFT
        return all(
            one and sorted((keys[stages == one] % SHIFT).tolist()) == list(range(self.sizes.get(one, -1)))
            for one in stages.unique().tolist()
        )

    def _origins(self, positions: Tensor) -> Tensor:
        stages = positions // SHIFT
        for one in stages.unique().tolist():
            if one in self.origin:
                positions = torch.where(stages == one, positions + (self.origin[one] - one) * SHIFT, positions)
        return positions


def _axes(place: Place) -> list[int]:
    """Along which positions lie."""
    return [axis for axis, n in enumerate(place.position.shape) if n > 1]


def _vary(label: Place, axes: tuple[int, ...]) -> bool:
    return varies(label.position, axes) or varies(label.channel, axes)


def _whole(label: Place, before: Place) -> bool:
    """Whether all rows and columns are still there."""
    return all(
        getattr(label, n).unique().numel() == getattr(before, n).unique().numel() for n in ("position", "channel")
    )


def _softened(pairs: _Pairs, call: Call) -> _Pairs | None:
    axis = call.given["dim"] % call.made[0].dim()
    along = [n for n in ("position", "channel") if varies(getattr(pairs.label, n), (axis,))]
    if pairs.keyed or len(along) != 1:
        return None
    keys = getattr(pairs.label, along[0])
    alone = not any(varies(keys, (d,)) for d in range(keys.dim()) if d != axis)
    return replace(pairs, keyed=along[0]) if alone else None


def _mixed_heads(pairs: _Pairs, t: Tensor, call: Call) -> _Pairs | None:
    """A product of weights with scores that lie along other axes than it sums."""
    a, b = (call.tensor(n) for n in PRODUCTS[call.name])
    others, axis = [o for o in tensors(call.given) if o is not t], t.dim() - 1 if a is t else t.dim() - 2
    if (a is not t and b is not t) or not all(map(call.solid, others)) or _vary(pairs.label, (axis,)):
        return None
    return replace(pairs, more=pairs.more | {HEADS})
