"""`convert`: replace layers of any model by operations, with their weights."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nearfold._numbers import shown
from nearfold.surgery.build import change, row_of
from nearfold.surgery.report import Change, Report, few
from nearfold.surgery.rule import Rule, looks_like
from nearfold.surgery.runs import Seen, call_of, confirm, watched
from nearfold.surgery.sites import Site, at, sites

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


def convert(
    model: nn.Module, rules: Rule | Iterable[Rule], *, input_size: tuple[int, ...] | None = None, inputs: Any = None
) -> Report:
    """Replace layers of a model, in place, by other operations that take over their weights.

    Every layer that mixes positions goes to the first rule that matches it. Its weights carry over where they mean the
    same: a convolution into larger windows, neighbours by position, deformable windows, experts and branches, attention
    into attention over the k best keys; a sum starts as the term that can take the weights over, the others at rate
    zero. The report says for each layer whether the output stays the same (``exact``), stays similar
    (``approximate``) or starts anew (``new weights``). Exact was compared: the new layer ran on every kind of call that
    the old one takes, on several sizes, in evaluation and training, and differed by less than 1e-12 in float64 (1e-5
    where the old one computes in float32 there, too); with ``input_size`` or ``inputs`` the whole model did, by less
    than 1e-5 (1e-12 in float64). What cannot be done, or would lose something (hooks, tied weights, a forward of its
    own), is refused, with the reason, and the layer kept.
    Dtype, device, mode and frozen parameters stay as they are. Do this before an optimizer, DDP or torch.compile sees
    the model.

    Args:
        model: any module: of torchvision, timm, transformers, or your own.
        rules: the first that matches a layer decides.
        input_size: channels and grid of an input, such as (3, 224, 224). With it the model runs before and after, the
            outputs are compared, the report has FLOPs, and knows how many positions a layer sees: attention to the k
            best of at most k keys is exact.
        inputs: the same for a model of other inputs: a tensor, a tuple of arguments, or a dict of named ones.

    Returns:
        The report; ``report.undo()`` puts the old layers back.

    Raises:
        ValueError: when no rule matches anything, a notation does not parse, the model is already wrapped, or does not
            run on the inputs, before or after. Whatever is raised, the model is then as it was.

    >>> conv = nn.Conv2d(4, 4, 3, padding=1)
    >>> model = nn.Sequential(conv, nn.ReLU())
    >>> x, before = torch.randn(1, 4, 8, 8), None
    >>> y = model(x)
    >>> report = convert(model, Rule("nearest(9, blend(0), padding=1) | box | kernel", kind="conv"))
    >>> report.exact, torch.allclose(model(x), y, atol=1e-5)
    (True, True)
    >>> report.undo()
    >>> model[0] is conv
    True
    """
    rules = [rules] if isinstance(rules, Rule | str) else list(rules)
    _require(model, rules)
    with torch.inference_mode(False), torch.no_grad():
        return _convert(model, rules, input_size, inputs)


def _convert(model: nn.Module, rules: list[Rule], input_size: tuple[int, ...] | None, inputs: Any) -> Report:
    call = call_of(model, input_size, inputs)
    entries = list(sites(model))
    seen = watched(model, [s for s in entries if isinstance(s, Site)], call) if call else Seen()
    changes: list[Change] = []
    matched = [False] * len(rules)
    for entry in entries:
        if not isinstance(entry, Site):
            asking = [i for i, rule in enumerate(rules) if rule.asks_for(entry.name, entry.module)]
            if asking and entry.known:
                matched[asking[0]] = True
            status = "refused" if asking else "kept"
            changes.append(Change(row_of(entry.name, entry.module, status, entry.reason), entry.module))
            continue
        site = at(entry, seen.operations.get(entry.name), seen.grids.get(entry.name))
        rule = next((i for i, rule in enumerate(rules) if rule.matches(site)), None)
        if rule is None:
            changes.append(Change(row_of(site.name, site.module, "kept", "no rule", site), site.place))
            continue
        matched[rule] = True
        changes.append(change(site, rules[rule], call is not None))
    unused = tuple(rule for rule, hit in zip(rules, matched, strict=True) if not hit)
    if len(unused) == len(rules):
        raise ValueError(f"no layer matches {unused[0]}; {_there(entries, unused[0])}")
    report = Report(model, tuple(changes), seen.flops, unused=tuple(map(str, unused)))
    try:
        if call is None:
            report.apply()
        else:
            confirm(report, model, call)
        _say_refused(report)
    except BaseException:
        if report.applied:
            report.undo()
        raise
    return report


NEAREST = "nearest(9, scaled) | ranked | softmax(heads={heads})"


def _say_refused(report: Report) -> None:
    """A warning where layers that a rule asked for stay as they are: `exact` speaks of those that were replaced."""
    refused = [row for row in report.rows if row.status == "refused"]
    if refused:
        asked = len(refused) + len(report.replaced)
        names = few([row.name for row in refused])
        warnings.warn(
            f"{len(refused)} of {asked} layers that a rule asks for are refused and stay: {names}: {refused[0].reason}"
            "; print(report) says why of each",
            stacklevel=4,
        )


def _require(model: nn.Module, rules: list[Rule]) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if type(model).__name__ in WRAPPERS:
        raise ValueError(f"model is wrapped in {type(model).__name__}: convert it before it is wrapped or compiled")
    if not rules or not all(isinstance(rule, Rule) for rule in rules):
        given = next((rule for rule in rules if not isinstance(rule, Rule)), rules)
        raise ValueError(f"rules must be one Rule or several, such as Rule({NEAREST!r}), got {shown(given)}")


def _there(entries: list[Any], rule: Rule) -> str:
    """What is there instead, and why it was not taken."""
    wanted = [e for e in entries if rule.kind in (None, _kind(e))] or entries
    if not wanted:
        return "the model has no layer that mixes positions"
    reasons: dict[str, list[str]] = {}
    for e in wanted:
        reason = f"its {rule.miss(e)} is another" if isinstance(e, Site) else e.reason
        reasons.setdefault(f"{type(e.module).__name__}: {reason}", []).append(e.name)
    names = [n for some in reasons.values() for n in some]
    close = difflib.get_close_matches(rule.name, names, 3, 0.3) if rule.name != "*" else []
    what = rule.kind if isinstance(rule.kind, str) and rule.kind in ("attention", "conv") else "layers"
    there = [f"{few(some)} ({reason})" for reason, some in list(reasons.items())[:6]]
    more = f" and {len(reasons) - 6} other kinds" if len(reasons) > 6 else ""
    text = (
        f"{'there is' if wanted is not entries or rule.kind is None else f'no {what} is known; there is'} "
        + "; ".join(there)
    )
    return text + more + (f"; close to its name: {', '.join(close)}" if close else "")


def _kind(entry: Any) -> str:
    return entry.kind if isinstance(entry, Site) else looks_like(entry.module)
