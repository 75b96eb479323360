"""Layers of the public code by class name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nearfold.compat import acmix, attention, convnn
from nearfold.compat.reference import Config, Conversion, ReferenceLayer, State


def from_reference(layer: str, config: dict[str, Any], state: State) -> ReferenceLayer:
    """Build our layer from a public one.

    Args:
        layer: class name: one of `LAYERS`.
        config: its constructor arguments.
        state: its state dict.

    Raises:
        UnsupportedReference: for a fault of the public code that is not reproduced, with the reason.
        ValueError: for an unknown layer, missing arguments, or a state that does not fit.

    >>> import torch
    >>> state = {f"W_{c}.weight": torch.randn(8, 8) for c in "qkvo"}
    >>> config = {"d_hidden": 8, "num_heads": 2, "attention_dropout": 0.0}
    >>> from_reference("MultiHeadAttention", config, state)(torch.randn(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """
    if layer not in LAYERS:
        raise ValueError(f"layer={layer!r} is not known; choose from: {', '.join(LAYERS)}")
    try:
        return ReferenceLayer(LAYERS[layer](Config(layer, config), state), state)
    except KeyError as e:
        raise ValueError(f"state of {layer} lacks {e.args[0]!r}; it has: {', '.join(state)}") from None
    except RuntimeError as e:  # shapes that do not multiply
        raise ValueError(f"state of {layer} does not fit config ({e})") from e


LAYERS: dict[str, Callable[[Config, State], Conversion]] = {
    "Conv1d_NN": convnn.convnn(1),
    "Conv2d_NN": convnn.convnn(2),
    "Conv2d_NN_Attn": convnn.convnn_attention_2d,
    "Conv1d_Branching": convnn.branching(1),
    "Conv2d_Branching": convnn.branching(2),
    "Conv2d_Attn_Branching": convnn.branching(2),
    "MultiHeadAttention": attention.attention,
    "MultiHeadConvNNAttention": attention.convnn_attention,
    "MultiHeadConvNNAttention_Old": attention.convnn_attention,
    "MultiHeadConvNNAttention_Sampled": attention.convnn_attention,
    "MultiHeadKvtAttention": attention.kvt,
    "MultiHeadSparseAttention": attention.sparse,
    "MultiHeadBranchingAttention": attention.branching_attention,
    "ACmix": acmix.acmix,
}
"""What reproduces each public layer, by the name of its class."""
