"""Correctness first: output and every gradient of ours against the definition in float64, on the case's own inputs.

Inputs are in half precision, so ours and the definition differ by rounding everywhere: by how much is bounded over all
of a tensor. A few positions that are all wrong would not show there, so they are counted as well: none may be, but for
near-ties where neighbours are searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.case import whole
from benchmarks.gpu.cases import Checked

# relative, in the Euclidean norm: a rounding of the operands and one of the results, and for a parameter's
# gradient a sum over all positions
TOLERANCE = {
    torch.bfloat16: {"output": 1e-2, "input": 2e-2, "parameter": 4e-2},
    torch.float16: {"output": 2e-3, "input": 4e-3, "parameter": 8e-3},
    torch.float32: {"output": 1e-5, "input": 2e-5, "parameter": 4e-5},
}
SCORES = 1e-5  # of scores that are computed from indices in float64
OFF = 0.2  # a position is wrong that is off by this share of a usual position's norm
NEAR_TIES = 1e-4  # share of positions that may be, where neighbours are searched
SMALL = 0.05  # a parameter's gradient that is zero but for rounding is measured by the largest one times this


@dataclass
class Sum:
    """Of one tensor, over the parts: squares of the difference and of the truth, per position."""

    off: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)

    def add(self, found: Tensor, wanted: Tensor, axis: int) -> None:
        self.off.append((found.double() - wanted).square().sum(axis).flatten())
        self.size.append(wanted.square().sum(axis).flatten())

    def error(self, least: float = 0.0) -> float:
        """Relative; NaN where there is NaN."""
        off, size = (math.sqrt(torch.cat(t).sum().item()) for t in (self.off, self.size))
        return off / max(size, least) if size or least else off

    def norm(self) -> float:
        return math.sqrt(torch.cat(self.size).sum().item())

    def wrong(self) -> float:
        """Share of positions that are off, or NaN, by more than rounding."""
        off, usual = torch.cat(self.off), torch.cat(self.size).mean()
        return (~(off <= OFF**2 * usual)).double().mean().item()


@dataclass(frozen=True)
class Verdict:
    """What was found: the largest relative error over all tensors, where, and whether it is rounding.

    ``repeats``: whether a second run gave the same bits.
    """

    difference: float
    where: str
    right: bool
    repeats: bool


def _ours(checked: Checked, backward: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """By name: output and gradients of the inputs; of the parameters; and the gradient that came from above."""
    case = checked.case
    inputs = tuple(x.detach().requires_grad_(backward) for x in case.inputs)
    case.clear(inputs)
    with torch.set_grad_enabled(backward):
        y = case.ours(*inputs)
    found, parameters, upstream = {"output": y.detach()}, {}, None
    if backward:
        torch.manual_seed(1)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        found |= {f"gradient of input {i}": _given(x) for i, x in enumerate(inputs)}
        if case.module is not None:
            parameters = {f"gradient of {n}": _given(p) for n, p in case.module.named_parameters()}
    case.clear(inputs)
    return found, parameters, upstream


def _given(t: Tensor) -> Tensor:
    return torch.zeros_like(t) if t.grad is None else t.grad


def judge(checked: Checked) -> Verdict:
    """Compare ours with the reference."""
    case, backward = checked.case, checked.case.backward
    found, parameters, upstream = _ours(checked, backward)
    again, parameters_again, _ = _ours(checked, backward)
    repeats = all(torch.equal(t, {**again, **parameters_again}[n]) for n, t in {**found, **parameters}.items())
    if backward:
        found["output without gradients"] = _ours(checked, False)[0]["output"]
    del again, parameters_again
    sums: dict[str, Sum] = {name: Sum() for name in found}
    if checked.wide is not None:
        checked.wide.zero_grad(set_to_none=True)
    for part in checked.parts:
        inputs = [x[part].double().requires_grad_(backward) for x in case.inputs]
        with torch.set_grad_enabled(backward):
            y = checked.reference(*inputs)
        wanted = {"output": y.detach(), "output without gradients": y.detach()}
        if upstream is not None:
            y.backward(upstream[part].double())
            wanted |= {f"gradient of input {i}": _given(x) for i, x in enumerate(inputs)}
        for name, t in found.items():
            ours = checked.part(t[part], *(x[part] for x in case.inputs)) if name.startswith("output") else t[part]
            if ours.shape != wanted[name].shape:
                return Verdict(float("inf"), f"the shape of {name}", False, repeats)
            sums[name].add(ours, wanted[name], checked.axis)
    tolerance = TOLERANCE[case.inputs[0].dtype]
    # (how many times its tolerance, error, where)
    errors = []
    for name, total in sums.items():
        kind = "output" if name.startswith("output") else "input"
        bound = tolerance[kind] if checked.part is whole else SCORES
        errors.append((total.error() / bound, total.error(), name))
        allowed = NEAR_TIES if checked.searched else 0.0
        wrong, positions = total.wrong(), sum(len(t) for t in total.off)
        if wrong * positions > max(allowed * positions, 1 if checked.searched else 0):
            errors.append((float("inf"), total.error(), f"{name} at {wrong:.1e} of all positions"))
    errors += _parameters(checked, parameters, tolerance["parameter"])
    worst = max(errors, key=lambda e: math.inf if math.isnan(e[0]) else e[0])
    return Verdict(worst[1], worst[2], worst[0] <= 1, repeats)


def _parameters(checked: Checked, found: dict[str, Tensor], tolerance: float) -> list[tuple[float, float, str]]:
    if checked.wide is None:
        return []
    sums = {}
    for name, p in checked.wide.named_parameters():
        sums[f"gradient of {name}"] = total = Sum()
        total.add(found[f"gradient of {name}"].flatten(), _given(p).flatten(), 0)
    least = SMALL * max(total.norm() for total in sums.values())
    return [(total.error(least) / tolerance, total.error(least), name) for name, total in sums.items()]


def peer_difference(checked: Checked, forward: object) -> float:
    """Relative difference of another's output from the reference on the first part; told, not judged.

    What works in half precision throughout finds other neighbours.
    """
    assert callable(forward)
    part = checked.parts[0]
    inputs = [x[part] for x in checked.case.inputs]
    total = Sum()
    with torch.no_grad():
        total.add(forward(*inputs), checked.reference(*(x.double() for x in inputs)), checked.axis)
    return total.error()
