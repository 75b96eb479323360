"""Conversions of Conv1d_NN, Conv2d_NN, Conv2d_NN_Attn and the branching layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nearfold.compat.reference import Config, Conversion, State, UnsupportedReference, random_is_refused
from nearfold.grammar import Basic, Branch, Weight
from nearfold.grammar.similarity import Blend, Cosine, Euclidean, Similarity
from nearfold.grammar.words import (
    AllCandidates,
    Box,
    Candidates,
    Dense,
    Grid,
    Nearest,
    Ranked,
    Separable,
    Softmax,
    Window,
)
from nearfold.nn.mixer import Mixer
from nearfold.nn.shuffle import Shuffled


def _convnn_path(c: Config, ndim: int) -> tuple[Nearest, Ranked | Box, bool]:
    """Path, shape and whether values carry coordinates, of Conv1d_NN and Conv2d_NN."""
    if c["K"] != c["stride"]:
        raise ValueError(f"{c.layer}: K and stride must be equal, got K={c['K']} and stride={c['stride']}")
    random_is_refused(c)
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


def _ties(c: Config, metric: str) -> str:
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


def _grid_check(c: Config, shuffled: int) -> Callable[[Tensor], None]:
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


def convnn(ndim: int) -> Callable[[Config, State], Conversion]:
    """Conv1d_NN and Conv2d_NN."""

    def convert(c: Config, state: State) -> Conversion:
        path, shape, coordinates = _convnn_path(c, ndim)
        shuffle = c.choose("shuffle_pattern", {"NA": "none", "B": "before", "A": "after", "BA": "both"})
        scale = int(c["shuffle_scale"])
        layer = Shuffled(
            Basic(path, shape, Weight(kernel=Dense(coordinates=coordinates))), c["in_channels"], c["out_channels"],
            ndim=ndim, bias="conv1d_layer.bias" in state, shuffle=shuffle, shuffle_scale=scale,
        )  # fmt: skip

        def mapping(s: State) -> State:
            return {name: s[f"conv1d_layer.{name}"] for name in ("weight", "bias") if f"conv1d_layer.{name}" in s}

        shrink = scale if shuffle in ("before", "both") else 1
        return Conversion(layer, mapping, _grid_check(c, shrink))

    return convert


def _attending_convnn(c: Config) -> Basic:
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


def convnn_attention_2d(c: Config, state: State) -> Conversion:
    """Conv2d_NN_Attn."""
    layer = Mixer(_attending_convnn(c), c["in_channels"], c["out_channels"])
    return Conversion(layer, _attending_mapping)


def branching(ndim: int) -> Callable[[Config, State], Conversion]:
    """Conv1d_Branching, Conv2d_Branching and Conv2d_Attn_Branching."""

    def convert(c: Config, state: State) -> Conversion:
        attends = c.layer == "Conv2d_Attn_Branching"
        if c["shuffle_pattern"] != "NA":
            raise UnsupportedReference(
                f"{c.layer}: shuffle_pattern={c['shuffle_pattern']!r} inside a branch is not converted; use 'NA'"
            )
        inner = Config(c.layer, {**c.values, "stride": c["K"]})
        if attends:
            first = _attending_convnn(inner)
        else:
            path, shape, coordinates = _convnn_path(inner, ndim)
            first = Basic(path, shape, Weight(kernel=Dense(coordinates=coordinates)))
        size = tuple(state["branch2.weight"].shape[2:]) if "branch2.weight" in state else c["kernel_size"]
        second = Basic(Window(size), Box(), Weight(kernel=Dense()))
        layer = Mixer(
            Branch(c.get("branch_ratio", 0.5), first, second, mix=True), c["in_channels"], c["out_channels"], ndim=ndim
        )

        def mapping(s: State) -> State:
            found = {"mix_weight": s["pointwise_conv.weight"].flatten(1), "mix_bias": s["pointwise_conv.bias"]}
            if "branch2.weight" in s:
                found |= {"1.weight": s["branch2.weight"], "1.bias": s["branch2.bias"]}
            if attends and "branch1.w_q.weight" in s:
                found |= {f"0.{name}": p for name, p in _attending_mapping(s, "branch1.").items()}
            elif "branch1.conv1d_layer.weight" in s:
                found |= {"0.weight": s["branch1.conv1d_layer.weight"], "0.bias": s["branch1.conv1d_layer.bias"]}
            return found

        return Conversion(layer, mapping, _grid_check(c, 1))

    return convert
