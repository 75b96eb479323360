"""Modules that answer to the calls of the attention layers they replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import Causal, Window
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

    Masks are honoured: a slot that one forbids is not valid. With a mask that is not the operation's own shape,
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
        if given.get("output_attentions") or records_weights(self.config):
            raise ValueError(
                f"attention weights were asked for (output_attentions), which {self.mixer.operation} does not keep: "
                "leave that out, look at nearfold.mixing_matrix, or undo the conversion of this layer"
            )
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
        if turns is None or not isinstance(near, Scaled) or not near.rotary:
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
        assert isinstance(self.was.path.similarity, Scaled)
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
        causal = isinstance(self.was.shape, Causal)
        mask = next((given[name] for name in MASKS if given.get(name) is not None), None)
        if mask is None:
            asked = given["is_causal"] if given.get("is_causal") is not None else self.is_causal
            told = bool(asked) and getattr(self.config, "_attn_implementation", "sdpa") != "eager"
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
        wider = isinstance(self.was.path, Window) and self.mixer.operation != self.was
        if bool((allowed == rows).all()) and not wider:
            return None
        full = own.expand(*allowed.shape[:2], T, T).clone()
        full[:, :, T - M :] = allowed
        return full


class MultiheadAttention(nn.Module):
    """Where an ``nn.MultiheadAttention`` stood: (query, key, value) -> (output, None)."""

    in_proj_bias = None  # with _qkv_same_embed_dim: nn.TransformerEncoderLayer's fused path stays away
    _qkv_same_embed_dim = False

    def __init__(self, mixer: TokenMixer, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.mixer = mixer
        self.batch_first, self.embed_dim, self.num_heads = like.batch_first, like.embed_dim, like.num_heads

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
    ) -> tuple[Tensor, None]:
        """(B, N, D), or (N, B, D) without batch_first -> (output, None): there are no weights to return."""
        _require_no_mask(self.mixer, key_padding_mask=key_padding_mask, attn_mask=attn_mask, is_causal=is_causal)
        crosses = self.mixer.operation.needs_context
        if value is not key or (key is not query and not crosses):
            raise ValueError(
                f"{self.mixer.operation} reads {'two inputs' if crosses else 'one input'}, but was called with other "
                "keys or values than those; undo the conversion of this layer"
            )
        if not self.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        y = self.mixer(query, key) if crosses else self.mixer(query)
        return (y if self.batch_first else y.transpose(0, 1)), None


class SwinBlock(nn.Module):
    """Where a timm ``SwinTransformerBlock`` stood, which cuts the map for its attention: (B, H, W, D) to the same.

    Its other parts, and their names, are the old block's.
    """

    def __init__(self, mixer: Mixer, like: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = like.norm1, ChannelsLast(mixer), like.drop_path1
        self.norm2, self.mlp, self.drop_path2 = like.norm2, like.mlp, like.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
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
        """(B, N, D), N = height * width -> ((B, N, D), None)."""
        if options.get("output_attentions") or records_weights(self.config):
            raise ValueError(
                "attention weights were asked for (output_attentions), which the layer that stands here does not keep: "
                "leave that out, or undo the conversion of this layer"
            )
        x = self.layernorm_before(hidden_states).unflatten(1, tuple(map(int, input_dimensions)))
        x = hidden_states + self.drop_path(self.dropout(self.attention(x).flatten(1, 2)))
        return self.dropout(self.mlp(self.layernorm_after(x))) + x, None


class ChannelsLast(nn.Module):
    """Where a torchvision ``ShiftedWindowAttention`` stood: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        y: Tensor = self.mixer(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)
