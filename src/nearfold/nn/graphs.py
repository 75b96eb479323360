"""Graph convolutions: max-relative ones on maps, EdgeConv on sets of points.

Shape legend: B batch, C channels, N points, e coordinates, k neighbours.
"""

from __future__ import annotations

from torch import Tensor

from nearfold.grammar import Basic, Weight
from nearfold.grammar.similarity import Cosine, Euclidean
from nearfold.grammar.words import Edge, Max, Mean, Nearest, Ones, Ranked, Relative
from nearfold.kernels.names import require_tensors
from nearfold.kernels.points import nearest_in_each
from nearfold.lower.backends import edges
from nearfold.lower.call import Call
from nearfold.lower.frame import frame
from nearfold.nn.mixer import Mixer

AGGREGATIONS = {"max": Max, "mean": Mean, "sum": Ones}


class MaxRelativeConv2d(Mixer):
    """ViG's graph convolution: a map of [x_i, max (x_j - x_i)] over the k most similar positions j (arXiv 2206.00272).

    Args:
        in_channels: of the input (B, in_channels, H, W).
        out_channels: of the output (B, out_channels, H', W').
        k: neighbours, the position itself among them.
        groups: of the map; each reads its share of the channels, of both.
        stride: outputs on a strided grid.
        bias: a learned bias.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> MaxRelativeConv2d(16, 32)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int = 9,
        *,
        groups: int = 4,
        stride: int | tuple[int, int] = 1,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = Basic(Nearest(k, Cosine(), stride=stride), Ranked(), Weight(Max(), Relative(groups)))
        super().__init__(operation, in_channels, out_channels, bias=bias, backend=backend)


class EdgeConv(Mixer):
    """A perceptron of every pair of neighbouring points, f([x_i, x_j - x_i]) (arXiv 1801.07829).

    Args:
        in_channels: of the features (B, in_channels, N).
        out_channels: of the output (B, out_channels, N).
        k: neighbours, the point itself among them.
        aggregation: of the neighbours: max, mean or sum.
        hidden: channels between two maps; 0: one map, and a leaky ReLU behind it, as the paper's networks have.
        slope: of the leaky ReLU.
        bias: learned biases.

    >>> import torch
    >>> layer, x, position = EdgeConv(6, 16, k=4), torch.randn(2, 6, 50), torch.rand(2, 50, 3)
    >>> layer(x).shape, layer(x, position).shape
    (torch.Size([2, 16, 50]), torch.Size([2, 16, 50]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int = 20,
        *,
        aggregation: str = "max",
        hidden: int = 0,
        slope: float = 0.2,
        bias: bool = True,
    ) -> None:
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
        weight = Weight(AGGREGATIONS[aggregation](), Edge(hidden, slope))
        super().__init__(Basic(Nearest(k, Euclidean()), Ranked(), weight), in_channels, out_channels, ndim=1, bias=bias)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Features (B, in_channels, N) -> (B, out_channels, N).

        Neighbours are the nearest in ``position`` (B, N, e), floating point and finite; without it, in the features:
        the graph is then another one in every layer (DGCNN). No gradient flows through the choice.
        """
        if position is None:
            return super().forward(x)
        self._require(x)
        require_tensors(position=position)
        if position.dim() != 3 or (position.shape[0], position.shape[1]) != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"position must be (B, N, e), the coordinates of {x.shape[2]} points in each of {x.shape[0]} inputs,"
                f" got {tuple(position.shape)}"
            )
        operation = self.operation
        assert isinstance(operation, Basic)
        (k,) = operation.path.slot_shape(1)
        at = nearest_in_each(position, min(k, x.shape[2]))
        call = Call(frame(operation, tuple(x.shape[2:]), (), False), self.tensors(), x, None, None, x)
        return edges.bring(call, None, at[:, None])
