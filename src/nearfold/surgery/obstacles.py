"""What would be lost with a layer: reasons not to replace it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a full backward pre-hook",
    "_backward_hooks": "a backward hook",
    "_state_dict_pre_hooks": "a state-dict pre-hook",
    "_state_dict_hooks": "a state-dict hook",
    "_load_state_dict_pre_hooks": "a pre-hook of load_state_dict",
    "_load_state_dict_post_hooks": "a post-hook of load_state_dict",
}
WEIGHT_HOOKS = {"_backward_hooks": "a gradient hook", "_post_accumulate_grad_hooks": "a post-accumulate-grad hook"}
HARMLESS = frozenset(
    (
        "__init__", "__doc__", "__module__", "__qualname__", "__repr__", "__str__", "__annotations__", "__constants__",
        "__firstlineno__", "__static_attributes__", "__orig_bases__", "__parameters__", "__dict__", "__weakref__",
        "__annotate__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl", "extra_repr",
        "reset_parameters",
    )
)  # fmt: skip
"""What a subclass may define anew without doing something else in its forward."""
LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.", "transformers.", "nearfold.")


class Surroundings:
    """What the rest of a model has to do with the parts of a layer: seen once, before anything is replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        self.stored: dict[int, list[tuple[int, int, int, str]]] = defaultdict(list)
        self.held: dict[nn.Module, str] = {}
        for name, module in model.named_modules():
            for own, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is None or isinstance(tensor, UninitializedParameter):
                    continue
                label = f"{name}.{own}".lstrip(".")
                self.owners[id(tensor)].append((module, label))
                if span := _span(tensor):
                    self.stored[span[0]].append((span[1], span[2], id(tensor), label))
            for key, value in vars(module).items():
                if key not in ("_modules", "_parameters", "_buffers"):
                    for leaf in tree_leaves(value):
                        other = leaf if isinstance(leaf, nn.Module) else getattr(leaf, "__self__", None)
                        if isinstance(other, nn.Module) and other is not module:
                            self.held[other] = f"{name}.{key}".lstrip(".")

    def obstacle(self, layer: nn.Module, place: nn.Module, ran: bool = False) -> str:
        """Why a layer cannot be replaced, with the block that calls it, without a loss; empty where it can.

        Args:
            layer: the layer.
            place: what is exchanged: the layer, or that block.
            ran: whether it is known by what it computed and not by its class.
        """
        return next(self._obstacles(layer, place, ran), "")

    def _obstacles(self, layer: nn.Module, place: nn.Module, ran: bool) -> Iterator[str]:
        inside = set(layer.modules())
        around = [] if place in inside else [("block", place)]
        for name, module in (*layer.named_modules(), *around):
            whose = f"its {name} has" if name else "it has"
            if parametrize.is_parametrized(module):
                yield f"{whose} parametrizations, which would be lost"
            for attribute, what in HOOKS.items():
                if hooks := getattr(module, attribute, None):
                    yield f"{whose} {what} ({_called(next(iter(hooks.values())))}), which would be lost"
            if reason := own_ways(module, ran):
                yield f"its {name} {reason}" if name else f"it {reason}"
            if module in self.held:
                yield f"it is held in {self.held[module]}, too, which is not registered: it would stay in use there"
            if type(module).__module__.startswith("torch.nn.") and module._buffers:
                yield f"{whose} a buffer that its class does not have ({next(iter(module._buffers))})"
        for name, tensor in layer.named_parameters():
            yield from self._obstacles_of_weight(name, tensor, inside)

    def _obstacles_of_weight(self, name: str, tensor: Tensor, inside: set[nn.Module]) -> Iterator[str]:
        if type(tensor) is not nn.Parameter or not tensor.is_floating_point():
            yield f"its {name} is a {type(tensor).__name__} of {tensor.dtype}; the words take floating-point weights"
        for attribute, what in WEIGHT_HOOKS.items():
            if hooks := getattr(tensor, attribute, None):
                yield f"its {name} has {what} ({_called(next(iter(hooks.values())))}), which would be lost"
        if _node_hooks(tensor):
            yield f"its {name} has a hook on its gradient's accumulation, which would be lost"
        owners = self.owners[id(tensor)]
        outside = [label for module, label in owners if module not in inside]
        if outside or len(owners) > 1:
            yield f"its {name} is tied: it is also {(outside or [owners[-1][1]])[0]}, and would no longer be"
        if span := _span(tensor):
            storage, first, last = span
            for start, end, other, label in self.stored[storage]:
                if other != id(tensor) and start < last and first < end:
                    yield f"its {name} shares memory with {label}, and would no longer"


def _span(tensor: Tensor) -> tuple[int, int, int] | None:
    """Where a tensor's numbers lie: the storage, and the first and last byte there."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or not tensor.numel():
        return None
    first = tensor.storage_offset()
    last = first + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), int(first) * tensor.itemsize, int(last) * tensor.itemsize


def _called(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def _node_hooks(parameter: Tensor) -> bool:
    """Whether the node that accumulates a gradient has hooks; it lists them only to one who hooks on."""
    if not parameter.requires_grad:
        return False
    with torch.enable_grad():
        made = parameter.expand_as(parameter).grad_fn
    assert made is not None
    node = made.next_functions[0][0]
    assert node is not None
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *grads: None)
        others = len(handle.hooks_dict_ref() or {}) - 1
        handle.remove()
        if others:
            return True
    return False


def own_ways(module: nn.Module, ran: bool = False) -> str:
    """What an object or its class does in a way of its own, so that what is known of its base may not hold.

    A forward that ``ran`` in comparison is known, where the class is of no library.

    >>> class Doubled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> own_ways(Doubled(1, 1)), own_ways(nn.Linear(1, 1))
    ('is a Doubled, which has a forward of its own', '')
    """
    own = type(module)
    for name, value in vars(module).items():
        if callable(value) and callable(getattr(own, name, None)):
            return f"has a {name} of its own, set on this one object"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled"
    mro = own.__mro__
    base = next(cls for cls in mro if cls.__module__.startswith("torch.nn.modules."))
    if base is nn.Module:
        base = next(cls for cls in mro if f"{cls.__module__}.".startswith(LIBRARIES))
    known = set(dir(base)) | module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    known -= {"forward"} if ran and base is nn.Module else set()
    for cls in mro[: mro.index(base)]:
        changed = sorted((vars(cls).keys() & known) - HARMLESS, key=lambda name: (name != "forward", name))
        if changed:
            return f"is a {own.__name__}, which has a {changed[0]} of its own"
    return ""


@contextlib.contextmanager
def tracked(module: nn.Module) -> Iterator[None]:
    """Autograd follows every parameter of a module, frozen ones too: from a tensor back to those it is made of."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        with torch.enable_grad():
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def made_of(tensor: Tensor) -> set[Tensor]:
    """The parameters that a tensor was made of under `tracked`."""
    variables: set[Tensor] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            variables |= {node.variable} if hasattr(node, "variable") else set()
            todo += [following for following, _ in node.next_functions]
    return variables
