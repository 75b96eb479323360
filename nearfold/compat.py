"""Layers of the public ConvNN and ACmix code, by class name, constructor arguments and weights.

`from_reference` returns a `ReferenceLayer`: it holds the public layer's parameters under their own names, so that
its state dict goes both ways and every gradient is the one the public code would see, and computes with a Nearfold
layer; `ReferenceLayer.to_nearfold` hands that layer out with the weights copied. Where the public code is at fault,
an explicit option of the operation reproduces it, or `UnsupportedReference` says why not.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import Basic, Branch, Operation, Weight
from nearfold.grammar.similarity import Blend, Cosine, Euclidean, Scaled, Similarity
from nearfold.grammar.words import (
    All,
    AllCandidates,
    Box,
    Candidates,
    Dense,
    Depthwise,
    Grid,
    Identity,
    Inverse,
    Kernel,
    Nearest,
    Ranked,
    Rho,
    Row,
    Separable,
    Softmax,
    Strided,
    Window,
)
from nearfold.nn.layers import ConvNN1d, ConvNN2d, _acmix
from nearfold.nn.mixer import Mixer, TokenMixer

State = dict[str, Tensor]


class UnsupportedReference(ValueError):
    """The public layer is at fault for this configuration or input, and the fault is not reproduced."""


@dataclass(frozen=True)
class Conversion:
    """A Nearfold layer, how its parameters come from the public ones, and which inputs are refused."""

    layer: Mixer
    mapping: Callable[[State], State]
    check: Callable[[Tensor], None] = lambda x: None
    after: Callable[[Tensor, State], Tensor] | None = None  # a fault that no operation expresses


class _Read(dict[str, Tensor]):
    """A state that remembers which tensors were asked for."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


class ReferenceLayer(nn.Module):
    """The public layer's parameters (same names and shapes), computed by a Nearfold layer."""

    def __init__(self, conversion: Conversion, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner: nn.Module = self
            *path, attribute = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(attribute, nn.Parameter(tensor.detach().clone()))
        # kept out of the module tree: its own parameters are never used
        self._conversion = (conversion,)
        self._names = tuple(state)
        read = _Read(state)
        conversion.mapping(read)  # names and shapes are checked now, not at the first call
        self._mapped()
        unread = [name for name in state if name not in read.names]
        if unread:
            raise ValueError(f"state has {', '.join(unread)}, which config does not; pass the state dict alone")

    def _state(self) -> State:
        # by attribute: torch.func.functional_call puts plain tensors in the parameters' place
        return {name: functools.reduce(getattr, name.split("."), self) for name in self._names}  # type: ignore[misc]

    def _mapped(self) -> State:
        mapped = self._conversion[0].mapping(self._state())
        wanted = {name: tuple(p.shape) for name, p in self._conversion[0].layer.named_parameters()}
        got = {name: tuple(p.shape) for name, p in mapped.items()}
        if wanted != got:
            wrong = sorted(n for n in wanted.keys() | got.keys() if wanted.get(n) != got.get(n))
            detail = ", ".join(f"{n}: expected {wanted.get(n)}, got {got.get(n)}" for n in wrong)
            raise ValueError(f"state does not fit config ({detail}); pass the state dict of the same layer")
        return mapped

    def forward(self, x: Tensor) -> Tensor:
        """What the public layer maps: images, sequences (B, C, N) or tokens (B, N, D)."""
        conversion = self._conversion[0]
        conversion.check(x)
        y: Tensor = torch.func.functional_call(conversion.layer, self._mapped(), (x,))
        if conversion.after is None:
            return y
        return conversion.after(y, self._state())

    def to_nearfold(self) -> Mixer:
        """The Nearfold layer itself, weights copied; it no longer follows this module's parameters.

        Raises:
            UnsupportedReference: where the public layer does something no operation expresses.
        """
        if self._conversion[0].after is not None:
            raise UnsupportedReference(
                "with several heads the public ConvNN attention mixes up positions and channels when it puts the "
                "heads together; no operation does that, so the weights only work in this ReferenceLayer"
            )
        layer = copy.deepcopy(self._conversion[0].layer)
        mapped = self._mapped()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.data = mapped[name].detach().clone()
        return layer


def from_reference(layer: str, config: dict[str, Any], state: State) -> ReferenceLayer:
    """Build our layer from a public one.

    Args:
        layer: class name: one of `LAYERS`.
        config: its constructor arguments.
        state: its state dict.

    Raises:
        UnsupportedReference: for a fault of the public code that is not reproduced, with the reason.
        ValueError: for an unknown layer, missing arguments, or a state that does not fit.

    >>> state = {f"W_{c}.weight": torch.randn(8, 8) for c in "qkvo"}
    >>> config = {"d_hidden": 8, "num_heads": 2, "attention_dropout": 0.0}
    >>> from_reference("MultiHeadAttention", config, state)(torch.randn(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """
    if layer not in LAYERS:
        raise ValueError(f"layer={layer!r} is not known; choose from: {', '.join(LAYERS)}")
    try:
        return ReferenceLayer(LAYERS[layer](_Config(layer, config), state), state)
    except KeyError as e:
        raise ValueError(f"state of {layer} lacks {e.args[0]!r}; it has: {', '.join(state)}") from None
    except RuntimeError as e:  # shapes that do not multiply
        raise ValueError(f"state of {layer} does not fit config ({e})") from e


class _Config:
    """Constructor arguments, with a clear error for the missing ones."""

    def __init__(self, layer: str, values: dict[str, Any]) -> None:
        self.layer, self.values = layer, values

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"config of {self.layer} lacks {name!r}; it has: {', '.join(self.values)}")
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def choose(self, name: str, choices: dict[str, Any]) -> Any:
        if self[name] not in choices:
            raise ValueError(f"config of {self.layer}: {name}={self[name]!r} is not one of: {', '.join(choices)}")
        return choices[self[name]]

    def no_dropout(self) -> None:
        if self.get("attention_dropout", 0.0):
            raise UnsupportedReference(
                f"{self.layer}: attention_dropout={self['attention_dropout']} has no counterpart here; pass 0.0 "
                "(evaluation is the same)"
            )


