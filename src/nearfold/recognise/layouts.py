"""Where attentions of other libraries keep their parts, and what their calls bring: tables, read by `attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from nearfold.recognise.foreign import Unsaid, names_of


@dataclass(frozen=True)
class Layout:
    """Dotted names of an attention's members.

    Attributes:
        query: with ``key`` and ``value``: one map each.
        packed: all three in one map, one after the other.
        pair: key and value in one map, next to ``query``.
        out: the map behind it; empty: there is none.
        norm: a norm of the output plus the input that follows.
        dropout: what stands between the output and that norm, or behind the output.
    """

    query: str = ""
    key: str = ""
    value: str = ""
    packed: str = ""
    pair: str = ""
    out: str = ""
    norm: str = ""
    dropout: str = ""

    @property
    def maps(self) -> tuple[str, ...]:
        """The members that are pointwise maps."""
        return tuple(filter(None, (self.query, self.key, self.value, self.packed, self.pair, self.out)))

    @property
    def core(self) -> str:
        """Name of the member that compares: empty where it is the module itself."""
        return (self.query or self.packed).rpartition(".")[0]


def _three(text: str, **more: str) -> Layout:
    query, key, value, *out = text.split()
    return Layout(query, key, value, out=out[0] if out else "", **more)


LAYOUTS: tuple[Layout, ...] = (
    *(_three(f"q_proj k_proj v_proj {out}", dropout="proj_drop") for out in ("o_proj", "out_proj", "proj", "dense")),
    _three("q_proj k_proj v_proj projection_layer"),
    _three("query_proj key_proj value_proj out_proj"),
    _three("q_lin k_lin v_lin out_lin"),
    _three("q k v o"),
    _three("query key value dense", norm="LayerNorm", dropout="output_dropout"),  # ALBERT
    *(_three(f"query key value {out}") for out in ("out_proj", "output", "proj")),
    Layout(packed="qkv", out="proj", dropout="proj_drop"),
    Layout(packed="qkv", out="projection"),
    Layout(packed="Wqkv", out="out_proj"),
    Layout(packed="c_attn", out="c_proj", dropout="resid_dropout"),
    Layout("q", pair="kv", out="proj", dropout="proj_drop"),
    _three("self.query self.key self.value output.dense", norm="output.LayerNorm", dropout="output.dropout"),
    _three("attention.query attention.key attention.value output.dense", dropout="output.dropout"),
    _three("query key value"),
)
"""The first whose members are all there is taken."""

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
FEATURES = ("head_dim", "attention_head_size", "dim_head")
SCALES = ("scaling", "scale")
DROPOUTS = ("attention_dropout", "attn_drop", "attn_dropout", "dropout")

# Arguments by which a caller changes what is compared with what; there are no words for them.
OUTSIDE: dict[str, str] = {
    "shared_rel_pos": "a bias of the relative positions that its caller may give",
    "rope": "rotary positions of an image, which its caller gives, and class tokens without them",
    "shared_rel_pos_bias": "a bias that its caller may give, with entries of its own for the class token",
    "position_bias": "a bias of the relative positions that its caller gives",
    "relative_pos": "scores with relative positions",
    "alibi": "a bias that its caller gives",
}
_CLASS_TOKEN = "a relative bias with entries of its own for the class token"
# Arguments that are known: masks, what is kept between calls, the size of a map, another input, what is to be returned.
KNOWN = frozenset(
    (
        "attention_mask", "attn_mask", "mask", "head_mask", "layer_head_mask", "is_causal", "cache", "past_key_values",
        "past_key_value", "layer_past", "use_cache", "cache_position", "position_ids", "position_embeddings",
        "output_attentions", "key_value_states", "encoder_hidden_states", "encoder_attention_mask", "height", "width",
        "feat_size", "encoder_position_embeddings", "interpolate_pos_encoding", "resolution",
    )
)  # fmt: skip
# Settings in a module's configuration that mean more than the module shows: where they are of this kind.
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_relative_position_bias": (bool, _CLASS_TOKEN),
    "use_shared_relative_position_bias": (bool, _CLASS_TOKEN),
    "position_embedding_type": (lambda kind: str(kind).startswith("relative"), "scores with relative positions"),
    "attn_logit_softcapping": (lambda cap: cap is not None, "scores that are capped"),
    "attention_chunk_size": (lambda size: size is not None, "chunks of the sequence that do not see one another"),
    "clip_qkv": (lambda limit: limit is not None, "queries, keys and values that are clipped"),
}
# Text encoders whose layers are told by their caller that they are causal.
CAUSAL = frozenset(
    f"{name}TextConfig" for name in ("CLIP", "CLIPSeg", "GroupViT", "MetaClip2", "OwlViT", "Owlv2", "XCLIP")
)
# Names that parents give to attention whose keys and values are another input's.
CROSS = frozenset(("encoder_attn", "crossattention", "cross_attn", "cross_attention", "encoder_attention"))
CONTEXTS = ("key_value_states", "encoder_hidden_states")  # arguments that bring it


def member(module: nn.Module, name: str) -> Any:
    """A member by its dotted name; None where there is none."""
    for part in filter(None, name.split(".")):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module


def layout_of(module: nn.Module) -> Layout | None:
    """The layout whose members a module has."""
    for layout in LAYOUTS:
        if all(isinstance(getattr(member(module, name), "weight", None), Tensor) for name in layout.maps):
            return layout if all(member(module, name).weight.dim() == 2 for name in layout.maps) else None
    return None


LINEAR, TURNED = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"


def linear(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a member that is a pointwise map."""
    found = member(module, name)
    names = list(names_of(found))
    if parametrize.is_parametrized(found) or not ({LINEAR, TURNED} & set(names)):
        raise Unsaid(f"its {name} is a {type(found).__name__} that computes something of its own")
    return (found.weight.T if TURNED in names else found.weight), found.bias


