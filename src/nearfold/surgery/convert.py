"""`convert`: replace layers of any model by operations, with their weights."""

from __future__ import annotations

import difflib
import fnmatch
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import NotationError, Operation, parse
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.recognise.foreign import count
from nearfold.surgery.carry import Carried, carry
from nearfold.surgery.observe import Seen, observe
from nearfold.surgery.report import Change, Report, Row
from nearfold.surgery.schedule import changed
from nearfold.surgery.sites import Site, at, sites

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
Target = str | Operation


@dataclass(frozen=True)
class Rule:
    """Which layers to replace, and by what. Every condition that is given must hold.

    Attributes:
        to: the operation: notation, an Operation, or a function from a `Site` to one of them (None: keep the layer).
            Words in braces are filled in from the layer: {self} is its own operation, {heads}, {size}, {stride},
            {dilation}, {padding} and {groups} its arguments.
        kind: "conv", "attention", a class, or a class's name.
        name: a shell pattern for the dotted name, such as "layer3.*.conv2".
        kernel_size: of a convolution.
        stage: the first number in the name of what the layer is in, such as 3 in layer3.0.conv2; one or several.
        where: a condition of your own, from a `Site` to a bool.
        start: where the operation starts, for `SpectrumSchedule` to move on from: ``ratio``, ``lam``, ``k`` or
            ``candidates``. The layer keeps room for both.

    >>> Rule("nearest(9, scaled) | ranked | softmax(heads={heads})", kind="attention", name="blocks.*").kind
    'attention'
    """

    to: Target | Callable[[Site], Target | None]
    kind: str | type | None = None
    name: str = "*"
    kernel_size: int | tuple[int, ...] | None = None
    stage: int | tuple[int, ...] | None = None
    where: Callable[[Site], bool] | None = None
    start: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, "*", {})}
        return f"Rule({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __post_init__(self) -> None:
        if not (isinstance(self.to, str | Operation) or callable(self.to)):
            raise ValueError(f"to must be an operation, its notation or a function of a site, got {self.to!r}")
        if isinstance(self.to, str):
            words = {name for _, name, _, _ in string.Formatter().parse(self.to) if name is not None}
            unknown = words - {"self", "heads", "size", "stride", "dilation", "padding", "groups"}
            if unknown:
                raise ValueError(f"to={self.to!r}: nothing is called {{{min(unknown)}}} here; see Rule")

    def matches(self, site: Site) -> bool:
        """Whether a layer fulfils every condition."""
        size = self.kernel_size if not isinstance(self.kernel_size, tuple) else _plain(self.kernel_size)
        stages = (self.stage,) if isinstance(self.stage, int) else self.stage
        return (
            fnmatch.fnmatchcase(site.name, self.name)
            and (self.kind is None or _is(site, self.kind))
            and (size is None or site.kernel_size == size)
            and (stages is None or site.stage in stages)
            and (self.where is None or bool(self.where(site)))
        )

    def asks_for(self, name: str, module: nn.Module) -> bool:
        """Whether a layer that cannot be replaced is what the rule is about, as far as its name and class say."""
        looks = _looks_like(module)
        of_kind = isinstance(self.kind, type) and isinstance(module, self.kind)
        return (
            fnmatch.fnmatchcase(name, self.name)
            and (self.kind is None or of_kind or self.kind in (looks, type(module).__name__))
            and (self.kernel_size is None or looks == "conv")
            and (self.where is None or self.kind is not None or self.name != "*")  # it asks for a `Site`
        )

    def operation(self, site: Site) -> Operation | None:
        """What to put in a layer's place; None: keep it.

        Raises:
            ValueError: when the notation does not parse, or asks for what the layer does not have.
        """
        to = self.to if isinstance(self.to, str | Operation) else self.to(site)
        if to is None or isinstance(to, Operation):
            return to
        try:
            return parse(to.format_map(site.words))
        except KeyError as missing:
            raise ValueError(f"it has no {missing.args[0]}, which to={to!r} asks for") from None


def _looks_like(module: nn.Module) -> str:
    """The kind of a layer that cannot be replaced, by the name of its class."""
    name = type(module).__name__.lower()
    return "conv" if "conv" in name else "attention" if "att" in name else "other"


