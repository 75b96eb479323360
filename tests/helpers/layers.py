"""Every named layer of nearfold.nn, and inputs of any size for it."""

from __future__ import annotations

import pytest
import torch

from nearfold.nn import (
    MLSTM,
    RWKV7,
    S4D,
    ACmix2d,
    AttentionPool,
    BlockAttention2d,
    BranchingAttention,
    BranchingConv2d,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    ConvNNAttention,
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    DeformConv2d,
    DeltaNet,
    DynamicConv2d,
    EdgeConv,
    GatedDeltaNet,
    GatedLinearAttention,
    GlobalFilter2d,
    HaloAttention2d,
    Hyena,
    Involution2d,
    KimiDeltaAttention,
    KVTAttention,
    LargeKernelConv2d,
    LinearAttention,
    MaxRelativeConv2d,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    NystromAttention,
    PerformerAttention,
    Pool2d,
    Retention,
    SelectiveScan,
    SelectiveScan2d,
    SelfAttention,
    SlidingWindowAttention,
    SpectralConv2d,
    SqueezeExcite2d,
    StridedAttention,
    TokenMixer,
)


def begun(layer):
    """A layer as after its first step: behind nets that start at zero nothing has a gradient before."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("offset_", "mask_")):
                p.add_(0.1 * torch.randn_like(p))
    return layer


IMAGES = {
    "ConvNN2d": lambda **k: ConvNN2d(4, 6, 5, **k),
    "ConvNN2d random": lambda **k: ConvNN2d(4, 6, 5, candidates="random(8)", **k),
    "ConvNN2d blend": lambda **k: ConvNN2d(4, 6, 5, similarity="blend(0.3)", candidates="grid(3)", **k),
    "ConvNN2d window": lambda **k: ConvNN2d(4, 6, 5, similarity="euclidean", candidates="window(3)", **k),
    "BranchingConv2d": lambda **k: BranchingConv2d(4, 6, 3, 5, 0.5, **k),
    "BranchingConv2d groups": lambda **k: BranchingConv2d(4, 8, (3, 1), 5, 0.25, groups=2, mix=False, **k),
    "ACmix2d": lambda **k: ACmix2d(4, 8, 7, 3, 2, **k),
    "ACmix2d dilated": lambda **k: ACmix2d(4, 8, (3, 5), 5, 4, dilation=2, **k),
    "DeformConv2d": lambda **k: DeformConv2d(4, 6, **k),
    "DeformConv2d groups": lambda **k: DeformConv2d(4, 6, (3, 5), groups=2, offset_groups=2, modulated=True, **k),
    "DCNv3": lambda **k: begun(DCNv3(4, (3, 5), groups=2, dilation=2, **k)),
    "DCNv4": lambda **k: begun(DCNv4(4, groups=4, **k)),
    "MaxRelativeConv2d": lambda **k: MaxRelativeConv2d(4, 6, 5, groups=2, **k),
    "Involution2d": lambda **k: Involution2d(4, 5, groups=2, reduction=2, **k),
    "DynamicConv2d": lambda **k: DynamicConv2d(4, 6, 5, experts=3, reduction=1, dilation=2, **k),
    "LargeKernelConv2d": lambda **k: LargeKernelConv2d(4, (13, 7), **k),
}
SEQUENCES = {
    "ConvNN1d": lambda **k: ConvNN1d(4, 6, 5, **k),
    "ConvNN1d padded": lambda **k: ConvNN1d(4, 6, 5, padding=1, candidates="grid(5)", **k),
}
TOKENS = {
    "ConvNNAttention": lambda **k: ConvNNAttention(12, 3, 5, **k),
    "ConvNNAttention separable": lambda **k: ConvNNAttention(12, 3, 5, kernel="separable", include_self=True, **k),
    "ConvNNAttention kernel": lambda **k: ConvNNAttention(12, 3, 5, kernel="kernel", rho="identity", **k),
    "ConvNNAttention plain": lambda **k: ConvNNAttention(
        12, 3, 5, kernel="none", similarity="cosine(coordinates)", **k
    ),
    "ConvNNAttention random": lambda **k: ConvNNAttention(12, 3, 5, candidates="random(6)", kernel=None, **k),
    "KVTAttention": lambda **k: KVTAttention(12, 3, 5, **k),
    "BranchingAttention": lambda **k: BranchingAttention(12, 3, 5, 0.5, **k),
    "TokenMixer": lambda **k: TokenMixer("all | causal | softmax(heads=3)", 12, **k),
    "SelfAttention": lambda **k: SelfAttention(12, 6, kv_heads=2, positions="rotary", causal=True, **k),
    "SelfAttention alibi": lambda **k: SelfAttention(12, 3, kv_heads=1, positions="alibi", **k),
    "SlidingWindowAttention": lambda **k: SlidingWindowAttention(12, 3, 4, **k),
    "StridedAttention": lambda **k: StridedAttention(12, 3, 3, **k),
    "LinearAttention": lambda **k: LinearAttention(12, 3, **k),
    "NystromAttention": lambda **k: NystromAttention(12, 3, landmarks=2, **k),
    "PerformerAttention": lambda **k: PerformerAttention(12, 3, features=5, causal=True, seed=2, **k),
    "SelectiveScan": lambda **k: SelectiveScan(12, 5, rank=2, **k),
    "SelectiveScan heads": lambda **k: SelectiveScan(12, 5, num_heads=3, reverse=True, **k),
    "DeltaNet": lambda **k: DeltaNet(12, 3, reverse=True, **k),
    "GatedDeltaNet": lambda **k: GatedDeltaNet(12, 3, 5, **k),
    "KimiDeltaAttention": lambda **k: KimiDeltaAttention(12, 3, **k),
    "Retention": lambda **k: Retention(12, 3, **k),
    "Retention gated": lambda **k: Retention(12, 3, 2, gated=True, **k),
    "GatedLinearAttention": lambda **k: GatedLinearAttention(12, 3, 5, **k),
    "MLSTM": lambda **k: MLSTM(12, 3, **k),
    "RWKV7": lambda **k: RWKV7(12, 3, 5, rank=2, **k),
    "Hyena": lambda **k: Hyena(12, 4, 16, num_heads=6, **k),
    "S4D": lambda **k: S4D(12, 4, **k),
    "S4D both ways": lambda **k: S4D(12, 4, bidirectional=True, **k),
}
OTHERS = {
    "ConvNN3d": (lambda: ConvNN3d(4, 6, 5), lambda n=4: (2, 4, n, 3, n + 1)),
    "ConvNN3d shuffled": (lambda: ConvNN3d(4, 6, 5, shuffle="both"), lambda n=4: (2, 4, 2 * n, 2, 4)),
    "NeighborhoodAttention1d": (
        lambda: NeighborhoodAttention1d(4, 2, 5, causal_axes=(0,), step=2),
        lambda n=7: (2, 4, n),
    ),
    "NeighborhoodAttention2d": (
        lambda: NeighborhoodAttention2d(4, 2, 3, dilation=2, relative_bias=True),
        lambda n=7: (2, 4, n, n + 2),
    ),
    "NeighborhoodAttention3d": (
        lambda: NeighborhoodAttention3d(4, 2, (1, 3, 3), causal_axes=(0,)),
        lambda n=4: (2, 4, n, 3, n + 1),
    ),
    "BlockAttention2d": (lambda: BlockAttention2d(4, 2, 3, shift=1), lambda n=7: (2, 4, n, n + 2)),
    "HaloAttention2d": (lambda: HaloAttention2d(4, 2, 3, (1, 2)), lambda n=7: (2, 4, n, n + 2)),
    "SqueezeExcite2d": (lambda: SqueezeExcite2d(4, 2), lambda n=7: (2, 4, n, n + 2)),
    "SqueezeExcite2d span": (lambda: SqueezeExcite2d(4, span=3), lambda n=7: (2, 4, n, n + 2)),
    "AttentionPool": (lambda: AttentionPool(12, 3, seeds=4, competing=True), lambda n=7: (2, n, 12)),
    "DeformableAttention2d": (
        lambda: begun(DeformableAttention2d(4, 2, stride=(2, 3), reach=1.5)),
        lambda n=7: (2, 4, n, n + 2),
    ),
    "Pool2d": (lambda: Pool2d(4, 3, "max", stride=2, padding=1), lambda n=7: (2, 4, n, n + 2)),
    "EdgeConv": (lambda: EdgeConv(4, 6, 5), lambda n=7: (2, 4, n)),
    "EdgeConv mean": (lambda: EdgeConv(4, 6, 5, aggregation="mean", hidden=3), lambda n=7: (2, 4, n)),
    "SelectiveScan2d": (lambda: SelectiveScan2d(4, 3), lambda n=7: (2, 4, n, n + 2)),
    "SelectiveScan2d snake": (lambda: SelectiveScan2d(4, 3, order="snake"), lambda n=7: (2, 4, n, n + 2)),
    "SpectralConv2d": (lambda: SpectralConv2d(4, 6, (2, 3)), lambda n=7: (2, 4, n, n + 2)),
    "GlobalFilter2d": (lambda: GlobalFilter2d(4, (7, 9)), lambda n=7: (2, 4, n, n + 2)),
}
# name -> (constructor, an input of it at size n)
LAYERS = (
    {name: (make, lambda n=7: (2, 4, n, n + 2)) for name, make in IMAGES.items()}
    | {name: (make, lambda n=7: (2, 4, n)) for name, make in SEQUENCES.items()}
    | {name: (make, lambda n=7: (2, n, 12)) for name, make in TOKENS.items()}
    | OTHERS
)
# the general layer, those of two inputs, those of a fixed size
APART = {
    *("Mixer", "CrossAttention", "LocalCrossAttention2d", "MultiScaleDeformableAttention"),
    *("TokenMLP", "LinformerAttention", "TokenGridAttention"),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=list(LAYERS))
