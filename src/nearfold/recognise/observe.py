"""One run of a model, without arithmetic where that is possible: FLOPs, receptive fields, and which axis a layer mixes.

Every tensor carries two labels. Its field says what a position depends on. Its layout is a tensor of the same shape
that tells for every entry which channel and which position it is; views rearrange it as they rearrange the tensor.
Where an nn.Linear sees the position change along its last axis, it mixes positions: this is a token MLP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from nearfold.grammar.words import All
from nearfold.recognise.blocks import AT_CALL
from nearfold.recognise.field import Field, bounded, join, start, through
from nearfold.recognise.foreign import Found, Unsaid, names_of
from nearfold.recognise.pointwise import is_linear
from nearfold.recognise.walk import Layer

# aten operations that rearrange entries: what they do to a tensor they do to its layout
VIEWS = frozenset(
    (
        "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand", "slice", "select",
        "unsqueeze", "squeeze", "clone", "alias", "detach", "split", "split_with_sizes", "chunk", "unbind", "roll",
        "cat", "stack", "contiguous", "_to_copy", "lift_fresh",
    )
)  # fmt: skip
# aten operations that mix positions, or may: outside of a layer that is known they make its container unknown
MIXING = frozenset(
    (
        "bmm", "baddbmm", "mm", "addmm", "convolution", "roll", "cumsum", "sort", "topk", "grid_sampler_2d",
        "grid_sampler_3d", "deform_conv2d", "im2col", "col2im", "upsample_nearest2d", "upsample_bilinear2d",
        "upsample_bicubic2d", "max_pool2d_with_indices", "avg_pool2d", "avg_pool1d", "_adaptive_avg_pool2d", "_fft_c2c",
        "_fft_r2c", "_fft_c2r", "lstm", "gru",
        *(f"_scaled_dot_product_{name}" for name in (
            "flash_attention_for_cpu", "flash_attention", "efficient_attention", "attention_math", "cudnn_attention",
            "fused_attention_overrideable",
        )),
    )
)  # fmt: skip
# these do where positions lie along the axes they are told; a mean is a pooling that has a word
REDUCTIONS = frozenset(
    (
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "linalg_vector_norm",
        "logsumexp",
        "_softmax",
    )
)
SHIFT = 1 << 32  # a layout's entry is channel * SHIFT + position


@dataclass
class Observation:
    """What a run showed, by the layers' names.

    Attributes:
        flops: multiply and add as two, in the layer, for one input.
        fields: behind the layer.
        linears: what lies along the last axis of an nn.Linear's input: channels, positions, all (every position
            and channel, flattened) or both (positions that were gathered).
        calls: what a call replaces: another `Found`, or the reason why there is none.
        glue: operations that mix positions in the forward of a container itself, by its name.
        means: containers whose own forward takes the mean over positions.
    """

    flops: dict[str, int] = field(default_factory=dict)
    fields: dict[str, Field] = field(default_factory=dict)
    linears: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Found | str] = field(default_factory=dict)
    glue: dict[str, set[str]] = field(default_factory=dict)
    means: list[str] = field(default_factory=list)


def observe(model: nn.Module, layers: list[Layer], input_size: tuple[int, ...], glued: frozenset[str]) -> Observation:
    """Run a model once on one input of this size (without the batch), and watch.

    Args:
        model: left as it is: weights, buffers and modes.
        layers: of `walk`.
        input_size: channels and grid.
        glued: qualified names of containers whose own forward is known.

    Raises:
        ValueError: when the model does not run on that input.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    >>> from nearfold.recognise.walk import walk
    >>> seen = observe(model, walk(model), (3, 8, 8), frozenset())
    >>> seen.flops["0"], str(seen.fields["0"])
    (13824, '3')
    """
    if len(input_size) < 2 or any(type(n) is not int or n < 1 for n in input_size):
        raise ValueError(
            f"input_size must be channels and grid, positive integers such as (3, 224, 224), got {input_size}"
        )
    errors = []
    for device in ("meta", "own"):  # some models look at values, which nothing on meta has
        watch = _Watch(model, layers, input_size, glued)
        try:
            with (
                undisturbed(model),
                watch.hooks(),
                torch.no_grad(),
                FlopCounterMode(display=False) as watch.counter,
                watch,
            ):
                _call(model, input_size, device, watch)
            return watch.seen
        except Exception as error:
            errors.append(error)
    raise ValueError(f"{type(model).__name__} does not run on an input of size {input_size}: {errors[-1]}") from errors[
        -1
    ]


def _call(model: nn.Module, input_size: tuple[int, ...], device: str, watch: _Watch) -> None:
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if device == "own":
        x = torch.zeros(1, *input_size, dtype=first.dtype, device=first.device)
        watch.begin(x)
        model(x)
        return
    x = torch.zeros(1, *input_size, dtype=first.dtype, device="meta")
    watch.begin(x)
    state = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    functional_call(model, state, (x,), tie_weights=True)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no fused path around a layer's parts; afterwards everything is as it was."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training.items():
            module.training = mode


class _Watch(TorchDispatchMode):
    counter: FlopCounterMode

    def __init__(
        self, model: nn.Module, layers: list[Layer], input_size: tuple[int, ...], glued: frozenset[str]
    ) -> None:
        super().__init__()
        self.seen = Observation()
        self.model, self.grid, self.glued = model, input_size[1:], glued
        self.by_module = {layer.modules[0]: layer for layer in layers}
        self.leaves = {module for layer in layers for module in layer.modules if layer.found or not _listed(layer)}
        self.names = {module: name for name, module in model.named_modules()}
        self.folded: set[str] = set()
        self.layouts, self.fields = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.stack: list[tuple[nn.Module, int, Tensor | None, Field | None]] = []

    # --- modules

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, x: Tensor) -> None:
        """Label the model's input."""
        self._layout(x, 1)
        self.fields[x] = start(len(self.grid))

    def _inside(self) -> bool:
        """Whether what runs now belongs to a layer that is listed as a whole."""
        return any(module in self.leaves for module, *_ in self.stack)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fields = [self.fields[t] for t in given if t in self.fields]
        layer = None if self._inside() else self.by_module.get(module)
        if layer is not None and given:
            if is_linear(module):
                self._look(layer.name, given[0])
            for name in names_of(module):
                if layer.found is not None and name in AT_CALL:
                    try:
                        self.seen.calls[layer.name] = AT_CALL[name](module, layer.found, args, kwargs)
                    except Unsaid as why:
                        self.seen.calls[layer.name] = str(why)
            found = self.seen.calls.get(layer.name, layer.found)
            if isinstance(found, Found) and _folds(module, found, given[0]):
                note = "parts of the map are folded into the batch; it looks within each of them"
                self.seen.calls[layer.name] = dataclasses.replace(found, note=note)
                self.folded.add(layer.name)
        came = join(*fields) if fields else None
        self.stack.append((module, self.counter.get_total_flops(), given[0] if given else None, came))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _, before, x, came = self.stack.pop()
        if self._inside():
            return
        name = self.names[module]
        self.seen.flops[name] = self.seen.flops.get(name, 0) + self.counter.get_total_flops() - before
        y = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
        layer = self.by_module.get(module)
        if x is None or y is None or layer is None:
            return
        found = self.seen.calls.get(name, layer.found)
        if is_linear(module):
            self._behind_linear(name, x, y, came)
        elif isinstance(found, Found):
            self._layout(y, found.axis)
            if came is not None and name in self.folded:
                self.fields[y] = join(came, dataclasses.replace(came, kind="?"))
            elif came is not None:
                self.fields[y] = through(came, found.operation)
        elif came is not None and (layer.reason or found):  # unknown
            self.fields[y] = join(came, dataclasses.replace(came, kind="?"))
        if y in self.fields:
            self.seen.fields[name] = bounded(self.fields[y], self.grid)

    # --- nn.Linear

    def _look(self, name: str, x: Tensor) -> None:
        layout = self.layouts.get(x)
        if layout is None or layout.shape[-1] < 2:
            return
        channel, position = layout // SHIFT, layout % SHIFT
        channels = bool((channel != channel[..., :1]).any())
        positions = bool((position != position[..., :1]).any())
        rows = math.prod(layout.shape[1:-1])
        kind = "both" if channels and positions else "positions" if positions else "channels"
        self.seen.linears[name] = "all" if kind == "both" and rows == 1 else kind

    def _behind_linear(self, name: str, x: Tensor, y: Tensor, came: Field | None) -> None:
        kind = self.seen.linears.get(name, "channels")
        if kind == "positions":  # hidden tokens are along the last axis, the channels stay where they were
            channel = (self.layouts[x] // SHIFT)[..., :1]
            self.layouts[y] = channel * SHIFT + torch.arange(y.shape[-1], device="cpu")
        else:
            self._layout(y, -1)
        if came is not None and kind != "channels":
            wide = {"positions": "all", "all": "all", "both": "?"}[kind]
            self.fields[y] = join(came, dataclasses.replace(came, kind=wide))

    # --- tensors

    def _layout(self, t: Tensor, axis: int) -> None:
        """Channels along one axis, and positions numbered along all others."""
        if t.dim() < 2:
            return
        axis %= t.dim()
        shape = [1 if a == axis else n for a, n in enumerate(t.shape)]
        position = torch.arange(math.prod(shape), device="cpu").view(shape)
        channel = torch.arange(t.shape[axis], device="cpu").view([-1 if a == axis else 1 for a in range(t.dim())])
        self.layouts[t] = channel * SHIFT + position

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        fields = [self.fields[t] for t in given if t in self.fields]
        reduces = name in REDUCTIONS and self._over_positions(name, args, kwargs or {})
        mixes = (name in MIXING or reduces) and bool(fields) and not self._inside() and self._in_glue(name)
        for t in made:
            if fields:
                self.fields[t] = join(*fields)
                if mixes:
                    kind = "all" if name == "mean" else "?"
                    self.fields[t] = join(self.fields[t], dataclasses.replace(fields[0], kind=kind))
        if any(t in self.layouts for t in given):
            self._follow(name, func, args, kwargs or {}, given, made)
        return out

    def _in_glue(self, name: str) -> bool:
        """Note an operation of a container's own forward; False where that forward is known."""
        module = self.stack[-1][0] if self.stack else self.model
        if any(n in self.glued for n in names_of(module)):
            return False
        if name == "mean":
            self.seen.means.append(self.names[module])
        else:
            self.seen.glue.setdefault(self.names[module], set()).add(name)
        return True

    def _over_positions(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether positions lie along the axes of a reduction; without any it is over all."""
        layout = self.layouts.get(args[0])
        place = 2 if name == "linalg_vector_norm" else 1  # behind the order of the norm
        given = args[place] if len(args) > place else kwargs.get("dim")
        if layout is None or isinstance(given, Tensor):  # the larger of two tensors is no reduction
            return False
        axes = [given] if isinstance(given, int) else given or range(layout.dim())
        position = layout % SHIFT
        return any(bool((position != position.select(axis, 0).unsqueeze(axis)).any()) for axis in axes)

    def _follow(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        if name in VIEWS:
            with contextlib.suppress(Exception):  # a view that the layout cannot follow leaves the result unlabelled
                args, kwargs = self._swapped((args, {k: v for k, v in kwargs.items() if k != "device"}))
                for t, layout in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                    self.layouts[t] = layout
            return
        for t in made:
            for source in given:
                if t is not source and source in self.layouts and source.shape == t.shape:
                    self.layouts[t] = self.layouts[source]
                    break

    def _swapped(self, tree: Any) -> Any:
        """The same arguments with layouts for tensors; what has none, such as a class token, is one channel."""

        def swap(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            layout = self.layouts.get(t)
            return torch.zeros(t.shape, dtype=torch.long, device="cpu") if layout is None else layout.contiguous()

        return torch.utils._pytree.tree_map(swap, tree)


def _folds(module: nn.Module, found: Found, x: Tensor) -> bool:
    """Whether a layer that looks everywhere is given several parts of the one input as a batch."""
    batch = 1 if isinstance(module, nn.MultiheadAttention) and not module.batch_first else 0
    everywhere = any(isinstance(part.path, All) for part in found.operation.parts)
    return everywhere and x.dim() > 2 and x.shape[batch] != 1


def _listed(layer: Layer) -> bool:
    """Whether a layer's parts are listed on their own as well."""
    return bool(layer.reason) and any(True for _ in layer.modules[0].children())
