"""Runs of a model: the grids that its layers see, what they cost, and whether the output stayed the same."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from nearfold.grammar import Operation
from nearfold.look.derivative import evaluating
from nearfold.recognise.blocks import AT_CALL
from nearfold.recognise.foreign import Match, Unsaid, names_of
from nearfold.recognise.trial import check_size, copied, quiet, undrawn
from nearfold.recognise.walk import ALL_RULES
from nearfold.surgery.proof import SEED, budget, difference, tensors
from nearfold.surgery.report import Report
from nearfold.surgery.sites import Site


@dataclass(frozen=True)
class Call:
    """Arguments of a model's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    about: str

    def __call__(self, model: nn.Module) -> Any:
        """Call a model with copies of the tensors."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))  # what is one tensor in two places stays one
        return model(*args, **kwargs)

    def to(self, dtype: torch.dtype) -> Call:
        """The same with floating-point tensors in another dtype."""

        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        args, kwargs = tree_map(cast, (self.args, self.kwargs))
        return Call(args, kwargs, self.about)


def call_of(model: nn.Module, input_size: tuple[int, ...] | None, inputs: Any) -> Call | None:
    """The call that `convert` is given by the size of an image, or by inputs; None: neither.

    Raises:
        ValueError: for both, or a size that is none.
    """
    if inputs is not None:
        if input_size is not None:
            raise ValueError("input_size and inputs were both given: leave one out")
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        if not isinstance(inputs, tuple | list | dict):
            raise ValueError(f"inputs must be a tensor, a tuple of arguments or a dict, got {type(inputs).__name__}")
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})
        return Call(args, kwargs, "the inputs")
    if input_size is None:
        return None
    check_size(input_size)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return Call((x.to(first.device, first.dtype),), {}, f"an input of size {tuple(input_size)}")


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards modes, buffers and random numbers are as they were."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(t): t.clone() for _, own in buffers for t in own.values() if t is not None}
    parameters = [(module, dict(module._parameters)) for module, _ in buffers]
    try:
        with evaluating(model), undrawn(seed=SEED):
            yield
    finally:
        for module, weights in parameters:
            module._parameters.update(weights)
        for module, own in buffers:
            module._buffers.update(own)
            for t in own.values():
                if t is not None and not t.is_meta and not torch.equal(t, values[id(t)]):
                    t.copy_(values[id(t)])


@dataclass
class Seen:
    """What a run showed, by the layers' names.

    Attributes:
        grids: of a layer's input, or of its keys where they are another; the largest where it is called several times.
        operations: what a layer is when called like this, where that differs from what it is alone.
        flops: multiply and add as two, for these inputs; "" is the whole model.
    """

    grids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)


def watched(model: nn.Module, layers: Iterable[Site], call: Call) -> Seen:
    """Run a model once, and watch its layers.

    Raises:
        ValueError: when the model does not run on these inputs.
    """
    seen = Seen()
    with contextlib.ExitStack() as stack:
        for site in layers:
            hook = site.place.register_forward_pre_hook(_noting(seen, site), with_kwargs=True)
            stack.callback(hook.remove)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        try:
            with quiet(device):
                _, seen.flops = run(model, call)
        except Exception as error:
            raise ValueError(f"{type(model).__name__} does not run on {call.about}: {error}") from error
    return seen


def _noting(seen: Seen, site: Site) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not given:
            return
        x = given[0]
        grid = tuple(x.shape[1:-1]) if site.source.channels_last else tuple(x.shape[2:])
        if isinstance(module, nn.MultiheadAttention):
            key = args[1] if len(args) > 1 else kwargs["key"]
            grid = tuple(key.shape[1:2] if module.batch_first and key.dim() == 3 else key.shape[:1])
        elif site.source.ndim == 2 and x.dim() == 3:  # tokens, next to the size of their map
            grid = next((a for a in (*args, *kwargs.values()) if isinstance(a, tuple) and len(a) == 2), grid)
        if math.prod(grid) > math.prod(seen.grids.get(site.name, (0,))):
            seen.grids[site.name] = tuple(map(int, grid))
        for name in names_of(module):
            if name in AT_CALL and site.source.tokens:  # blocks of a map leave their shift out by themselves
                with contextlib.suppress(Unsaid):
                    match: Match = AT_CALL[name](module, ALL_RULES[name](module), args, kwargs)
                    seen.operations[site.name] = match.operation

    return note


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """FLOPs of fused attention, by the shapes of query, key and value."""
    return int(sdpa_flop_count(query, key, value))


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What torch's counter leaves out: fused attention on the CPU costs what it costs elsewhere."""


