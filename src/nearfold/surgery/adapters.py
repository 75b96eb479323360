"""Modules that answer to the calls of the attention layers they replace."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nearfold.nn.mixer import Mixer, TokenMixer


def _require_no_mask(mixer: Mixer, **masks: Any) -> None:
    given = [name for name, mask in masks.items() if mask is not None and mask is not False]
    if given:
        raise ValueError(
            f"{given[0]} was given to {mixer.operation}, whose words say what it sees: leave the mask out, write shape "
            "causal into the operation, or undo the conversion of this layer"
        )


class TokenAttention(nn.Module):
    """Where a timm ``Attention`` stood: (B, N, D) -> (B, N, D), with its dropout after the projection."""

    def __init__(self, mixer: TokenMixer, dropout: nn.Module) -> None:
        super().__init__()
        self.mixer, self.proj_drop = mixer, dropout

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        _require_no_mask(self.mixer, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.mixer(x))


class PairAttention(nn.Module):
    """Where a transformers ``ViTAttention`` stood: (B, N, D) -> (output, None)."""

    def __init__(self, mixer: TokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        """(B, N, D) -> ((B, N, D), None): there are no attention weights to return."""
        _require_no_mask(self.mixer, attention_mask=attention_mask, output_attentions=options.get("output_attentions"))
        return self.mixer(hidden_states), None


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


class ChannelsLast(nn.Module):
    """Where a torchvision ``ShiftedWindowAttention`` stood: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        y: Tensor = self.mixer(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)
