"""The optimizers of a recipe, and the average of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nearfold.train.distributed import local, sharded
from nearfold.train.recipe import Recipe

_ADAMW, _MOMENTUM = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
HELD = {"adamw": (_ADAMW,), "sgd": (_MOMENTUM,), "muon": (_MOMENTUM, _ADAMW)}
"""What the optimizers keep of a weight: one of these sets."""
REST = 0.2
"""Learning rate of what muon leaves to AdamW, as a share of its own."""

_Tensors = tuple[Tensor, ...] | list[Tensor]


def average(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """Return the update of averaged tensors, all of one type, by the current ones."""
    average_floats = get_ema_multi_avg_fn(decay)

    def update(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        averaged, current = [local(old) for old in averaged], [local(new) for new in current]
        if averaged[0].is_floating_point():
            average_floats(averaged, current, count)
        else:  # torch's average rounds integers down, and with them a constant table of indices
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    return update


def optimizer_of(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe for a model's trainable weights."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError("the model has no trainable parameter")
    fused = device.type in ("cpu", "cuda")  # one call for all weights: small networks live on this
    if recipe.optimizer == "sgd" and sharded(model):
        fused = False  # torch has no fused sgd of divided weights
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    if recipe.optimizer == "muon":
        if sharded(model):
            raise ValueError(
                "Recipe.optimizer='muon' needs whole matrices, and parallel='fsdp' divides them: use parallel='ddp', "
                "or optimizer='adamw'"
            )
        return _muon(weights, recipe)
    return torch.optim.SGD(
        weights,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=fused,
    )


def _muon(weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """timm's Muon: the package that has it for convolutions, too (torch's own takes matrices only)."""
    from nearfold._torchvision import load

    try:
        load("timm")
        from timm.optim.muon import Muon
    except ImportError as missing:
        raise ImportError(
            "Recipe.optimizer='muon' needs timm 1.0.20 or newer: pip install timm; or use 'sgd'"
        ) from missing
    made: torch.optim.Optimizer = Muon(
        weights,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fallback_lr_scale=REST,
    )
    return made
