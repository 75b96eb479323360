"""Modules that answer to the calls of the attention layers they replace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import Basic, Operation
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import All, Nearest, Path, Softmax
from nearfold.lower.meaning import meaning
from nearfold.nn.mixer import Mixer, TokenMixer
from nearfold.recognise.attention import Attention, rotary_embeddings, visible
from nearfold.recognise.checked import config_of
from nearfold.recognise.layouts import member
from nearfold.surgery.masks import masked, readable, records_weights


def _require_no_mask(mixer: Mixer, **masks: Any) -> None:
    given = [name for name, mask in masks.items() if mask is not None and mask is not False]
    if given:
        raise ValueError(
            f"{given[0]} was given to {mixer.operation}, whose words say what it sees: leave the mask out, write shape "
            "causal into the operation, or undo the conversion of this layer"
        )


def _require_no_weights(options: dict[str, Any], config: Any, what: object) -> None:
    if options.get("output_attentions") or records_weights(config):
        raise ValueError(
            f"attention weights were asked for (output_attentions), which {what} does not keep: leave that out, look "
            "at nearfold.mixing_matrix, or undo the conversion of this layer"
        )


def dense(op: Operation, keys: int) -> bool:
    """Whether an operation on so many keys is plain attention, to which torch's masks and dropout apply.

    >>> from nearfold import parse
    >>> dense(parse("nearest(9, scaled) | ranked | softmax(heads=2)"), 9)
    True
    """
    if not isinstance(op, Basic) or op.weight.kernel is not None:
        return False
    rho, path = op.weight.rho, op.path
    every: tuple[Path, ...] = All(), All(cross=True)
    if (k := getattr(path, "k", 0)) >= keys:
        every += Nearest(k, Scaled()), Nearest(k, Scaled(), cross=True)
    return rho == Softmax(rho.heads) and path in every and op.shape.whole


CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
MASKS = ("attention_mask", "attn_mask", "mask")
# Arguments that change nothing in attention over all positions, or that `CalledAttention` asks about itself.
HARMLESS = frozenset(
    (
        *CACHES, *MASKS, "use_cache", "output_hidden_states", "return_dict", "position_ids", "cache_position", "height",
        "width", "feat_size", "num_items_in_batch", "is_causal", "position_embeddings", "interpolate_pos_encoding",
        "resolution", "logits_to_keep", "sliding_window",
    )
)  # fmt: skip


class CalledAttention(nn.Module):
    """Where an attention of transformers or timm stood: its arguments, and a tuple or a tensor as it returned.

    Masks are honoured: a slot that one forbids is not valid. With a mask that says more than which keys there are,
    `nearest` runs on the oracle.

    Keys and values that a caller keeps from call to call (transformers' DynamicCache) are the inputs themselves here:
    every call computes all positions anew, and returns the new ones.
    """

    def __init__(self, mixer: TokenMixer, like: nn.Module, read: Attention) -> None:
        super().__init__()
        core = member(like, read.layout.core)
        dropout, norm = member(like, read.layout.dropout), member(like, read.layout.norm)
        self.mixer = mixer
        self.dropout = dropout if read.layout.dropout and isinstance(dropout, nn.Module) else nn.Identity()
        self.norm = norm if read.layout.norm else None
        self.was, self.arguments, self.returns = read.operation, read.arguments, read.returns
        self.config, self.layer_idx = config_of(like), getattr(core, "layer_idx", None)
        self.is_causal = bool(getattr(core, "is_causal", False))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, N, D), and what the old layer took -> what it returned; None where there were attention weights."""
        given = dict(zip(self.arguments[1:], args, strict=False)) | kwargs
        self._require(given)
        M, turns = hidden_states.shape[1], self._turns(given, hidden_states)
        every, turns = self._remembered(given, hidden_states, turns)
        mask = self._mask(given, M, every.shape[1], hidden_states)
        if turns is not None:
            self._require_positions(turns, mask, M)
        added = any(isinstance(given.get(name), Tensor) and given[name].is_floating_point() for name in MASKS)
        y = masked(self.mixer, every, mask, added)[:, every.shape[1] - M :]
        y = self.dropout(y)
        if self.norm is not None:
            y = self.norm(y + hidden_states)
        return (y, *(None,) * (self.returns - 1)) if self.returns else y

    def _require(self, given: dict[str, Any]) -> None:
        _require_no_weights(given, self.config, self.mixer.operation)
        odd = [
            name for name, value in given.items() if name not in HARMLESS and value is not None and value is not False
        ]
        if odd:
            raise ValueError(
                f"{odd[0]} was given to {self.mixer.operation}, whose words say what it sees: leave it out, or undo "
                "the conversion of this layer"
            )

    def _turns(self, given: dict[str, Any], x: Tensor) -> Tensor | None:
        """Cosines and sines (B, M, 2 d) of the caller's rotary positions, where the old layer used them."""
        near, turns = self.was.path.similarity, given.get("position_embeddings")
        if turns is None or not near.rotary:
            return None
        return torch.cat([t.expand(x.shape[0], -1, -1) for t in turns], -1)

    def _remembered(self, given: dict[str, Any], x: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The inputs (B, T, D) that can still be read, those of earlier calls first, and where they are."""
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if cache is None:
            return x, turns
        if type(cache).__name__ == "EncoderDecoderCache":
            cache = cache.self_attention_cache
        kind = type(cache).__name__
        if kind != "DynamicCache" or self.layer_idx is None:
            raise ValueError(
                f"a {kind} was given to {self.mixer.operation}, which can go on from a DynamicCache only: call the "
                "model with use_cache=False, or undo the conversion of this layer"
            )
        beside = x[..., :1] if turns is None else turns
        every, where = cache.update(x[:, None], beside[:, None], self.layer_idx)
        return every[:, 0], None if turns is None else where[:, 0]

    def _require_positions(self, turns: Tensor, mask: Tensor | None, M: int) -> None:
        """ValueError where what is read does not lie at positions one apart, as the operation has it."""
        T, d = turns.shape[1], turns.shape[2] // 2
        ours = rotary_embeddings(self.was.path.similarity.rotary, d, T, turns)
        cos, sin = turns[..., :d], turns[..., d:]
        # turned back by the last position: scores depend on how far apart two positions are, and on nothing else
        back_cos, back_sin = cos * cos[:, -1:] + sin * sin[:, -1:], sin * cos[:, -1:] - cos * sin[:, -1:]
        apart = torch.maximum((back_cos - ours[0].flip(1)).abs(), (back_sin + ours[1].flip(1)).abs()).amax(-1)
        if mask is not None:
            read = mask[:, :, T - M :].any(2).any(1)
            asks = torch.cat([read[:, : T - M], mask[:, :, T - M :].any(3).any(1)], 1)
            apart = apart.masked_fill(~(read | asks), 0)
        if bool((apart > (5e-3 if turns.dtype in (torch.float32, torch.float64) else 3e-2)).any()):
            raise ValueError(
                f"{self.mixer.operation} has its queries and keys at positions one apart, and was called with other "
                "ones (position_ids): leave them out, or undo the conversion of this layer"
            )

    def _mask(self, given: dict[str, Any], M: int, T: int, x: Tensor) -> Tensor | None:
        """What the caller lets the queries read, (B|1, 1, T, T); None where the operation's own shape says it."""
        causal = self.was.shape.causal
        mask = next((given[name] for name in MASKS if given.get(name) is not None), None)
        if mask is None:
            asked = given["is_causal"] if given.get("is_causal") is not None else self.is_causal
            told = bool(asked) and getattr(self.config, "_attn_implementation", "sdpa") != "eager"
            if told and not causal and M == T:
                return torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).tril()
            if M > 1 and told != causal:
                raise ValueError(
                    f"the layer was {'' if causal else 'not '}causal when it became {self.mixer.operation}, and is now "
                    f"called {'with' if told else 'without'} a causal mask: undo the conversion of this layer"
                )
            return None
        allowed = readable(mask, x.shape[0], M, T)
        own = torch.ones(T, T, dtype=torch.bool, device=x.device)
        if causal:
            own = visible(self.was, T, x.device)
        rows = own[T - M :]
        if bool((allowed & ~rows).any()):
            raise ValueError(
                f"the mask lets a query read more than {self.was} does, which stood here when the layer became "
                f"{self.mixer.operation}: undo the conversion of this layer"
            )
        wider = not meaning(self.was.path).everywhere and self.mixer.operation != self.was
        if bool((allowed == rows).all()) and not wider:
            return None
        full = own.expand(*allowed.shape[:2], T, T).clone()
        full[:, :, T - M :] = allowed
        return full


class MultiheadAttention(nn.Module):
    """Where an ``nn.MultiheadAttention`` stood: (query, key, value) -> (output, weights).

    An operation that is plain attention, or the k best of at most k keys, takes every call that the old layer took:
    masks, keys of another length, weights asked for, dropout on them. Any other takes padding (it then sees each
    sequence without it, and makes zeros there) and gives no weights; what it cannot do is a ValueError.
    """

    _qkv_same_embed_dim = False  # nn.TransformerEncoderLayer's fused path stays away

    def __init__(self, mixer: TokenMixer, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.mixer = mixer
        self.batch_first, self.embed_dim, self.num_heads = like.batch_first, like.embed_dim, like.num_heads
        self.dropout, self.head_dim, self.kdim, self.vdim = like.dropout, like.head_dim, like.kdim, like.vdim
        self.bias_k, self.bias_v, self.add_zero_attn = None, None, False

    # nn.TransformerEncoder looks at these, to decide whether it packs padded sequences into nested tensors

    @property
    def in_proj_weight(self) -> Tensor:
        """Projections of query, key and value; a weight of the layer where it has none."""
        return self._part("weight")

    @property
    def in_proj_bias(self) -> Tensor:
        """Their biases."""
        return self._part("bias")

    @property
    def out_proj(self) -> SimpleNamespace:
        """Weight and bias of the last projection."""
        own = self.mixer.tensors()
        other = next(iter(own.values()))
        return SimpleNamespace(**{part: own.get(f"out_{part}", other) for part in ("weight", "bias")})

    def _part(self, part: str) -> Tensor:
        own = self.mixer.tensors()
        names = [f"{name}_{part}" for name in ("query", "key", "value")]
        return torch.cat([own[n] for n in names]) if own.keys() >= set(names) else next(iter(own.values()))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), or (N, B, D) without batch_first -> (output, weights or None)."""
        if query.is_nested:
            alone = [t[None] for t in query.unbind()]
            made = [self(t, t, t, need_weights=False)[0][0] for t in alone]
            return torch.nested.as_nested_tensor(made), None
        batch = query.dim() == 3
        second = batch and self.batch_first
        keys = key.shape[1 if second else 0]
        plain = value is key and key is query and key_padding_mask is None and attn_mask is None and not is_causal
        rate = self.dropout if self.training else 0.0
        if dense(self.mixer.operation, keys) and (not plain or need_weights or rate):
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            q, k, v = (t.transpose(0, 1) if second else t for t in (query, key, value))
            y, weights = self._attend(q, k, v, rate, *options)
            return y.transpose(0, 1) if second else y, weights
        _require_no_mask(self.mixer, attn_mask=attn_mask, is_causal=is_causal)
        crosses = self.mixer.operation.needs_context
        if value is not key or (key is not query and not crosses):
            raise ValueError(
                f"{self.mixer.operation} reads {'two inputs' if crosses else 'one input'}, but was called with other "
                "keys or values than those; undo the conversion of this layer"
            )
        x, context = (t if second else t.transpose(0, 1) if batch else t[None] for t in (query, key))
        if key_padding_mask is not None:
            y = self._without_padding(x, context, key_padding_mask if batch else key_padding_mask[None])
        else:
            y = self.mixer(x, context) if crosses else self.mixer(x)
        return (y if second else y.transpose(0, 1) if batch else y[0]), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rate: float, *options: Any) -> tuple[Tensor, Tensor | None]:
        """Plain attention with everything that torch's function knows; (N, B, D) or (N, D)."""
        own = self.mixer.tensors()
        padding, need_weights, mask, average, is_causal = options
        heads: int = self.mixer.operation.heads  # type: ignore[attr-defined]
        return F.multi_head_attention_forward(
            q, k, v, self.embed_dim, heads, self.in_proj_weight,
            self.in_proj_bias if "query_bias" in own else None, None, None, False, rate, own["out_weight"],
            own.get("out_bias"), self.training, padding, need_weights, mask,
            average_attn_weights=average, is_causal=is_causal,
        )  # fmt: skip

    def _without_padding(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Each sequence on its own, without its padding; zeros where that was."""
        gone = mask if mask.dtype == torch.bool else mask == float("-inf")
        if mask.dtype != torch.bool and bool(mask.masked_fill(gone, 0).any()):
            raise ValueError(
                f"key_padding_mask has values other than 0 and -inf, which {self.mixer.operation} does not know; undo "
                "the conversion of this layer"
            )
        if self.mixer.operation.needs_context:
            return torch.cat([self.mixer(x[b : b + 1], context[b : b + 1, ~gone[b]]) for b in range(len(x))])
        y = torch.zeros_like(x)
        for b in range(len(x)):
            kept = ~gone[b]
            y[b, kept] = self.mixer(x[b : b + 1, kept])[0]
        return y


class SwinBlock(nn.Module):
    """Where a timm ``SwinTransformerBlock`` stood, which cuts the map for its attention: (B, H, W, D) to the same.

    Its other parts, and their names, are the old block's.
    """

    def __init__(self, mixer: Mixer, like: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = like.norm1, ChannelsLast(mixer), like.drop_path1
        self.norm2, self.mlp, self.drop_path2 = like.norm2, like.mlp, like.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        tokens = x.flatten(1, 2)
        return (tokens + self.drop_path2(self.mlp(self.norm2(tokens)))).view(x.shape)


class TokenSwinBlock(nn.Module):
    """Where a transformers ``SwinLayer`` stood: (B, N, D) and the size of the map -> ((B, N, D), None).

    Its other parts, and their names, are the old layer's.
    """

    def __init__(self, mixer: Mixer, like: Any) -> None:
        super().__init__()
        self.attention = ChannelsLast(mixer)
        self.layernorm_before, self.layernorm_after = like.layernorm_before, like.layernorm_after
        self.mlp, self.dropout, self.drop_path = like.mlp, like.dropout, like.drop_path
        self.config = config_of(like)

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **options: Any
    ) -> tuple[Tensor, None]:
        _require_no_weights(options, self.config, self.attention.mixer.operation)
        x = self.layernorm_before(hidden_states).unflatten(1, tuple(map(int, input_dimensions)))
        x = hidden_states + self.drop_path(self.dropout(self.attention(x).flatten(1, 2)))
        return self.dropout(self.mlp(self.layernorm_after(x))) + x, None


class ChannelsLast(nn.Module):
    """Where a torchvision ``ShiftedWindowAttention`` stood: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)
