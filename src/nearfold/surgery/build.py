"""The new layer for one site: its operation, its weights, and everything that stays as it was."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import NotationError, Operation
from nearfold.lower.meaning import meaning
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.recognise.foreign import count
from nearfold.surgery.carry import Carried, carry
from nearfold.surgery.obstacles import made_of
from nearfold.surgery.proof import Proof, prove
from nearfold.surgery.report import Change, LayerOutcome
from nearfold.surgery.rule import Rule
from nearfold.surgery.schedule import changed
from nearfold.surgery.sites import Site


def row_of(
    name: str, module: nn.Module, status: str, reason: str, site: Site | None = None, **more: Any
) -> LayerOutcome:
    """A row of the report."""
    operation = str(site.operation) if site else ""
    return LayerOutcome(name, type(module).__name__, status, operation, reason=reason, parameters=count(module), **more)


def change(site: Site, rule: Rule, given: bool) -> Change:
    """What a rule makes of one layer; the model is not touched.

    Args:
        site: the layer.
        rule: that matches it.
        given: whether inputs are, on which the whole model will be compared.
    """
    try:
        wanted = rule.operation(site)
    except NotationError:
        raise
    except ValueError as why:
        return _refused(site, str(why))
    if wanted is None:
        return Change(row_of(site.name, site.module, "kept", "the rule keeps it", site), site.place)
    if refusal := site.source.refuses(wanted):
        return _refused(site, refusal)
    if not site.name:
        raise ValueError(f"the model itself is the layer {type(site.module).__name__}: convert what it is in")
    begin = changed(wanted, **rule.start) if rule.start else wanted
    try:
        mixer, carried, notes = _mixer(site, wanted, begin)
        new = standing(site, mixer)
        if carried.grade != "exact" and site.weights is not None:
            _require_known(site)
        proof = prove(site, new, carried.limit)
        if proof.broken and not proof.compared and not proof.unlike and site.grid is None:
            raise ValueError(proof.broken[0])
        if carried.grade == "exact" and proof.unlike:
            raise ValueError(f"compared with {begin}, {proof.unlike}: it does something of its own")
    except ValueError as why:
        return _refused(site, str(why))
    carried = carried.at(site.positions)
    carried = _graded(site, carried, proof, given)
    notes = [*carried.notes, *notes, *_short_of(begin, site)]
    if begin != wanted:
        notes.append("starts at " + ", ".join(f"{name}={value}" for name, value in rule.start.items()))
    row = row_of(
        site.name, site.module, "replaced", "; ".join(notes), site,
        to=str(begin), grade=carried.grade, parameters_after=count(mixer),
    )  # fmt: skip
    return Change(row, site.place, new, proven=bool(proof.compared))


def _refused(site: Site, why: str) -> Change:
    return Change(row_of(site.name, site.module, "refused", why, site), site.place)


def _require_known(site: Site) -> None:
    """ValueError where a layer does not do what its class does: its own operation, with its weights, is compared."""
    assert site.weights is not None
    own = new_mixer(site, site.operation)
    _fill(own, carry(site.weights, site.operation))
    proof = prove(site, standing(site, own))
    if proof.unlike:
        raise ValueError(f"compared with {site.operation}, which its class is, {proof.unlike}: it does something else")


def _graded(site: Site, carried: Carried, proof: Proof, given: bool) -> Carried:
    """The grade after the comparison."""
    missing = list(dict.fromkeys(proof.missing))
    if site.source.unlike is not None and (unlike := site.source.unlike(site.grid)):
        carried = carried.weaker(unlike)
    if "dropout in training" in missing:
        missing.remove("dropout in training")
        carried = carried.weaker(site.source.note or "it does something else in training")
    elif proof.unlike and site.source.note:
        carried = carried.weaker(site.source.note)
    for reason in proof.broken:
        carried = carried.weaker(reason)
    if carried.grade != "exact":
        raising = ", ".join(dict.fromkeys(proof.raising))
        return replace(carried, notes=(*carried.notes, f"an error with {raising}")) if raising else carried
    if not proof.compared and not given and not missing:
        return carried.weaker("not compared: it takes none of the calls that were tried; give inputs")
    if missing and not given:
        return carried.weaker(f"not with {', '.join(missing)}; give inputs to see that there is no such call")
    notes = (f"not with {', '.join(missing)}, on which it was not called",) if missing else ()
    return replace(carried, notes=(*carried.notes, *notes))


def _short_of(op: Operation, site: Site) -> list[str]:
    """That k is larger than the number of positions to choose from."""
    if site.grid is None:
        return []
    ks = []
    for part in op.parts:
        k, border = getattr(part.path, "k", 0), meaning(part.path).border(part)
        there = math.prod(n + 2 * border for n in site.grid)
        if k > there and not part.weight.rho.needs_score:
            ks.append(f"k={k} is more than the {there} positions there are: the other slots stay empty")
    return ks


def new_mixer(site: Site, op: Operation) -> Mixer:
    """A new layer between the same channels, which takes inputs without a batch axis as the old one may."""
    source = site.source
    bias = any(re.search(r"(^|\.)bias$|_bias$", name) for name in source.tensors)
    mixer: Mixer
    if source.tokens:
        width = getattr(site.module, "context_channels", None)
        mixer = TokenMixer(op, source.in_channels, bias=bias, context_dim=width)
    else:
        mixer = Mixer(op, source.in_channels, source.out_channels, ndim=source.ndim, bias=bias)
    mixer.takes_one = True
    return mixer


def in_words(site: Site, operation: Operation) -> Mixer:
    """A layer in the words that it is in, with its weights, in evaluation mode; nothing has been compared.

    Raises:
        ValueError: its weights have no place there.
    """
    mixer = new_mixer(site, operation)
    assert site.weights is not None
    _fill(mixer, carry(site.weights, operation))
    like: Tensor = next(iter(site.source.tensors.values()))
    return mixer.to(like.device, like.dtype).eval()


def _mixer(site: Site, wanted: Operation, begin: Operation) -> tuple[Mixer, Carried, list[str]]:
    """The layer with its weights, how they were carried, and notes on what is frozen."""
    mixer, weights = new_mixer(site, wanted), site.weights
    made: list[Carried] = []
    with torch.enable_grad():  # it is followed of which parameters a tensor is made
        for op in dict.fromkeys((wanted, begin)):
            made.append(carry(weights, op) if weights else Carried())
    with torch.no_grad():
        if begin != wanted:
            mixer.reserve(begin)
            _fill(mixer, made[0])
            mixer.become(begin)
        _fill(mixer, made[-1])
        like: Tensor = next(iter(site.source.tensors.values()))
        mixer.to(like.device, like.dtype)
    return mixer, made[-1], _freeze(mixer, site, made)


def _fill(mixer: Mixer, carried: Carried) -> None:
    """Give a layer its weights; a bias that the old layer did not have is zero."""
    own = mixer.tensors()
    if carried.grade == "new weights" and not carried.tensors:
        return
    with torch.no_grad():
        for name, tensor in own.items():
            if name in carried.tensors:
                tensor.copy_(carried.tensors[name].reshape(tensor.shape))
            elif _added(name, carried):
                tensor.zero_()


def _added(name: str, carried: Carried) -> bool:
    """Whether a parameter is a bias that the old layer did not have, of a weight that it had."""
    return (
        name not in carried.tensors
        and name.endswith("bias")
        and name.removesuffix("bias") + "weight" in carried.tensors
    )


def _freeze(mixer: Mixer, site: Site, made: list[Carried]) -> list[str]:
    """What was frozen stays frozen, parameter by parameter, with what was noted on each.

    Raises:
        ValueError: when one new parameter takes over frozen and trainable ones.
    """
    trainable = [p.requires_grad for p in site.module.parameters()]
    names: dict[Tensor, str] = {parameter: name for name, parameter in site.module.named_parameters()}
    added, fresh = [], []
    for name, parameter in mixer.named_parameters():
        sources = set().union(*(made_of(c.tensors[name]) for c in made if name in c.tensors))
        flags = {p.requires_grad for p in sources}
        if len(flags) > 1:
            frozen, free = (sorted(names[p] for p in sources if p.requires_grad is flag) for flag in (False, True))
            raise ValueError(f"its {name} would be frozen and trainable: of {frozen[0]} and of {free[0]}")
        parameter.requires_grad_(flags.pop() if flags else any(trainable))
        if not sources and all(_added(name, c) for c in made):
            parameter.requires_grad_(False)
            added.append(name)
        elif not sources:
            fresh.append(name)
        for key in set().union(*(vars(p) for p in sources)):
            setattr(parameter, key, next(vars(p)[key] for p in sources if key in vars(p)))
    notes = [f"{', '.join(added)} is new, zero and frozen"] if added else []
    if fresh and not all(trainable):
        kind = "trainable" if any(trainable) else "frozen like the layer"
        notes.append(f"{', '.join(fresh[:3])}{' ...' * (len(fresh) > 3)} is new, and {kind}")
    return notes


def standing(site: Site, mixer: Mixer) -> nn.Module:
    """What stands in the layer's place: around the new layer, in its mode, with what can be read of the old one."""
    new = site.source.wrap(mixer)
    kept = set(site.place.modules())
    for module in new.modules():
        if module not in kept:
            module.training = site.place.training
    for name, value in vars(site.place).items():
        if not name.startswith("_") and not hasattr(new, name) and isinstance(value, bool | int | float | str | tuple):
            setattr(new, name, value)
    return new