def _plain(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _is(site: Site, kind: str | type) -> bool:
    if isinstance(kind, type):
        return isinstance(site.module, kind)
    return kind in (site.kind, type(site.module).__name__)


@torch.no_grad()
def convert(model: nn.Module, rules: Rule | Iterable[Rule], *, input_size: tuple[int, ...] | None = None) -> Report:
    """Replace layers of a model, in place, by other operations that take over their weights.

    Every layer that mixes positions goes to the first rule that matches it. Its weights carry over where they mean the
    same: a convolution into larger windows, neighbours by position, deformable windows, experts and branches, attention
    into attention over the k best keys; a sum starts as the term that can take the weights over, the others at rate
    zero. The report says for each layer whether the output stays the same (``exact``), stays similar
    (``approximate``) or starts anew (``new weights``); what cannot be done is refused, with the reason, and the
    layer kept. Dtype, device, mode and frozen parameters stay as they are. Do this before an optimizer, DDP or
    torch.compile sees the model.

    Args:
        model: any module: of torchvision, timm, transformers, or your own.
        rules: the first that matches a layer decides.
        input_size: channels and grid of an input, such as (3, 224, 224). With it the report has FLOPs, and knows how
            many positions a layer sees: attention to the k best of at most k keys is exact.

    Returns:
        The report; ``report.undo()`` puts the old layers back.

    Raises:
        ValueError: when no rule matches anything, a notation does not parse, or the model is already wrapped. The
            model is then as it was.

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
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    _require(model, rules)
    found = list(sites(model))
    seen = observe(model, [s for s in found if isinstance(s, Site)], input_size) if input_size else Seen()
    changes: list[Change] = []
    matched = [False] * len(rules)
    for entry in found:
        if not isinstance(entry, Site):
            name, module, reason = entry
            status = "refused" if any(rule.asks_for(name, module) for rule in rules) else "kept"
            changes.append(Change(_row(name, module, status, reason), module))
            continue
        site = at(entry, seen.operations.get(entry.name), seen.grids.get(entry.name))
        rule = next((i for i, rule in enumerate(rules) if rule.matches(site)), None)
        if rule is None:
            changes.append(Change(_row(site.name, site.module, "kept", "no rule", site), site.place))
            continue
        matched[rule] = True
        changes.append(_change(site, rules[rule]))
    unused = tuple(rule for rule, hit in zip(rules, matched, strict=True) if not hit)
    if len(unused) == len(rules):
        raise ValueError(f"no layer matches {unused[0]}; {_there(found, unused[0])}")
    report = Report(model, tuple(changes), seen.flops, input_size, tuple(map(str, unused)))
    report.apply()
    if input_size:
        report.measure()
    return report


def _require(model: nn.Module, rules: list[Rule]) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if type(model).__name__ in WRAPPERS:
        raise ValueError(f"model is wrapped in {type(model).__name__}: convert it before it is wrapped or compiled")
    if not rules or not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(f"rules must be one Rule or several, got {rules!r}")


def _there(found: list[Any], rule: Rule) -> str:
    names = [site.name for site in found if isinstance(site, Site)]
    close = difflib.get_close_matches(rule.name, names, 3, 0.3) if rule.name != "*" else []
    some = [f"{s.name} ({type(s.module).__name__})" for s in found if isinstance(s, Site)][:5]
    if close:
        return f"close to its name: {', '.join(close)}"
    return f"there is, among {len(names)} layers: {', '.join(some)}" if names else "the model has no layer with a rule"


def _row(name: str, module: nn.Module, status: str, reason: str, site: Site | None = None, **more: Any) -> Row:
    operation = str(site.operation) if site else ""
    return Row(name, type(module).__name__, status, operation, reason=reason, parameters=count(module), **more)


def _change(site: Site, rule: Rule) -> Change:
    """What a rule makes of one layer; the model is not touched."""
    try:
        wanted = rule.operation(site)
    except NotationError:
        raise
    except ValueError as why:
        return Change(_row(site.name, site.module, "refused", str(why), site), site.place)
    if wanted is None:
        return Change(_row(site.name, site.module, "kept", "the rule keeps it", site), site.place)
    if refusal := site.source.refuses(wanted):
        return Change(_row(site.name, site.module, "refused", refusal, site), site.place)
    if not site.name:
        raise ValueError(f"the model itself is the layer {type(site.module).__name__}: convert what it is in")
    begin = changed(wanted, **rule.start) if rule.start else wanted
    weights = site.weights
    try:
        mixer = _mixer(site, wanted)
        if begin != wanted:
            mixer.reserve(begin)
            _fill(mixer, carry(weights, wanted) if weights else Carried())
            mixer.become(begin)
        carried = (carry(weights, begin) if weights else Carried()).at(site.positions)
        unlike = site.source.unlike(site.grid)
        carried = carried.weaker(unlike) if unlike else carried
        _fill(mixer, carried)
    except ValueError as why:
        return Change(_row(site.name, site.module, "refused", str(why), site), site.place)
    _settle(mixer, site)
    new = site.source.wrap(mixer).train(site.place.training)
    notes = [*carried.notes, *filter(None, [site.source.note])]
    if begin != wanted:
        notes.append("starts at " + ", ".join(f"{name}={value}" for name, value in rule.start.items()))
    row = _row(
        site.name, site.module, "replaced", "; ".join(notes), site,
        to=str(begin), grade=carried.grade, parameters_after=count(mixer),
    )  # fmt: skip
    return Change(row, site.place, new)


def _mixer(site: Site, op: Operation) -> Mixer:
    """A new layer between the same channels."""
    source = site.source
    bias = any(re.search(r"(^|\.)bias$|_bias$", name) for name in source.tensors)
    if source.tokens:
        return TokenMixer(op, source.in_channels, bias=bias)
    return Mixer(op, source.in_channels, source.out_channels, ndim=source.ndim, bias=bias)


def _fill(mixer: Mixer, carried: Carried) -> None:
    """Give a layer its weights; a bias that the old layer did not have is zero."""
    own = mixer.tensors()
    if carried.grade == "new weights" and not carried.tensors:
        return
    for name, tensor in own.items():
        if name in carried.tensors:
            tensor.copy_(carried.tensors[name].reshape(tensor.shape))
        elif name.endswith("bias") and name.removesuffix("bias") + "weight" in carried.tensors:
            tensor.zero_()


def _settle(mixer: Mixer, site: Site) -> None:
    """Device, dtype and frozen parameters of the old layer."""
    like: Tensor = next(iter(site.source.tensors.values()))
    mixer.to(like.device, like.dtype)
    if not any(p.requires_grad for p in site.module.parameters()):
        mixer.requires_grad_(False)
