"""`Mixer`: the general layer over any operation. It owns parameters; the meaning lives in `nearfold.lower`."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn

from nearfold._kept import once
from nearfold._numbers import flag, integer, shown
from nearfold.grammar import Operation
from nearfold.kernels.names import require_tensors
from nearfold.lower.extent import unfilled
from nearfold.lower.parameters import Parameter, parameters, part_of
from nearfold.lower.plan import Context, run
from nearfold.lower.plan import operation as as_operation
from nearfold.nn.draws import Draws


def _initial(spec: Parameter) -> Tensor:
    kind, _, number = spec.init.partition(":")
    tensor = torch.empty(spec.shape)
    if kind == "uniform":  # as nn.Linear and nn.Conv2d do
        bound = 1 / math.sqrt(spec.fan_in)
        return tensor.uniform_(-bound, bound)
    if kind == "constant":
        return tensor.fill_(float(number))
    if kind == "normal":
        return tensor.normal_(0, float(number))
    if kind == "decay":  # A = -1, -2 ... along the state, or the heads (arXiv 2312.00752, 3.6)
        return torch.arange(1, spec.shape[-1] + 1).log().expand(spec.shape).clone()
    if kind == "step":  # softplus of it is uniform in its logarithm between 0.001 and 0.1
        step = torch.exp(tensor.uniform_(math.log(1e-3), math.log(1e-1)))
        return step + torch.log(-torch.expm1(-step))
    if kind == "log_step":  # its exponential lies between 0.001 and 0.1, uniform in its logarithm
        return tensor.uniform_(math.log(1e-3), math.log(1e-1))
    if kind == "harmonics":  # pi n along the last axis (S4D-Lin, arXiv 2206.11893)
        return (math.pi * torch.arange(spec.shape[-1])).expand(spec.shape).clone()
    if kind == "rays":  # groups go off in different directions, point by point (arXiv 2010.04159, A.1)
        levels, points, axes = map(int, number.split(","))
        groups = len(tensor) // (levels * points * axes)
        angle = torch.arange(groups) * (2 * math.pi / groups)
        ray = torch.stack([angle.sin(), angle.cos()], -1) if axes > 1 else angle.cos().sign()[:, None]
        ray = torch.nn.functional.pad(ray / ray.abs().amax(-1, keepdim=True).clamp(min=0.5), (max(0, axes - 2), 0))
        return (torch.arange(1.0, points + 1)[:, None] * ray[:, None, None]).expand(-1, levels, -1, -1).flatten()
    assert kind == "shift"
    slots = math.prod(spec.shape[2:])
    return torch.eye(slots).reshape(spec.shape[1:]).expand(spec.shape).clone()


def register_dotted(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, attribute = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(attribute, nn.Parameter(tensor))


@once
def _route(name: str) -> tuple[list[str], str]:
    """The modules on the way to a parameter of this dotted name, and what it is called in the last one."""
    *path, attribute = name.split(".")
    return path, attribute


def _searches(op: Operation) -> bool:
    """Whether some part of an operation searches."""
    return any(part.path.searches for part in op.parts)


def _projects(op: Operation) -> bool:
    """Whether some part searches by projected queries or keys."""
    return any(part.path.searches and set("qk") & set(part.weight.projections) for part in op.parts)


def _draws(op: Operation) -> bool:
    """Whether an operation draws candidates in training."""
    return any(part.path.draws for part in op.parts)


MEANT = {
    "kernel_size": ("k", "block_size", "size"),
    "k": ("kernel_size", "block_size"),
    "window_size": ("kernel_size", "block_size", "window"),
    "heads": ("num_heads",),
    "n_heads": ("num_heads",),
    "nhead": ("num_heads",),
    "dim": ("embed_dim", "channels", "in_channels"),
    "d_model": ("embed_dim", "channels", "in_channels"),
    "num_neighbors": ("k",),
    "neighbors": ("k",),
    "op": ("operation",),
}
"""What other libraries call an argument, and what it may be called here."""


def _new_sampler() -> Tensor:
    """(seed, draws) of a layer's own generator."""
    return torch.tensor([int(torch.randint(2**31, (1,), device="cpu")), 0])


