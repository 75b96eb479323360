"""Layers: `Mixer` over any operation, and the names people type."""

from nearfold.nn.functional import knn_attention
from nearfold.nn.layers import (
    ACmix2d,
    BranchingAttention,
    BranchingConv2d,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    KVTAttention,
)
from nearfold.nn.mixer import Mixer, TokenMixer

__all__ = [
    "ACmix2d",
    "BranchingAttention",
    "BranchingConv2d",
    "ConvNN1d",
    "ConvNN2d",
    "ConvNNAttention",
    "KVTAttention",
    "Mixer",
    "TokenMixer",
    "knn_attention",
]