def _random_is_refused(c: _Config) -> None:
    if c["sampling_type"] == "random":
        raise UnsupportedReference(
            f"{c.layer}: sampling_type='random' draws new candidates in evaluation too, so its output is not a "
            f"function of its input; build the layer with candidates='random({c['num_samples']})' instead"
        )


# --- ConvNN, 1-D and 2-D


def _convnn_path(c: _Config, ndim: int) -> tuple[Nearest, Ranked | Box, bool]:
    """Path, shape and whether values carry coordinates, of Conv1d_NN and Conv2d_NN."""
    if c["K"] != c["stride"]:
        raise ValueError(f"{c.layer}: K and stride must be equal, got K={c['K']} and stride={c['stride']}")
    _random_is_refused(c)
    metric = c.choose("magnitude_type", {"cosine": "cosine", "euclidean": "euclidean"})
    plain: dict[str, Similarity] = {"cosine": Cosine(), "euclidean": Euclidean()}
    similarity = c.choose(
        "similarity_type",
        {
            "Col": plain[metric],
            "Loc": Blend(0.0, metric, unit=True),
            "Loc_Col": Blend(c["lambda_param"], metric, unit=True),
        },
    )
    coordinates = c.choose("aggregation_type", {"Col": False, "Loc_Col": True})
    tie = _ties(c, metric)
    if tie:
        raise UnsupportedReference(
            f"{c.layer}: {tie}; the public code leaves the choice among equals to torch.topk, which does not define "
            "it. nearfold.nn.ConvNN2d takes the lowest index"
        )
    candidates: Candidates = AllCandidates()
    if c["sampling_type"] == "spatial":
        if c["padding"]:
            raise UnsupportedReference(
                f"{c.layer}: sampling_type='spatial' with padding={c['padding']} indexes the padded map with the "
                "size of the unpadded one; use padding=0"
            )
        candidates = Grid(int(c["num_samples"]), int(c["sample_padding"]))
    path = Nearest(c["K"], similarity, candidates, include_self=True, padding=c["padding"])
    # similarity by location alone takes its neighbours in raster order, so that it is a convolution
    return path, Box() if c["similarity_type"] == "Loc" else Ranked(), coordinates


