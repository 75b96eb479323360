"""One run of a model: the grids that its layers see, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nearfold.grammar import Operation
from nearfold.recognise.blocks import AT_CALL
from nearfold.recognise.foreign import Found, Unsaid, names_of
from nearfold.recognise.trial import trial
from nearfold.recognise.walk import ALL_RULES
from nearfold.surgery.sites import Site


@dataclass
class Seen:
    """What a run showed, by the layers' names.

    Attributes:
        grids: of a layer's input.
        operations: what a layer is when called like this, where that differs from what it is alone.
        flops: multiply and add as two, for one input; "" is the whole model.
    """

    grids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)


def observe(model: nn.Module, layers: Iterable[Site], input_size: tuple[int, ...]) -> Seen:
    """Run a copy of a model once on one input of this size, on the meta device where it can.

    Raises:
        ValueError: when the model does not run on such an input.
    """
    seen, layers = Seen(), list(layers)

    def watched(modules: dict[nn.Module, nn.Module]) -> None:
        for site in layers:
            modules[site.place].register_forward_pre_hook(_noting(seen, site), with_kwargs=True)

    seen.flops = count_flops(model, input_size, watched)
    return seen


def _noting(seen: Seen, site: Site) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        grid = tuple(x.shape[1:-1]) if site.source.channels_last else tuple(x.shape[2:])
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            grid = tuple(x.shape[:1])
        if site.source.ndim == 2 and x.dim() == 3:  # tokens, next to the size of their map
            grid = next((a for a in (*args, *kwargs.values()) if isinstance(a, tuple) and len(a) == 2), grid)
        seen.grids[site.name] = tuple(map(int, grid))
        for name in names_of(module):
            if name in AT_CALL:
                try:
                    found: Found = AT_CALL[name](module, ALL_RULES[name](module), args, kwargs)
                    seen.operations[site.name] = found.operation
                except Unsaid:
                    pass

    return note


def count_flops(
    model: nn.Module,
    input_size: tuple[int, ...],
    watched: Callable[[dict[nn.Module, nn.Module]], None] = lambda modules: None,
) -> dict[str, int]:
    """FLOPs of one input by module, from FlopCounterMode; "" is the whole model.

    Args:
        model: left as it is; a copy runs.
        input_size: channels and grid.
        watched: called before the run with a dict from the model's modules to the copy's.

    >>> count_flops(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), (3, 8, 8))["0"]
    13824
    """

    def run(twin: nn.Module, modules: dict[nn.Module, nn.Module], args: Any, kwargs: Any) -> dict[str, int]:
        watched(modules)
        with FlopCounterMode(display=False) as counter:
            twin(*args, **kwargs)
        root = type(twin).__name__
        return {
            "" if name in (root, "Global") else name.removeprefix(f"{root}."): sum(counts.values())
            for name, counts in counter.get_flop_counts().items()
        }

    return trial(model, input_size, None, run)
