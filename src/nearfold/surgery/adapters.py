"""Modules that answer to the calls of the attention layers they replace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.grammar import Basic, Operation
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import All, Box, Nearest, Ranked, Row, Softmax
from nearfold.nn.mixer import Mixer, TokenMixer


def _require_no_mask(mixer: Mixer, **masks: Any) -> None:
    given = [name for name, mask in masks.items() if mask is not None and mask is not False]
    if given:
        raise ValueError(
            f"{given[0]} was given to {mixer.operation}, whose words say what it sees: leave the mask out, write shape "
            "causal into the operation, or undo the conversion of this layer"
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
    plain = isinstance(rho, Softmax) and rho == Softmax(rho.heads)
    if isinstance(path, Nearest):
        same = path in (Nearest(path.k, Scaled()), Nearest(path.k, Scaled(), cross=True))
        return plain and same and path.k >= keys and isinstance(op.shape, Ranked | Box)
    return plain and path in (All(), All(cross=True)) and isinstance(op.shape, Row)


def attend(mixer: Mixer, x: Tensor, mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
    """Plain attention with the layer's weights, a mask as `F.scaled_dot_product_attention` has it, and dropout."""
    own, heads = mixer.tensors(), mixer.operation.heads  # type: ignore[attr-defined]
    q, k, v = (
        F.linear(x, own[f"{name}_weight"], own.get(f"{name}_bias")).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    return F.linear(y.transpose(1, 2).flatten(2), own["out_weight"], own.get("out_bias"))


class TokenAttention(nn.Module):
    """Where a timm ``Attention`` stood: (B, N, D) -> (B, N, D), with its dropout after the projection."""

    def __init__(self, mixer: TokenMixer, dropout: nn.Module, weights_dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer, self.proj_drop, self.weights_dropout = mixer, dropout, weights_dropout

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        rate = self.weights_dropout if self.training else 0.0
        if (attn_mask is not None or is_causal or rate) and dense(self.mixer.operation, x.shape[-2]):
            return self.proj_drop(attend(self.mixer, x, attn_mask, is_causal, rate))
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