def _ties(c: _Config, metric: str) -> str:
    """Why positions are equally near for this configuration whatever the input is; empty when they are not."""
    unshuffled = int(c["shuffle_scale"]) ** 2 if c["shuffle_pattern"] in ("B", "BA") else 1
    kind, lam = c["similarity_type"], c["lambda_param"]
    if kind == "Loc" and c["sampling_type"] == "spatial":
        return "sampled positions are equally far from others in space (similarity_type='Loc')"
    if kind == "Loc_Col" and lam == 0:
        return "lambda_param=0 compares positions only, and many are equally far"
    features_only = kind == "Col" or (kind == "Loc_Col" and lam == 1)
    if features_only and metric == "cosine" and c["in_channels"] * unshuffled == 1:
        return "the cosine of one channel is 1 or -1"
    if features_only and metric == "euclidean" and c["padding"] and c["aggregation_type"] == "Loc_Col":
        return "border positions are equally far in features but differ in the coordinates they contribute"
    return ""


def _grid_check(c: _Config, shuffled: int) -> Callable[[Tensor], None]:
    def check(x: Tensor) -> None:
        if c["sampling_type"] != "spatial":
            return
        sizes = [n // shuffled for n in x.shape[2:]]
        if len(set(sizes)) > 1:
            raise UnsupportedReference(
                f"{c.layer}: spatial sampling of a {sizes[0]} x {sizes[1]} map exchanges rows and columns in the "
                "public code; use square maps, or ConvNN2d(candidates='grid(r)')"
            )
        n, r, inset = sizes[0], int(c["num_samples"]), int(c["sample_padding"])
        if (n - 2 * inset < r <= n) or (r > n and (inset or x.dim() == 3)):
            raise UnsupportedReference(
                f"{c.layer}: num_samples={r} with sample_padding={inset} on {n} positions per axis repeats or adds "
                "candidates in the public code; use fewer samples"
            )

    return check


def _convnn(ndim: int) -> Callable[[_Config, State], Conversion]:
    def convert(c: _Config, state: State) -> Conversion:
        path, shape, coordinates = _convnn_path(c, ndim)
        shuffle = c.choose("shuffle_pattern", {"NA": "none", "B": "before", "A": "after", "BA": "both"})
        scale = int(c["shuffle_scale"])
        layer = (ConvNN1d, ConvNN2d)[ndim - 1](
            c["in_channels"],
            c["out_channels"],
            c["K"],
            padding=path.padding,
            similarity=path.similarity,
            candidates=path.candidates,
            kernel=Dense(coordinates=coordinates),
            shape=shape,
            shuffle=shuffle,
            shuffle_scale=scale,
            bias="conv1d_layer.bias" in state,
        )

        def mapping(s: State) -> State:
            return {name: s[f"conv1d_layer.{name}"] for name in ("weight", "bias") if f"conv1d_layer.{name}" in s}

        shrink = scale if shuffle in ("before", "both") else 1
        return Conversion(layer, mapping, _grid_check(c, shrink))

    return convert


def _attending_convnn(c: _Config) -> Basic:
    """The operation of Conv2d_NN_Attn with all candidates."""
    c.no_dropout()
    if c["sampling_type"] != "all":
        raise UnsupportedReference(
            f"{c.layer}: sampling_type={c['sampling_type']!r} softmaxes over tokens instead of neighbours in the "
            "public code; use sampling_type='all'"
        )
    if c["aggregation_type"] != "Col":
        raise UnsupportedReference(
            f"{c.layer}: aggregation_type={c['aggregation_type']!r} projects the coordinates with the features, "
            "which has no counterpart here; use 'Col'"
        )
    if c["shuffle_pattern"] != "NA":
        raise UnsupportedReference(f"{c.layer}: shuffle_pattern={c['shuffle_pattern']!r} is not converted")
    # the public code overwrites the diagonal: similarity 1.1, or squared distance -0.1 ...
    similarity, own, sign = c.choose(
        "magnitude_type", {"cosine": (Cosine(), 1.1, 1.0), "euclidean": (Euclidean(squared=True), 0.1, -1.0)}
    )
    path = Nearest(c["K"], similarity, include_self=own, padding=c["padding"])
    # ... and softmaxes raw distances: the largest weight to the farthest of the k
    return Basic(path, Ranked(), Weight(Softmax(scale=sign), Separable()))


def _attending_mapping(s: State, prefix: str = "") -> State:
    """Query and key are exchanged: the public similarity matrix has a key per row."""
    pointwise, out = s[f"{prefix}pointwise_conv.weight"], s[f"{prefix}w_o.weight"][..., 0]
    bias = pointwise[..., 0] @ s[f"{prefix}conv1d_layer.bias"] + s[f"{prefix}pointwise_conv.bias"]
    none = torch.zeros_like(s[f"{prefix}w_q.weight"][:, 0, 0])
    return {
        "query_weight": s[f"{prefix}w_k.weight"][..., 0],
        "query_bias": none,
        "key_weight": s[f"{prefix}w_q.weight"][..., 0],
        "key_bias": none,
        "value_weight": s[f"{prefix}w_v.weight"][..., 0],
        "value_bias": none,
        "weight": s[f"{prefix}conv1d_layer.weight"],
        "pointwise_weight": pointwise,
        "out_weight": out,
        "out_bias": out @ bias,
    }


def _convnn_attention_2d(c: _Config, state: State) -> Conversion:
    layer = Mixer(_attending_convnn(c), c["in_channels"], c["out_channels"])
    return Conversion(layer, _attending_mapping)


def _branching(ndim: int) -> Callable[[_Config, State], Conversion]:
    def convert(c: _Config, state: State) -> Conversion:
        attends = c.layer == "Conv2d_Attn_Branching"
        if c["shuffle_pattern"] != "NA":
            raise UnsupportedReference(
                f"{c.layer}: shuffle_pattern={c['shuffle_pattern']!r} inside a branch is not converted; use 'NA'"
            )
        inner = _Config(c.layer, {**c.values, "stride": c["K"]})
        if attends:
            first = _attending_convnn(inner)
        else:
            path, shape, coordinates = _convnn_path(inner, ndim)
            first = Basic(path, shape, Weight(kernel=Dense(coordinates=coordinates)))
        size = tuple(state["branch2.weight"].shape[2:]) if "branch2.weight" in state else c["kernel_size"]
        second = Basic(Window(size), Box(), Weight(kernel=Dense()))
        layer = Mixer(
            Branch(c.get("branch_ratio", 0.5), first, second, mix=True),
            c["in_channels"],
            c["out_channels"],
            ndim=ndim,
        )

        def mapping(s: State) -> State:
            found = {
                "mix_weight": s["pointwise_conv.weight"].flatten(1),
                "mix_bias": s["pointwise_conv.bias"],
            }
            if "branch2.weight" in s:
                found |= {"1.weight": s["branch2.weight"], "1.bias": s["branch2.bias"]}
            if attends and "branch1.w_q.weight" in s:
                found |= {f"0.{name}": p for name, p in _attending_mapping(s, "branch1.").items()}
            elif "branch1.conv1d_layer.weight" in s:
                found |= {
                    "0.weight": s["branch1.conv1d_layer.weight"],
                    "0.bias": s["branch1.conv1d_layer.bias"],
                }
            return found

        return Conversion(layer, mapping, _grid_check(c, 1))

    return convert


# --- attention over tokens


def _linear(s: State, names: dict[str, str], prefix: str = "") -> State:
    """Linear layers by name, biases where there are any."""
    return {
        f"{ours}_{part}": s[f"{prefix}{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
        if part == "weight" or f"{prefix}{theirs}.{part}" in s
    }


def _tokens(op: Operation, dim: int, state: State, bias_name: str) -> TokenMixer:
    return TokenMixer(op, dim, bias=bias_name in state)


def _attention(c: _Config, state: State) -> Conversion:
    c.no_dropout()
    op = Basic(All(), Row(), Weight(Softmax(heads=c["num_heads"])))
    names = {"query": "W_q", "key": "W_k", "value": "W_v", "out": "W_o"}
    return Conversion(_tokens(op, c["d_hidden"], state, "W_o.bias"), lambda s: _linear(s, names))


def _kvt(c: _Config, state: State) -> Conversion:
    dim, heads = c["dim"], c.get("num_heads", 8)
    scale = 1.0 if not c.get("qk_scale", None) else c["qk_scale"] * (dim // heads) ** 0.5
    op = Basic(Nearest(c.get("topk", 100), Scaled()), Ranked(), Weight(Softmax(heads=heads, scale=scale)))
    if any(c.get(name, 0.0) for name in ("attn_drop", "proj_drop")):
        raise UnsupportedReference(f"{c.layer}: dropout has no counterpart here; pass 0.0 (evaluation is the same)")
    layer = TokenMixer(op, dim, bias="proj.bias" in state or "qkv.bias" in state)

    def mapping(s: State) -> State:
        found = dict(zip(("query_weight", "key_weight", "value_weight"), s["qkv.weight"].chunk(3), strict=True))
        found["out_weight"] = s["proj.weight"]
        if "out_bias" in layer.tensors():
            biases = s["qkv.bias"] if "qkv.bias" in s else s["qkv.weight"].new_zeros(3 * dim)
            found |= dict(zip(("query_bias", "key_bias", "value_bias"), biases.chunk(3), strict=True))
            found["out_bias"] = s["proj.bias"] if "proj.bias" in s else s["proj.weight"].new_zeros(dim)
        return found

    return Conversion(layer, mapping)


def _sparse(c: _Config, state: State) -> Conversion:
    c.no_dropout()
    weight, context = Weight(Softmax(heads=c["num_heads"])), c.get("local_attn_ctx", None)
    op = c.choose(
        "attn_mode",
        {
            "all": lambda: Basic(All(), Row(), weight),
            "local": lambda: Basic(Window(2 * (context // 2) + 1), Box(), weight),
            "strided": lambda: Basic(All(), Strided(context), weight),
        },
    )()
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return Conversion(_tokens(op, c["d_hidden"], state, "out_proj.bias"), lambda s: _linear(s, names))


def _convnn_attention_operation(c: _Config) -> Basic:
    """The operation of MultiHeadConvNNAttention; heads share one kernel, repeated by the mapping."""
    c.no_dropout()
    heads, coordinates = c["num_heads"], bool(c.get("coordinate_encoding", False))
    kind = c.get("magnitude_type", "matmul")
    similarities: dict[str, Similarity] = {
        "matmul": Scaled(coordinates),
        "cosine": Cosine(coordinates),
        "euclidean": Euclidean(coordinates=coordinates),
    }
    if kind not in similarities:
        raise ValueError(f"{c.layer}: magnitude_type={kind!r} is not one of: {', '.join(similarities)}")
    # where heads are put together wrongly, the output projection follows outside the operation
    project = "qkv" if _scrambles(c) else "qkvo"
    plain: Rho = Inverse(heads, project) if kind == "euclidean" else Identity(heads, project)
    rho = Softmax(heads, project=project) if c.get("softmax_topk_val", True) else plain
    convolution = c.get("convolution_type", "standard")
    if convolution == "depthwise" and coordinates:
        raise UnsupportedReference(
            f"{c.layer}: convolution_type='depthwise' with coordinate_encoding cannot be built in the public code "
            "(its groups do not divide its channels)"
        )
    kernels: dict[str, Kernel] = {
        "standard": Dense(heads, coordinates),
        "depthwise": Depthwise(),
        "depthwise-separable": Separable(heads, coordinates),
    }
    if convolution not in kernels:
        raise ValueError(f"{c.layer}: convolution_type={convolution!r} is not one of: {', '.join(kernels)}")
    path = Nearest(c["K"], similarities[kind])
    if c.get("sampling_type", "all") != "all":
        _random_is_refused(c)
        # the token itself has score 1 (distance 1), and stays in the search with -0.1 (distance 1.1)
        own, again = (-1.0, -1.1) if kind == "euclidean" else (1.0, -0.1)
        grid = Grid(int(c["num_samples"]), int(c.get("sample_padding", 0)))
        path = Nearest(
            c["K"],
            similarities[kind],
            grid,
            include_self=own,
            again=None if c.layer.endswith("_Sampled") else again,
        )
    return Basic(path, Ranked(), Weight(rho, kernels[convolution]))


def _scrambles(c: _Config) -> bool:
    """The layer with a choice of similarity reads its (N, d) outputs as (d, N) when there are several heads."""
    return "magnitude_type" in c.values and c["num_heads"] > 1


def _scramble(y_BND: Tensor, heads: int) -> Tensor:
    B, N, D = y_BND.shape
    y_BHNd = y_BND.view(B, N, heads, D // heads).transpose(1, 2)
    wrong_BHNd = y_BHNd.reshape(B, heads, D // heads, N).transpose(2, 3)
    return wrong_BHNd.transpose(1, 2).reshape(B, N, D)


def _convnn_attention_mapping(c: _Config, s: State, prefix: str = "") -> State:
    # older layers compute K^T Q, a key per row: their query is our key; the later ones do not
    swapped = "magnitude_type" in c.values
    names = {"value": "W_v", "out": "W_o"}
    names |= {"query": "W_k", "key": "W_q"} if swapped else {"query": "W_q", "key": "W_k"}
    found = _linear(s, names, prefix)
    heads = c["num_heads"]
    first = "conv.0.weight" if f"{prefix}conv.0.weight" in s else "conv.weight"
    found["weight"] = s[f"{prefix}{first}"].repeat(heads, 1, 1)
    if f"{prefix}conv.1.weight" in s:
        found["pointwise_weight"] = s[f"{prefix}conv.1.weight"].repeat(heads, 1, 1)
    if _scrambles(c):
        found = {name: p for name, p in found.items() if not name.startswith("out")}
        if "query_bias" in found:
            made = found["weight"].new_zeros(c["d_hidden"])
            found["bias"] = s[f"{prefix}conv.bias"].repeat(heads) if f"{prefix}conv.bias" in s else made
    elif f"{prefix}conv.bias" in s:  # before the output projection: folded into its bias
        found["out_bias"] = found.get("out_bias", 0) + found["out_weight"] @ s[f"{prefix}conv.bias"].repeat(heads)
    return found


def _convnn_attention(c: _Config, state: State) -> Conversion:
    dim = c["d_hidden"]
    layer = _tokens(_convnn_attention_operation(c), dim, state, "W_o.bias")
    if _scrambles(c):  # what follows outside the operation is no parameter of the layer
        for name, shape in (("W_o.weight", (dim, dim)), ("W_o.bias", (dim,))):
            if name in state and tuple(state[name].shape) != shape:
                raise ValueError(
                    f"state does not fit config ({name}: expected {shape}, got {tuple(state[name].shape)}); pass the "
                    "state dict of the same layer"
                )

    def check(x: Tensor) -> None:
        if c.get("sampling_type", "all") == "spatial":
            room = x.shape[1] - 2 * int(c.get("sample_padding", 0))
            if int(c["num_samples"]) > room:
                raise UnsupportedReference(
                    f"{c.layer}: num_samples={c['num_samples']} repeats candidates among {room} tokens in the "
                    "public code; use fewer samples"
                )

    def after(y: Tensor, s: State) -> Tensor:
        return nn.functional.linear(_scramble(y, c["num_heads"]), s["W_o.weight"], s.get("W_o.bias"))

    mapping = functools.partial(_convnn_attention_mapping, c)
    return Conversion(layer, mapping, check, after if _scrambles(c) else None)


def _branching_attention(c: _Config, state: State) -> Conversion:
    ratio, dim = c.get("branch_ratio", 0.5), c["d_hidden"]
    first = int(ratio * dim)
    if first in (0, dim):
        raise UnsupportedReference(
            f"{c.layer}: branch_ratio={ratio} runs the branch that was not built in the public code; use the layer "
            "that remains"
        )
    if _scrambles(c):
        raise UnsupportedReference(
            f"{c.layer}: with num_heads={c['num_heads']} the ConvNN branch mixes up positions and channels in the "
            "public code; only num_heads=1 is converted"
        )
    near = _convnn_attention_operation(c)
    dense = Basic(All(), Row(), Weight(Softmax(heads=c["num_heads"])))
    layer = TokenMixer(Branch(first / dim, near, dense, mix=True), dim, bias=True)
    if layer.operation.split(dim)[0] != first:  # type: ignore[attr-defined]
        raise UnsupportedReference(f"{c.layer}: branch_ratio={ratio} of {dim} channels is not a ratio here")

    def widen(part: State, before: int, after: int) -> State:
        """The public branches split the input channels; ours see all of them, with zero weights."""
        out = {}
        for name, p in part.items():
            if name.startswith(("query", "key", "value")) and p.dim() == 2:
                p = torch.cat([p.new_zeros(len(p), before), p, p.new_zeros(len(p), after)], 1)
            out[name] = p
            bias = name.replace("weight", "bias")
            if name.endswith("_weight") and name != "pointwise_weight" and bias not in part:
                out[bias] = p.new_zeros(len(p))
        return out

    def mapping(s: State) -> State:
        names = {"query": "W_q", "key": "W_k", "value": "W_v", "out": "W_o"}
        a = widen(_convnn_attention_mapping(c, s, "convnn."), 0, dim - first)
        b = widen(_linear(s, names, "attention."), first, 0)
        mix = _linear(s, {"mix": "pointwise_linear"})
        return mix | {f"0.{n}": p for n, p in a.items()} | {f"1.{n}": p for n, p in b.items()}

    return Conversion(layer, mapping)


# --- ACmix


def _acmix_layer(c: _Config, state: State) -> Conversion:
    attention, window = c.get("kernel_att", 7), c.get("kernel_conv", 3)
    stride, heads = c.get("stride", 1), c.get("head", 4)
    for name, value, only in (("dilation", c.get("dilation", 1), 1), ("kernel_conv", window, 3)):
        if value != only:
            raise UnsupportedReference(
                f"ACmix: the public layer fails with {name}={value}; nearfold.nn.ACmix2d supports it"
            )
    if attention % 2 == 0:
        raise UnsupportedReference(f"ACmix: the public layer fails with an even kernel_att={attention}")
    op = _acmix(attention, window, heads, stride, 1, interleaved=True)
    layer = Mixer(op, c["in_planes"], c["out_planes"])

    def mapping(s: State) -> State:
        found = {"rates": torch.cat([s["rate1"], s["rate2"]])}
        for ours, theirs in (
            ("query", "conv1"),
            ("key", "conv2"),
            ("value", "conv3"),
            ("0.position", "conv_p"),
        ):
            found[f"{ours}_weight"] = s[f"{theirs}.weight"].flatten(1)
            found[f"{ours}_bias"] = s[f"{theirs}.bias"]
        found["1.weight"] = s["fc.weight"].flatten(1)
        found["1.shift_weight"] = s["dep_conv.weight"]
        return found

    def check(x: Tensor) -> None:
        if stride > 1 and any(n % stride for n in x.shape[2:]):
            raise UnsupportedReference(
                f"ACmix: the public layer fails on {tuple(x.shape[2:])} with stride={stride}; nearfold.nn.ACmix2d "
                "takes any size"
            )

    return Conversion(layer, mapping, check)


LAYERS: dict[str, Callable[[_Config, State], Conversion]] = {
    "Conv1d_NN": _convnn(1),
    "Conv2d_NN": _convnn(2),
    "Conv2d_NN_Attn": _convnn_attention_2d,
    "Conv1d_Branching": _branching(1),
    "Conv2d_Branching": _branching(2),
    "Conv2d_Attn_Branching": _branching(2),
    "MultiHeadAttention": _attention,
    "MultiHeadConvNNAttention": _convnn_attention,
    "MultiHeadConvNNAttention_Old": _convnn_attention,
    "MultiHeadConvNNAttention_Sampled": _convnn_attention,
    "MultiHeadKvtAttention": _kvt,
    "MultiHeadSparseAttention": _sparse,
    "MultiHeadBranchingAttention": _branching_attention,
    "ACmix": _acmix_layer,
}