def tensors_of(module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The weights by the names of `nearfold.lower.parameters`; biases where there are any."""
    found: Maps = {}
    for letter in (*QKV, "out"):
        if name := getattr(layout, letter):
            found[letter] = linear(module, name)
    if layout.packed:
        weight, bias = linear(module, layout.packed)
        own = [getattr(module, f"{letter}_bias", None) for letter in "qkv"]  # BEiT's, next to the map
        found |= divided(QKV, weight, own if bias is None else bias)
    if layout.pair:
        found |= divided(("key", "value"), *linear(module, layout.pair))
    return named(found)


QKV = ("query", "key", "value")
Maps = dict[str, tuple[Tensor, Tensor | None]]
"""Weight and bias of pointwise maps by name."""


def divided(names: Sequence[str], weight: Tensor, bias: Tensor | Sequence[Tensor | None] | None) -> Maps:
    """Maps that lie in one, one after the other; their biases too, or already apart."""
    apart = weight.chunk(len(names))
    biases = bias.chunk(len(names)) if isinstance(bias, Tensor) else bias or [None] * len(names)
    return dict(zip(names, zip(apart, biases, strict=True), strict=True))


def named(maps: Maps) -> dict[str, Tensor]:
    """Weights, and the biases that there are, by the names of `nearfold.lower.parameters`."""
    weights = {f"{name}_weight": weight for name, (weight, _) in maps.items()}
    return weights | {f"{name}_bias": bias for name, (_, bias) in maps.items() if bias is not None}


def unexplained(module: nn.Module, layout: Layout) -> Iterator[str]:
    """Names of own parameters and buffers that the layout does not explain, by the member that holds them."""
    known = {*layout.maps, *filter(None, (layout.norm,))}
    if layout.packed and getattr(module, "q_bias", None) is not None:
        known |= {"q_bias", "k_bias", "v_bias"}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name == "k_bias" and layout.packed and not tensor.is_meta and bool(tensor.any()):
            yield name
        elif name not in known and name.rpartition(".")[0] not in known:
            yield name.removesuffix(".weight").removesuffix(".bias")


def without_norm(layout: Layout) -> Layout:
    """The same without a norm that is not there."""
    return replace(layout, norm="")
