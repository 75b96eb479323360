"""Running a model to look at it, which leaves it as it is: what runs is a copy."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

T = TypeVar("T")


def trial(
    model: nn.Module, input_size: tuple[int, ...] | None, inputs: dict[str, Any] | None, run: Callable[..., T]
) -> T:
    """Run a copy of a model: on the meta device, without arithmetic, or where that fails on the model's own.

    The copy is in evaluation mode and takes no fused path around a layer's parts. It shares nothing that a run
    changes: buffers, counters, what a module keeps in attributes. Random numbers go on as if it had not run. Hooks
    that the model has run with it.

    Args:
        model: left as it is.
        input_size: channels and grid.
        inputs: instead of it, the model's arguments by name.
        run: called with the copy, a dict from the model's modules to the copy's, and the positional and named arguments
            of the call; it makes the call.

    Raises:
        ValueError: when the model does not run on such an input.
    """
    if inputs is None:
        check_size(input_size)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    errors = []
    for device in (torch.device("meta"), first.device):  # some models look at values, which nothing on meta has
        try:
            twin, modules = copied(model, device)
            args: tuple[Any, ...] = ()
            if inputs is None:
                args = (torch.zeros(1, *(input_size or ()), dtype=first.dtype, device=device),)
            given = tree_map(lambda t, to=device: t.to(to) if isinstance(t, Tensor) else t, inputs or {})
            with quiet(first.device), torch.no_grad():
                return run(twin, modules, args, given)
        except Exception as error:
            errors.append(error)
    what = f"an input of size {input_size}" if inputs is None else f"the inputs {', '.join(inputs)}"
    raise ValueError(f"{type(model).__name__} does not run on {what}: {errors[-1]}") from errors[-1]


def check_size(input_size: tuple[int, ...] | None) -> None:
    """Raise ValueError unless it is channels and grid."""
    sized = isinstance(input_size, tuple | list) and len(input_size) >= 2
    if not sized or any(type(n) is not int or n < 1 for n in input_size or ()):
        raise ValueError(
            f"input_size must be channels and grid, positive integers such as (3, 224, 224), got {input_size}"
        )


def copied(model: nn.Module, device: torch.device) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy in evaluation mode, and which module of it is which; what cannot be copied, such as a lock, is shared.

    >>> twin, modules = copied(nn.Sequential(nn.Linear(2, 2)), torch.device("meta"))
    >>> twin[0].weight.device.type
    'meta'
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and id(t) not in memo:
                memo[id(t)] = _moved(t, device)
    tried: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules") or id(value) in memo or id(value) in tried:
                continue
            tried.add(id(value))
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
            elif not _copies(value, memo):
                memo[id(value)] = value
    twin = copy.deepcopy(model, memo)
    twin.eval()
    twin.requires_grad_(False)  # the FLOP counter would follow gradients that no run here makes
    return twin, dict(zip(model.modules(), twin.modules(), strict=True))


def _copies(value: Any, memo: dict[int, Any]) -> bool:
    if value is None or isinstance(value, bool | int | float | str):
        return True
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def _moved(t: Tensor, device: torch.device) -> Tensor:
    if nn.parameter.is_lazy(t):
        return copy.deepcopy(t)
    data = t.detach().to(device) if device.type == "meta" else t.detach().clone()
    return nn.Parameter(data, t.requires_grad) if isinstance(t, nn.Parameter) else data


@contextlib.contextmanager
def undrawn(device: torch.device | None = None, seed: int | None = None) -> Iterator[None]:
    """Random numbers of Python and of torch afterwards as if none had been drawn.

    Args:
        device: whose generator is kept, next to those of the CPU and of CUDA where that is in use.
        seed: from which torch's start within.

    >>> with undrawn(seed=1):
    ...     first = torch.rand(1), random.random()
    >>> with undrawn(seed=1):
    ...     second = torch.rand(1), random.random()
    >>> first == second
    True
    """
    kinds: dict[str, list[Any]] = {
        "cuda": list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    }
    if device is not None and device.type not in ("cpu", "meta", "cuda"):
        kinds[device.type] = [device]
    python = random.getstate()
    try:
        with contextlib.ExitStack() as stack:
            for kind, devices in kinds.items():
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)


@contextlib.contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Random numbers and torch's fused attention afterwards as they were; within, the latter is off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with undrawn(device):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
