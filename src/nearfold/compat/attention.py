"""Conversions of the attention layers over tokens.

Shape legend: B batch, N tokens, D channels, H heads, d channels of a head.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from nearfold.compat.reference import Config, Conversion, State, UnsupportedReference, random_is_refused
from nearfold.grammar import Basic, Branch, Weight
from nearfold.grammar.similarity import Cosine, Euclidean, Scaled, Similarity
from nearfold.grammar.words import (
    All,
    Box,
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
from nearfold.nn.mixer import TokenMixer


def _linear(s: State, names: dict[str, str], prefix: str = "") -> State:
    """Linear layers by name, biases where there are any."""
    return {
        f"{ours}_{part}": s[f"{prefix}{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
        if part == "weight" or f"{prefix}{theirs}.{part}" in s
    }


# ours and the public names of linear layers: of most, of sparse attention, and of those that compute K^T Q
PUBLIC = {"query": "W_q", "key": "W_k", "value": "W_v", "out": "W_o"}
SPARSE = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
SWAPPED = PUBLIC | {"query": "W_k", "key": "W_q"}


def attention(c: Config, state: State) -> Conversion:
    """MultiHeadAttention: softmax over all tokens."""
    c.no_dropout()
    op = Basic(All(), Row(), Weight(Softmax(heads=c["num_heads"])))
    return Conversion(TokenMixer(op, c["d_hidden"], bias="W_o.bias" in state), lambda s: _linear(s, PUBLIC))


def kvt(c: Config, state: State) -> Conversion:
    """MultiHeadKvtAttention: softmax over the topk best keys; query, key and value are packed in one weight."""
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


def sparse(c: Config, state: State) -> Conversion:
    """MultiHeadSparseAttention: all tokens, a band, or every local_attn_ctx-th token."""
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
    return Conversion(TokenMixer(op, c["d_hidden"], bias="out_proj.bias" in state), lambda s: _linear(s, SPARSE))


def _convnn_attention_operation(c: Config) -> Basic:
    """The operation of MultiHeadConvNNAttention; heads share one kernel, repeated by the mapping."""
    c.no_dropout()
    heads, coordinates = c["num_heads"], bool(c.get("coordinate_encoding", False))
    kind = c.get("magnitude_type", "matmul")
    similarities: dict[str, Similarity] = {
        "matmul": Scaled(coordinates),
        "cosine": Cosine(coordinates),
        "euclidean": Euclidean(coordinates=coordinates),
    }
    similarity = c.choose("magnitude_type", similarities, "matmul")
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
    kernel = c.choose("convolution_type", kernels, "standard")
    path = Nearest(c["K"], similarity)
    if c.get("sampling_type", "all") != "all":
        random_is_refused(c)
        # the token itself has score 1 (distance 1), and stays in the search with -0.1 (distance 1.1)
        own, again = (-1.0, -1.1) if kind == "euclidean" else (1.0, -0.1)
        grid = Grid(int(c["num_samples"]), int(c.get("sample_padding", 0)))
        sampled = c.layer.endswith("_Sampled")
        path = Nearest(c["K"], similarity, grid, include_self=own, again=None if sampled else again)
    return Basic(path, Ranked(), Weight(rho, kernel))


def _scrambles(c: Config) -> bool:
    """The layer with a choice of similarity reads its (N, d) outputs as (d, N) when there are several heads."""
    return "magnitude_type" in c.values and c["num_heads"] > 1


def _scramble(y_BND: Tensor, heads: int) -> Tensor:
    B, N, D = y_BND.shape
    y_BHNd = y_BND.view(B, N, heads, D // heads).transpose(1, 2)
    wrong_BHNd = y_BHNd.reshape(B, heads, D // heads, N).transpose(2, 3)
    return wrong_BHNd.transpose(1, 2).reshape(B, N, D)


def _convnn_attention_mapping(c: Config, s: State, prefix: str = "") -> State:
    # older layers compute K^T Q, a key per row: their query is our key; the later ones do not
    found = _linear(s, SWAPPED if "magnitude_type" in c.values else PUBLIC, prefix)
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


def convnn_attention(c: Config, state: State) -> Conversion:
    """MultiHeadConvNNAttention and its variants; with several heads the outputs are mixed up as in the public code."""
    dim = c["d_hidden"]
    layer = TokenMixer(_convnn_attention_operation(c), dim, bias="W_o.bias" in state)
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


def branching_attention(c: Config, state: State) -> Conversion:
    """MultiHeadBranchingAttention: ConvNN attention on the first channels, attention on the others."""
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
    layer = TokenMixer(Branch(first / dim, near, dense, mix=True, split=True), dim, bias=True)
    if layer.operation.shares(dim)[0] != first:
        raise UnsupportedReference(f"{c.layer}: branch_ratio={ratio} of {dim} channels is not a ratio here")

    def biased(part: State) -> State:
        """With zeros for the biases that the public projections do not have."""
        missing = {name.replace("weight", "bias"): p for name, p in part.items() if name.endswith("_weight")}
        missing.pop("pointwise_bias", None)  # the kernel's pointwise half has none
        return {name: p.new_zeros(len(p)) for name, p in missing.items() if name not in part} | part

    def mapping(s: State) -> State:
        a = biased(_convnn_attention_mapping(c, s, "convnn."))
        b = biased(_linear(s, PUBLIC, "attention."))
        mix = _linear(s, {"mix": "pointwise_linear"})
        return mix | {f"0.{n}": p for n, p in a.items()} | {f"1.{n}": p for n, p in b.items()}

    return Conversion(layer, mapping)
