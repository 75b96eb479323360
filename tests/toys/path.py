"""A path of somebody's own: the k positions of the largest salience, a learned map; outputs on half the grid.

Shape legend: B batch, N positions, M outputs, k slots.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from nearfold.extend import Path, PathMeaning, Selection, linear, positive, register


@dataclass(frozen=True)
class Salient(Path):
    """The k positions of the largest salience, for all queries alike."""

    word = "salient"
    shapes = ("ranked",)
    primitive = ("SALIENT", 2)
    dynamic = True
    examples: ClassVar[dict[str, str]] = {
        "salient": "salient(3) | ranked | mean(project=v)",
        "salient_softmax": "salient(50) | ranked | softmax(heads=2)*depthwise",
    }
    k: int

    def __post_init__(self):
        positive(self, k=self.k)

    def slot_shape(self, ndim):
        return (self.k,)


class SalientMeaning(PathMeaning):
    generating = ("salience",)

    def parameters(self, op, sizes):
        return linear("salience", 1, sizes.in_channels, sizes.bias)

    def output(self, op, grid):
        return tuple(-(-n // 2) for n in grid)

    def fit(self, op, grid, source, drawing):
        k = min(op.path.k, math.prod(source))
        return op if k == op.path.k else dataclasses.replace(op, path=dataclasses.replace(op.path, k=k))

    def narrow(self, fitted, params):
        return params | {"weight": params["weight"][..., : fitted.path.k]} if "weight" in params else params

    def select(self, call):
        rows_BNC, outputs = call.x.flatten(2).mT, math.prod(call.out_grid)
        salience_BN = F.linear(rows_BNC, call.params["salience_weight"], call.params.get("salience_bias")).squeeze(2)
        missing = max(0, call.op.path.k - salience_BN.shape[1])  # where a graph is for several sizes
        score_Bk, index_Bk = F.pad(salience_BN, (0, missing), value=float("-inf")).topk(call.op.path.k, -1)
        score, index = (t[:, None, None].expand(-1, 1, outputs, -1) for t in (score_Bk, index_Bk))
        valid = index < rows_BNC.shape[1]
        return Selection(index.masked_fill(~valid, 0), valid, score, rows_BNC.shape[1])


register(Salient, SalientMeaning())
