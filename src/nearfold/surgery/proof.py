"""Is a layer's replacement what it is called? Both run on the same calls, and what they make is compared."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nearfold._images import first_line
from nearfold.recognise.trial import undrawn
from nearfold.surgery.sites import Site
from nearfold.surgery.sources import Trial

BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5}
"""How far outputs may be from each other, over the largest, to be called the same; else eight steps of the dtype."""
NARROW = (torch.float32, torch.float16, torch.bfloat16)
SEED = 20  # of the inputs that are made up


@dataclass
class Proof:
    """What the comparison of a layer with its replacement found.

    Attributes:
        compared: calls without special arguments that both ran with the same result.
        broken: such a call that only the old layer ran, and why.
        unlike: by how much the outputs differ where they do.
        missing: special arguments (masks, another memory ...) that the replacement does not take as the old layer did.
        raising: those among them that are an error.
    """

    compared: int = 0
    broken: list[str] = field(default_factory=list)
    unlike: str = ""
    missing: list[str] = field(default_factory=list)
    raising: list[str] = field(default_factory=list)


def budget(dtype: torch.dtype) -> float:
    """The largest relative difference that is called none.

    >>> budget(torch.float32)
    1e-05
    """
    return BUDGET.get(dtype, 8 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, whatever holds them."""
    leaves = tree_leaves(output)
    if any(not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__") for leaf in leaves):
        leaves = [t for leaf in leaves for t in ([leaf] if isinstance(leaf, Tensor) else tree_leaves(vars_of(leaf)))]
    return [t for t in leaves if isinstance(t, Tensor)]


def vars_of(value: Any) -> Any:
    """Attributes of an object that is no container for torch."""
    return dict(vars(value)) if hasattr(value, "__dict__") and not callable(value) else None


def difference(new: Tensor, old: Tensor) -> float:
    """The largest difference over the largest old number; infinite for another shape or dtype. NaN equals NaN.

    >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    if new.shape != old.shape or new.dtype != old.dtype:
        return float("inf")
    if not old.is_floating_point():
        return 0.0 if torch.equal(new, old) else float("inf")
    if not old.numel():
        return 0.0
    if not torch.equal(new.isfinite(), old.isfinite()):
        return float("inf")
    old, new = old.nan_to_num(posinf=0.0, neginf=0.0).double(), new.nan_to_num(posinf=0.0, neginf=0.0).double()
    return (new - old).abs().max().item() / (old.abs().max().item() or 1.0)


def prove(site: Site, new: nn.Module, limit: int | None = None) -> Proof:
    """Compare a layer with its replacement on calls of its kind, in float64 on copies, and once in training.

    Args:
        site: the layer.
        new: what is to stand in its place.
        limit: how many positions there may be at most; None: any number.
    """
    try:
        old64, new64 = (_exactly(module) for module in (site.place, new))
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        return Proof(missing=[f"a comparison: it cannot be copied ({first_line(error)})"])
    proof = Proof()
    generator = torch.Generator().manual_seed(SEED)
    last: Trial | None = None
    for trial in site.trials(generator, old64, limit):
        _compare(proof, old64, new64, trial, trial.what)
        last = last if trial.what else trial
    if last is not None and not proof.unlike:
        _compare(proof, old64.train(), new64.train(), last, "dropout in training")
    return proof


def _exactly(module: nn.Module) -> nn.Module:
    """A copy in float64 and evaluation, on the CPU."""
    if any(t.is_meta for t in module.parameters()):
        raise NotImplementedError("there are no numbers on the meta device")
    return copy.deepcopy(module).to("cpu", torch.float64).eval()


def _compare(proof: Proof, old: nn.Module, new: nn.Module, trial: Trial, what: str) -> None:
    wanted, refused = _run(old, trial)
    if refused:  # no call of the old layer
        return
    made, refused = _run(new, trial)
    if refused:
        if what:
            proof.missing.append(what)
            proof.raising.append(what)
        else:
            proof.broken.append(f"does not run on {_shape(trial)}: {refused}")
        return
    off = max(itertools.starmap(difference, zip(made, wanted, strict=False)), default=float("inf"))
    allowed = BUDGET[torch.float64]
    if allowed < off <= BUDGET[torch.float32] and _rounds(old, trial):
        allowed = BUDGET[torch.float32]
    if off > allowed:
        if what:
            proof.missing.append(what)
        else:
            proof.unlike = proof.unlike or (
                f"its output grid is another: {tuple(made[0].shape)}, and was {tuple(wanted[0].shape)}"
                if off == float("inf") and made and made[0].shape != wanted[0].shape
                else f"its output differs by {off:.1g} on {_shape(trial)}"
            )
        return
    if len(made) != len(wanted) and "attention weights" not in proof.missing:
        proof.missing.append("attention weights")
    proof.compared += not what


def _run(module: nn.Module, trial: Trial) -> tuple[list[Tensor], str]:
    args, kwargs = copy.deepcopy((trial.args, trial.kwargs))  # what is one tensor in two places stays one
    try:
        with undrawn(seed=SEED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that only these calls have
            return tensors(module(*args, **kwargs)), ""
    except Exception as error:
        return [], first_line(error)


class _Widths(TorchDispatchMode):
    """Whether anything was computed in less than float64."""

    narrow = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.narrow |= any(isinstance(t, Tensor) and t.dtype in NARROW for t in tree_leaves(made))
        return made


def _rounds(old: nn.Module, trial: Trial) -> bool:
    """Whether a layer computes in float32 even where it is in float64, as eager attention of transformers does."""
    with _Widths() as widths:
        _run(old, trial)
    return widths.narrow


def _shape(trial: Trial) -> str:
    return " and ".join(str(tuple(t.shape)) for t in trial.args[:1] if isinstance(t, Tensor)) or "a call"
