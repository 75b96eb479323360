"""Layers: `Mixer` over any operation, and the names people type."""

from nearfold.nn.acmix import ACmix2d
from nearfold.nn.attention import (
    BlockAttention2d,
    CrossAttention,
    LinearAttention,
    LocalCrossAttention2d,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    SelfAttention,
    SlidingWindowAttention,
    StridedAttention,
    TokenMLP,
)
from nearfold.nn.beside import TokenGridAttention
from nearfold.nn.deformable import DCNv3, DCNv4, DeformableAttention2d, MultiScaleDeformableAttention
from nearfold.nn.fast import (
    MLSTM,
    RWKV7,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    Retention,
)
from nearfold.nn.fewer import (
    AttentionPool,
    HaloAttention2d,
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
    SqueezeExcite2d,
)
from nearfold.nn.functional import deform_attn, deform_conv, knn_attention
from nearfold.nn.graphs import EdgeConv, MaxRelativeConv2d
from nearfold.nn.layers import (
    BranchingAttention,
    BranchingConv2d,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    ConvNNAttention,
    KVTAttention,
)
from nearfold.nn.long import S4D, GlobalFilter2d, Hyena, SpectralConv2d
from nearfold.nn.mixer import Mixer, TokenMixer, no_weight_decay, select_in_float32
from nearfold.nn.scans import SelectiveScan, SelectiveScan2d
from nearfold.nn.windows import DeformConv2d, DynamicConv2d, Involution2d, LargeKernelConv2d, Pool2d

__all__ = [
    "MLSTM",
    "RWKV7",
    "S4D",
    "ACmix2d",
    "AttentionPool",
    "BlockAttention2d",
    "BranchingAttention",
    "BranchingConv2d",
    "ConvNN1d",
    "ConvNN2d",
    "ConvNN3d",
    "ConvNNAttention",
    "CrossAttention",
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformableAttention2d",
    "DeltaNet",
    "DynamicConv2d",
    "EdgeConv",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GlobalFilter2d",
    "HaloAttention2d",
    "Hyena",
    "Involution2d",
    "KVTAttention",
    "KimiDeltaAttention",
    "LargeKernelConv2d",
    "LinearAttention",
    "LinformerAttention",
    "LocalCrossAttention2d",
    "MaxRelativeConv2d",
    "Mixer",
    "MultiScaleDeformableAttention",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "NystromAttention",
    "PerformerAttention",
    "Pool2d",
    "Retention",
    "SelectiveScan",
    "SelectiveScan2d",
    "SelfAttention",
    "SlidingWindowAttention",
    "SpectralConv2d",
    "SqueezeExcite2d",
    "StridedAttention",
    "TokenGridAttention",
    "TokenMLP",
    "TokenMixer",
    "deform_attn",
    "deform_conv",
    "knn_attention",
    "no_weight_decay",
    "select_in_float32",
]