@torch.no_grad()
def run(model: nn.Module, call: Call) -> tuple[list[Tensor], dict[str, int]]:
    """The tensors of a model's output in evaluation, and FLOPs by module; "" is the whole model.

    What runs is a copy: whatever modules keep of a call, the model's own do not.

    >>> run(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), Call((torch.zeros(1, 3, 8, 8),), {}, ""))[1]["0"]
    13824
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    twin, _ = copied(model, device)
    with unchanged(twin), quiet(device), FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        made = tensors(call(twin))
    root = type(model).__name__
    flops = {
        "" if name in (root, "Global") else name.removeprefix(f"{root}."): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
    }
    return made, flops


def confirm(report: Report, model: nn.Module, call: Call) -> None:
    """Put the new layers in, and compare the model's output with what it was; layers that do not fit are refused.

    Raises:
        ValueError: when the model does not run with the new layers, for no reason that one of them shows.
    """
    if not all(c.proven and c.row.grade == "exact" for c in report.standing):
        report.refuse(_wrong(report, model, call))
    before = _output(model, call)
    flops: dict[str, int] = {}
    while True:
        report.apply()
        failure, off = None, math.inf
        try:
            after, flops = run(model, call)
            off = _off(_output(model, call) if _half(model) else after, before)
        except Exception as error:
            failure = error
        if failure is None and off <= budget(before[0].dtype if before else torch.float32):
            return report.measured(off, flops)
        report.undo()
        if wrong := _wrong(report, model, call):
            report.refuse(wrong)
            continue
        if failure is not None:
            raise ValueError(
                f"{type(model).__name__} does not run with the new layers on {call.about}: {failure}; nothing was "
                "changed"
            ) from failure
        if all(c.row.grade == "exact" for c in report.standing):
            report.weaken(f"the model's output differs by {off:.1g}" if before else "the model's output has no tensor")
        report.apply()
        return report.measured(off, flops)


def _half(model: nn.Module) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def _output(model: nn.Module, call: Call) -> list[Tensor]:
    """What a model makes; in float32 where it computes in half precision."""
    if _half(model):
        return run(copy.deepcopy(model).float(), call.to(torch.float32))[0]
    return run(model, call)[0]


def _off(after: list[Tensor], before: list[Tensor]) -> float:
    if len(after) != len(before) or not before or not any(t.isfinite().any() for t in before if t.numel()):
        return math.inf
    return max(difference(a, b) for a, b in zip(after, before, strict=True))


@torch.no_grad()
def _wrong(report: Report, model: nn.Module, call: Call) -> dict[str, str]:
    """Which new layers do not do, on what the old ones are given, what their rows say."""
    wrong: dict[str, str] = {}
    called: set[str] = set()

    def watching(name: str, grade: str, new: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(copy.deepcopy((args, kwargs)))  # a call may change what it is given, such as a cache

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            called.add(name)
            args, kwargs = given.pop()
            try:
                made, wanted = tensors(new(*args, **kwargs)), tensors(output)
            except Exception as error:
                wrong.setdefault(name, f"does not run on {call.about}: {error}")
                return
            off = max((difference(a, b) for a, b in zip(made, wanted, strict=False)), default=math.inf)
            if grade == "exact" and off > budget(wanted[0].dtype if wanted else torch.float32):
                wrong.setdefault(name, f"its output differs by {off:.1g} on {call.about}: it does something of its own")

        return keep, watch

    with contextlib.ExitStack() as stack:
        for change in report.standing:
            assert change.new is not None
            stack.enter_context(unchanged(change.new))
            keep, watch = watching(change.row.name, change.row.grade, change.new)
            stack.callback(change.old.register_forward_pre_hook(keep, with_kwargs=True).remove)
            stack.callback(change.old.register_forward_hook(watch, with_kwargs=True).remove)
        run(model, call)
    unseen = [
        c.row.name for c in report.standing if not c.proven and c.row.grade == "exact" and c.row.name not in called
    ]
    if unseen:
        report.weaken("not compared: it is not called on these inputs", unseen)
    return wrong
