"""What could stand in a layer's place, by what it reads: rules for `nearfold.convert`, each tried on the images."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nearfold._images import first_line
from nearfold.examine.reading import first_tensor
from nearfold.examine.report import XRay, XRayLayer
from nearfold.grammar import Basic, parse
from nearfold.look.derivative import evaluating
from nearfold.look.measures import WINDOWS
from nearfold.surgery.adapters import dense
from nearfold.surgery.convert import convert
from nearfold.surgery.rule import Rule

SHARE = 0.95  # of what is read, that must stay
STILL = 0.1  # content below which a layer does not depend on the image


@dataclass(frozen=True)
class Suggestion:
    """A rule for one layer, tried.

    Attributes:
        rule: for `nearfold.convert`.
        why: what was measured.
        grade: what `convert` says of the weights: exact, approximate, new weights, or refused.
        change: of the model's output on the images, the size of the difference by the size of the output.
        same: share of images whose largest output stays the largest; NaN where the output is no row of classes.
        reason: why it was refused.
    """

    rule: Rule
    why: str
    grade: str
    change: float = float("nan")
    same: float = float("nan")
    reason: str = ""

    def __str__(self) -> str:
        if self.grade == "refused":
            return f"{self.rule}  # {self.why}; refused: {self.reason}"
        same = "" if math.isnan(self.same) else f", {100 * self.same:.0f} % of the decisions the same"
        return f"{self.rule}  # {self.why}; {self.grade}, output changes by {100 * self.change:.2g} %{same}"


def suggest(model: nn.Module, images: Tensor, seen: XRay) -> list[Suggestion]:
    """Rules by which layers could become cheaper words, each with the change that it makes, measured.

    - Attention of which few positions hold 95 % of what is read could be ``nearest(k)``, with that k of its widest
      head, where this is at most half of the positions.
    - Attention on a map that reads 95 % within a window, and hardly changes with the image (content below 0.1), could
      be a ``window`` of that side, still with its weights.

    Args:
        model: the model that was measured; it is left as it is.
        images: on which the outputs are compared.
        seen: its x-ray.

    >>> from nearfold.nn import ConvNN2d
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ConvNN2d(8, 8, k=4))
    >>> from nearfold.examine import xray
    >>> suggest(net, (x := torch.randn(2, 3, 6, 6)), xray(net, x))  # nothing here is dense attention
    []
    """
    twin, found = copy.deepcopy(model), []
    with evaluating(twin), torch.no_grad():
        before = first_tensor(twin(images))
        for layer in seen.layers:
            for rule, why in rules_for(layer):
                found.append(_tried(twin, images, before, rule, why))
    return found


def rules_for(layer: XRayLayer) -> list[tuple[Rule, str]]:
    """The rules that a layer's measures speak for, with what speaks for them."""
    op = parse(layer.notation) if layer.way == "words" and not layer.rearranged else None
    if op is None or not dense(op, layer.positions):
        return []
    assert isinstance(op, Basic)
    rules, rho = [], str(op.weight)
    k = math.ceil(max(layer.by_head["most95"]))
    if k <= layer.positions // 2:
        why = f"{k} of {layer.positions} positions hold {SHARE:.0%} of what its widest head reads"
        rules.append((Rule(f"nearest({k}, scaled) | ranked | {rho}", name=layer.name), why))
    content = layer.measures["content"]
    side = next((s for s in WINDOWS if min(layer.by_head[f"window{s}"]) >= SHARE and s < min(layer.grid)), None)
    if content < STILL and side is not None and layer.beside == 0 and len(layer.grid) == 2:
        why = f"{SHARE:.0%} of what it reads lies in {side} x {side}, and content changes {content:.2f} of it"
        rules.append((Rule(f"window({side}) | box | {rho}", name=layer.name), why))
    return rules


def _tried(twin: nn.Module, images: Tensor, before: Tensor, rule: Rule, why: str) -> Suggestion:
    """A rule, tried on a copy of the model, which is then as it was."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it refuses is said below
            report = convert(twin, rule)
    except ValueError as error:
        return Suggestion(rule, why, "refused", reason=first_line(error))
    (row,) = (row for row in report.rows if row.name == rule.name)
    if row.status != "replaced":
        return Suggestion(rule, why, "refused", reason=row.reason)
    after = first_tensor(twin(images))
    report.undo()
    change = float((after - before).norm() / before.norm().clamp(min=1e-30))
    same = float("nan")
    if before.dim() == 2 and before.shape[1] > 1:
        same = float((after.argmax(1) == before.argmax(1)).double().mean())
    return Suggestion(rule, why, row.grade, change, same)