class Mixer(nn.Module):
    """Any operation as a layer: (B, in_channels, *grid) -> (B, out_channels, *out_grid).

    Args:
        operation: an `Operation` or its notation.
        in_channels: channels of the input.
        out_channels: channels of the output; default in_channels.
        ndim: grid axes (1 sequence, 2 image, 3 volume).
        bias: learned biases on projections and kernels.
        backend: "auto", or a backend's name, which then never falls back.
        context_channels: channels of the second input of `cross` paths; default in_channels.

    Parameters keep torch's layout and names where torch has them: a window kernel loads nn.Conv2d's state dict.
    Any grid size, a new one at every call; dtype and device follow the input,
    which must have the parameters' dtype unless autocast is on. With random candidates the buffer
    ``sampler`` (seed, draws) is the layer's own generator; it draws in training only.

    >>> layer = Mixer("nearest(9, cosine) | ranked | kernel", 8, 16)
    >>> layer(torch.randn(2, 8, 5, 7)).shape
    torch.Size([2, 16, 5, 7])
    """

    sampler: Tensor | None
    _told = False  # whether it was said already that not all slots can be filled
    _seen: tuple[Any, ...] = ()  # the shape and dtype that `_require` has found to be right
    elsewhere: ClassVar[Mapping[str, str]] = {}  # what a layer has no argument for: the operation that says it
    precise = False  # whether its searches compare float32 under low precision: `select_in_float32`
    takes_one = False  # whether inputs without a batch axis are taken: where it stands for a layer that takes them

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """Before anything is made: an argument that the layer does not have is an error that names the one meant."""
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        for name in named:
            if name in cls.elsewhere:
                raise TypeError(
                    f"{cls.__name__} has no argument {name!r}: say it to Mixer by an operation, such as "
                    f"{cls.elsewhere[name]}"
                )
            if name not in known:
                meant = [s for s in MEANT.get(name, ()) if s in known] or difflib.get_close_matches(name, known, 1)
                hint = f"; here it is {meant[0]}" if meant else ""
                raise TypeError(f"{cls.__name__} has no argument {name!r}{hint}. It takes: {', '.join(known)}")
        return super().__new__(cls)

    def __init__(
        self,
        operation: Operation | str,
        in_channels: int,
        out_channels: int | None = None,
        *,
        ndim: int = 2,
        bias: bool = True,
        backend: str = "auto",
        context_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.operation = as_operation(operation)
        self.in_channels = integer("in_channels", in_channels)
        self.out_channels = self.in_channels if out_channels is None else integer("out_channels", out_channels)
        self.made_channels = self.out_channels  # what the operation makes, before any shuffling
        self.ndim, self.backend = integer("ndim", ndim), backend
        if not isinstance(backend, str):
            raise ValueError(f"backend must be 'auto' or a backend's name, got {shown(backend)}")
        self.context_channels = (
            self.in_channels if context_channels is None else integer("context_channels", context_channels)
        )
        self._between = (self.in_channels, self.out_channels, self.ndim, flag("bias", bias), self.context_channels)
        self._specs = self._stored = parameters(self.operation, *self._between)
        self._searches = _searches(self.operation)
        for name, spec in self._specs.items():
            register_dotted(self, name, _initial(spec))
        self.register_buffer("sampler", _new_sampler() if _draws(self.operation) else None)
        self._draws = Draws()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        with torch.no_grad():
            for name, spec in self._stored.items():
                self.get_parameter(name).copy_(_initial(spec))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by the names that `nearfold.lower` knows; parts of them, where there is room for more."""
        found = {}
        for name, spec in self._specs.items():
            tensor = self._tensor(name)
            found[name] = tensor if tensor.shape == spec.shape else part_of(self.operation, name, tensor, spec.shape)
        return found

    def _tensor(self, name: str) -> Tensor:
        owner: nn.Module = self
        path, attribute = _route(name)
        for part in path:
            owner = owner._modules[part]  # type: ignore[assignment]
        tensor = owner._parameters.get(attribute)
        return getattr(owner, attribute) if tensor is None else tensor  # one that is computed: pruned, parametrized

    def parameters_of(self, operation: Operation) -> dict[str, Parameter]:
        """What another operation between the same channels would own.

        Raises:
            ValueError: when it cannot work with these channels.
        """
        return parameters(operation, *self._between)

    def reserve(self, *operations: Operation | str) -> None:
        """Make room for other operations, which `become` may then switch to; new numbers start as new layers do.

        The parameters grow to hold those of every operation, and keep the values that they have where the layer's own
        operation reads them. Do this before an optimizer sees them.

        Raises:
            ValueError: for an operation whose parameters are of another kind.
        """
        for given in operations:
            op = as_operation(given)
            for name, spec in self.parameters_of(op).items():
                have = self._stored.get(name)
                if have is None:
                    register_dotted(self, name, self._like(_initial(spec)))
                    self._stored = self._stored | {name: spec}
                    continue
                if len(have.shape) != len(spec.shape):
                    raise ValueError(f"{op}: its {name} {spec.shape} and that of {self.operation} {have.shape} differ")
                shape = tuple(map(max, have.shape, spec.shape))
                if shape != have.shape:
                    self._grow(op, name, replace(spec, shape=shape, fan_in=max(have.fan_in, spec.fan_in)))
            if _draws(op) and self.sampler is None:
                self.sampler = _new_sampler().to(next(iter(self.tensors().values())).device)

    @property
    def room(self) -> dict[str, Parameter]:
        """Every parameter that the layer has: of its operation, and of those that it has room for."""
        return dict(self._stored)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that a decay of weights should leave alone, beside biases.

        >>> sorted(Mixer("scan(state=4) | causal | selective", 8, ndim=1).no_weight_decay())
        ['A_log', 'D', 'dt_proj_bias']
        """
        return {name for name, spec in self._stored.items() if not spec.decays}

    def hold(self, room: dict[str, Parameter]) -> None:
        """Have the parameters of another layer's `room`, with any values: state to load follows."""
        for name, spec in room.items():
            register_dotted(self, name, self._like(torch.empty(spec.shape)))
        self._stored = dict(room)

    def become(self, operation: Operation | str) -> None:
        """Switch to an operation whose parameters are among those that the layer has; see `reserve`.

        Raises:
            ValueError: when there is no room for it. The layer is then as it was.

        >>> layer = Mixer("nearest(9, blend(0), self) | ranked | kernel", 4)
        >>> layer.become("nearest(5, blend(0.7), self) | ranked | kernel")
        >>> layer.weight.shape, layer.tensors()["weight"].shape
        (torch.Size([4, 4, 9]), torch.Size([4, 4, 5]))
        """
        op = as_operation(operation)
        specs = self.parameters_of(op)
        for name, spec in specs.items():
            have = self._stored.get(name)
            fits = have is not None and len(have.shape) == len(spec.shape)
            if have is None or not fits or any(n > m for n, m in zip(spec.shape, have.shape, strict=True)):
                there = "none" if have is None else have.shape
                raise ValueError(
                    f"{op} needs {name} of shape {spec.shape}, and the layer has {there}: call reserve({str(op)!r}) "
                    "before it is trained"
                )
        if _draws(op) and self.sampler is None:
            raise ValueError(f"{op} draws candidates, and the layer has no sampler: call reserve({str(op)!r}) first")
        self.operation, self._specs, self._searches = op, specs, _searches(op)

    def _like(self, tensor: Tensor) -> Tensor:
        own = next(self.parameters(), tensor)
        return tensor.to(own.device, own.dtype)

    @torch.no_grad()
    def _grow(self, op: Operation, name: str, spec: Parameter) -> None:
        old = self.get_parameter(name)
        new = self._like(_initial(spec))
        part_of(op, name, new, tuple(old.shape)).copy_(old)
        register_dotted(self, name, new)
        self.get_parameter(name).requires_grad_(old.requires_grad)
        self._stored = self._stored | {name: spec}

    def forward(self, x: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, in_channels, *grid) -> (B, out_channels, *out_grid).

        ``context`` (B, context_channels, *any grid) is the second input of an operation with a `cross` path, or a list
        of them for one with ``levels`` (their ``mask`` is (B, positions of all)). ``mask``
        says which keys there are, those of the context where there is one: bool (B, N) or (B, *grid), or on sequences
        the integers (B,) of their lengths. Others are as outside the border: no slot reads them, whatever x holds
        there. Or of pairs of query and key, (B|1, heads|1, N, N'): bool, True where a query may read a key, or floating
        point, added to the scores; for the paths `all`, `nearest` and those of fixed positions.
        """
        if isinstance(x, fx.Proxy):
            return self._leaf(x, context, mask)
        if self.takes_one and x.dim() == self.ndim + 1:
            assert context is None or isinstance(context, Tensor)
            return Mixer.forward(self, x[None], None if context is None else context[None], mask)[0]
        self._require(x)
        return self._run(x, context, mask)

    def _say(self, x: Tensor, context: Context | None) -> None:
        """Once for a layer: that it asks for more neighbours than there are."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a look at the sizes would tie the graph to them
            return
        found = unfilled(self.operation, x.shape[2:], context.shape[2:] if isinstance(context, Tensor) else None)
        if found:
            self._told = True
            warnings.warn("; ".join(found), stacklevel=3)

    def _leaf(self, x: fx.Proxy, *others: Any) -> Any:
        """One call of the whole layer, in a graph that torch.fx records: as torch's own layers are."""
        given = (x, *others)
        while given[-1] is None:
            given = given[:-1]
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), given, {})  # type: ignore[attr-defined]

    def prepare(self, x: Tensor) -> Tensor:
        """What the operation itself is applied to, for an input of the layer: (B, channels, *grid)."""
        return x

    def _run(self, x: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Tensor:
        for one in context if isinstance(context, (list, tuple)) else () if context is None else (context,):
            require_tensors(context=one)
            if one.dim() > 1 and one.shape[1] != self.context_channels:
                raise ValueError(
                    f"context must have context_channels={self.context_channels} for this layer, got {tuple(one.shape)}"
                )
        if self._searches and not self._told:
            self._say(x, context)
        draw = None
        if self.training and self.sampler is not None:
            draw = self._draws.next(self.sampler)
        params = self.tensors()
        self._require_dtype(x, params)
        return run(self.operation, params, x, self.made_channels, self.backend, draw, context, mask, self.precise)

    def _require(self, x: Tensor) -> None:
        """ValueError where x is no input of this layer."""
        compiling = torch.compiler.is_compiling()
        if not compiling and isinstance(x, Tensor) and (x.shape, x.dtype) == self._seen:
            return
        require_tensors(x=x)
        if x.dim() != self.ndim + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("HWD"[: self.ndim]) if self.ndim > 1 else "N"
            raise ValueError(
                f"x must be (B, {self.in_channels}, {axes}) for this layer (in_channels={self.in_channels}, "
                f"ndim={self.ndim}), got shape {tuple(x.shape)}"
            )
        self._require_dtype(x, self.tensors())
        if not compiling:
            self._seen = (x.shape, x.dtype)

    def _require_dtype(self, x: Tensor, params: dict[str, Tensor]) -> None:
        own = next(iter(params.values()), x).dtype
        if own == x.dtype:
            return
        kind = x.device.type
        if x.is_floating_point() and (kind == "meta" or not torch.is_autocast_enabled(kind)):
            raise ValueError(
                f"x is {x.dtype}, but the layer's parameters are {own}; convert one with .to(dtype) or use autocast"
            )

    def extra_repr(self) -> str:
        """The notation and the channels."""
        backend = "" if self.backend == "auto" else f", backend={self.backend}"
        return f"{self.operation}, {self.in_channels}, {self.out_channels}, ndim={self.ndim}{backend}"


def select_in_float32(model: nn.Module, on: bool = True) -> int:
    """Have searches compare float32 queries and keys where the rest of a layer is bfloat16 or float16.

    Scores are sums in float32 always. What low precision rounds before them is the input, and, where an operation has
    projections, queries and keys, so that near neighbours change places; this leaves queries and keys unrounded, under
    autocast and in a model of low precision. A layer that searches by its input itself (`ConvNN2d`) has none, and
    nothing changes there; an indexer has its own. docs/export.md has the effect, measured.

    Args:
        model: any network with layers of this library.
        on: False goes back.

    Returns:
        How many layers have such a search.

    Raises:
        ValueError: none has.

    >>> net = nn.Sequential(TokenMixer("nearest(3, scaled) | ranked | softmax(heads=2)", 8)).bfloat16()
    >>> select_in_float32(net)
    1
    >>> net(torch.zeros(1, 5, 8, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """
    found = [m for m in model.modules() if isinstance(m, Mixer) and _projects(m.operation)]
    if not found:
        raise ValueError("model: no layer searches by projected queries and keys, so that none would be another")
    for layer in found:
        layer.precise = flag("on", on)
    return len(found)


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters, of all our layers in a model, that a decay of weights should leave alone.

    Tables of relative positions, learned tokens, rates, a learned lambda, the constants of a recurrence. Biases and all
    other vectors are not listed but where they are one of these: training loops know them by their axes.

    Args:
        model: any network, such as one that was converted.

    >>> swin = nn.Sequential(Mixer("block(4, scaled(bias=table)) | box | softmax(heads=2)", 8), nn.Linear(8, 8))
    >>> no_weight_decay(swin)
    {'0.relative_bias'}

    To timm: ``timm.optim.param_groups_weight_decay(swin, 0.05, no_weight_decay_list=no_weight_decay(swin))``.
    """
    layers = [(f"{name}." if name else "", m) for name, m in model.named_modules() if isinstance(m, Mixer)]
    return {prefix + name for prefix, layer in layers for name in layer.no_weight_decay()}


class TokenMixer(Mixer):
    """The same over sequences of tokens: (B, N, D) -> (B, N, D)."""

    def __init__(
        self,
        operation: Operation | str,
        embed_dim: int,
        *,
        bias: bool = True,
        backend: str = "auto",
        context_dim: int | None = None,
    ) -> None:
        super().__init__(
            operation, embed_dim, embed_dim, ndim=1, bias=bias, backend=backend, context_channels=context_dim
        )

    def forward(self, x: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); context (B, N', context_dim) where the operation is `cross`; mask as in `Mixer`.

        A nested tensor (torch.jagged, B sequences of their own lengths) gives a nested tensor.
        """
        if isinstance(x, fx.Proxy):
            return self._leaf(x, context, mask)
        require_tensors(**({"x": x} if context is None else {"x": x, "context": context}))
        assert context is None or isinstance(context, Tensor)
        if x.is_nested:
            return self._ragged(x, context, mask)
        if self.takes_one and x.dim() == 2:
            return self(x[None], None if context is None else context[None], mask)[0]
        if x.dim() != 3 or x.shape[2] != self.in_channels:
            raise ValueError(f"x must be (B, N, {self.in_channels}) for this layer, got shape {tuple(x.shape)}")
        if context is not None and (context.dim() != 3 or context.shape[2] != self.context_channels):
            raise ValueError(
                f"context must be (B, N, {self.context_channels}) for this layer, got shape {tuple(context.shape)}"
            )
        context = None if context is None else self.prepare(context)
        return super().forward(self.prepare(x), context, mask).transpose(1, 2)

    def _ragged(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Sequences of their own lengths, as one batch under the mask of their lengths."""
        if x.layout != torch.jagged or context is not None or mask is not None or x.dim() != 3:
            raise ValueError(
                "a nested x must be of layout torch.jagged, (B, lengths, channels), and come without context and mask; "
                f"got layout {x.layout} and {x.dim()} axes"
            )
        offsets: Tensor = x.offsets()  # type: ignore[attr-defined]
        lengths = offsets.diff()
        y = self(x.to_padded_tensor(0.0), mask=lengths)
        if y.shape[1] != int(lengths.max()):
            raise ValueError(f"{self.operation}: strides make other sequences; take them one by one")
        there = torch.arange(y.shape[1], device=y.device) < lengths[:, None]
        return torch.nested.nested_tensor_from_jagged(y[there], offsets)

    def prepare(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D, N)."""
        return x.transpose(1, 2)
