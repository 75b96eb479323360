"""What is read from a foreign layer is run before it is said: a copy with random weights, next to the words."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nearfold.recognise.foreign import Unsaid

BATCH, POSITIONS = 2, 7
TOLERANCE = 1e-5
Read = TypeVar("Read")


def remembered(known: dict[Any, Read | str], key: Any, read: Callable[[], Read]) -> Read:
    """What was read before from a layer like this one, or why nothing could be: a network's layers are alike."""
    if key not in known:
        try:
            with torch.device("cpu"):
                known[key] = read()
        except Unsaid as why:
            known[key] = str(why)
    found = known[key]
    if isinstance(found, str):
        raise Unsaid(found)
    return found


def require_alike(theirs: Tensor, ours: Tensor, what: str) -> None:
    """Unsaid where two outputs differ by more than rounding does."""
    apart = (theirs - ours).abs().max().item() / ours.abs().max().clamp(min=1e-30).item()
    if not apart < TOLERANCE:
        raise Unsaid(f"checked on a random input, it is not {what}: they differ by {apart:.2g} of the output")


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Everything that a layer is read from."""
    plain = (int, float, str, bool, type(None))
    scalars = tuple(
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if isinstance(value, plain) and key not in ("layer_idx", "training", "_is_hf_initialized")
    )
    classes = tuple((name, type(part)) for name, part in module.named_modules())
    shapes = tuple((name, tuple(t.shape)) for name, t in (*module.named_parameters(), *module.named_buffers()))
    config = config_of(module)
    odd = tuple(name for name, t in module.named_buffers() if name == "k_bias" and not t.is_meta and bool(t.any()))
    return classes, scalars, shapes, type(config).__name__, str(config), kind_of(module, config), odd


def config_of(module: nn.Module) -> Any:
    """The configuration that a layer of transformers holds, or one of its parts; None where there is none."""
    return next((m.config for m in module.modules() if hasattr(m, "config")), None)


def kind_of(layer: nn.Module, config: Any) -> Any:
    """The type that a configuration gives a layer by its number; None where it gives none."""
    kinds, index = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
    return kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else None


def random_copy(module: nn.Module) -> nn.Module:
    """The same layer in float64 on the CPU, with random weights: what is zero at the start would show nothing."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, hooks).clear()
    constants = {name: t.clone() for name, t in twin.named_buffers() if not t.is_meta}
    twin = twin.to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    for p in twin.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data.copy_(noise / math.sqrt(max(p.shape)) if p.dim() > 1 else 0.1 * noise)
    for name, t in twin.named_buffers():
        t.copy_(constants[name]) if name in constants else t.zero_()
    config = config_of(twin)
    if str(getattr(config, "_attn_implementation", "sdpa")) not in ("sdpa", "eager"):
        config._attn_implementation = "eager"
    return twin
