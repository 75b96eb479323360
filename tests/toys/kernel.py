"""A kernel of somebody's own: a full one of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from nearfold.extend import Kernel, KernelMeaning, Parameter, positive, register


@dataclass(frozen=True)
class LowRank(Kernel):
    """``rank`` maps of what the slots read, and a map from them to the channels."""

    word = "lowrank"
    primitive = ("SHARED_KERNEL", 1)
    examples: ClassVar[dict[str, str]] = {
        "lowrank": "window(3) | box | lowrank(2)",
        "lowrank_attention": "window(3) | box | softmax(heads=2)*lowrank(2)",
        "lowrank_nearest": "nearest(4, cosine) | ranked | lowrank(1)",
        "lowrank_block": "block(2) | box | mean*lowrank(3)",
    }
    rank: int

    def __post_init__(self):
        positive(self, rank=self.rank)


class LowRankMeaning(KernelMeaning):
    maps_channels = True
    bias_of = "weight"

    def parameters(self, op, sizes):
        rank, slots = op.weight.kernel.rank, op.path.slot_shape(sizes.ndim)
        return {
            "weight": Parameter((rank, sizes.inner, *slots), "uniform", sizes.inner * math.prod(slots)),
            "left_weight": Parameter((sizes.out_channels, rank), "uniform", rank),
        }

    def weight(self, call):
        return torch.einsum("or,rc...->oc...", call.params["left_weight"], call.params["weight"]), 1

    def made(self, call):
        return call.params["left_weight"].shape[0]


register(LowRank, LowRankMeaning())
