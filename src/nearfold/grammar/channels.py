"""Kernels over channels: maps and gates made by the input, and one-hot ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.weights import Kernel
from nearfold.grammar.word import all_ones, check, number, positive

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


@dataclass(frozen=True)
class CrossCovariance(Kernel):
    """A pointwise map of the channels of every head, made by the input: attention among channels.

    W = softmax(temperature * q k^T), (d, d) for d channels of a head, query and key normalised over the positions; one
    learned temperature for each head. Linear in the positions.

    Source: XCiT's cross-covariance attention (arXiv 2106.09681, eq. 2).
    """

    word = "cross_covariance"
    examples: ClassVar[dict[str, str]] = {
        "cross_covariance": "window(1) | box | cross_covariance(2)",
        "cross_covariance_bare": "window(1) | box | ones(project=v)*cross_covariance(4)",
    }
    dynamic = True
    primitive = ("DYNAMIC_KERNEL", 2)
    default_projections = "qkvo"
    heads: int

    def __post_init__(self) -> None:
        positive(self, heads=self.heads)

    def require(self, op: Basic) -> None:
        path, rho = op.path, op.weight.rho
        one = path.word == "window" and all_ones(getattr(path, "size", 0)) and all_ones(getattr(path, "stride", 1))
        plain = rho.word == "ones" and rho.heads == 1 and getattr(path, "padding", "same") in ("same", 0)
        if not (one and plain):
            raise ValueError(
                f"cross_covariance mixes channels, not positions: window(1) | box | cross_covariance({self.heads}), "
                f"got {op.path} and {op.weight}"
            )


@dataclass(frozen=True)
class Excite(Kernel):
    """A gate for every channel, made by the means of all channels over the map: y = value * sigmoid(f(mean)).

    f is two maps with a ReLU between, by a ``reduction`` of the channels (squeeze and excitation, arXiv 1709.01507, eq.
    3); with ``span`` a convolution without bias over so many neighbouring channels (ECA, arXiv 1910.03151, eq. 5).
    """

    word = "excite"
    examples: ClassVar[dict[str, str]] = {
        "excite": "window(1) | box | excite(4)",
        "excite_span": "window(1) | box | ones(project=v)*excite(span=3)",
    }
    dynamic = True
    primitive = ("DYNAMIC_KERNEL", 2)
    reduction: int = field(default=16, metadata={"positional": True})
    span: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, reduction=self.reduction)
        if self.span is not None:
            positive(self, span=self.span)
            check(self.span % 2 == 1, self, "span", self.span, "odd")
            check(self.reduction == 16, self, "reduction", self.reduction, "left out next to span")

    def require(self, op: Basic) -> None:
        path, rho = op.path, op.weight.rho
        one = path.word == "window" and all_ones(getattr(path, "size", 0)) and all_ones(getattr(path, "stride", 1))
        if not (one and rho.word == "ones" and rho.heads == 1 and getattr(path, "padding", "same") in ("same", 0)):
            raise ValueError(
                f"excite gates channels, not positions: window(1) | box | {self}, got {path} and {op.weight}"
            )


@dataclass(frozen=True)
class ChannelShift(Kernel):
    """Every channel reads one slot of the window, and nothing is learned: groups of channels, shifted.

    The channels are dealt to the slots in turn, the first to the last slot, evenly as torch.chunk does: the axial shift
    of AS-MLP (arXiv 2107.08391) in a window along one axis. With ``share``, this share of the channels reads the next
    position and as many the one before, along every axis on which the window's size is 3; the others read their own:
    the temporal shift (arXiv 1811.08383, share=0.125).
    """

    word = "channel_shift"
    examples: ClassVar[dict[str, str]] = {
        "channel_shift": "window((3, 2), stride=2) | box | channel_shift",
        "channel_shift_share": "window((1, 3), dilation=2) | box | ones(project=vo)*channel_shift(share=0.3)",
    }
    primitive = ("IDENTITY", 1)
    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None:
            number(self, "share", self.share)
            check(0 < self.share <= 0.5, self, "share", self.share, "above 0 and at most 0.5")
            object.__setattr__(self, "share", float(self.share))

    def require(self, op: Basic) -> None:
        path, size = op.path, getattr(op.path, "size", 0)
        if path.word != "window" or op.weight.rho.word != "ones" or op.shape.word != "box":
            raise ValueError(f"channel_shift goes with window | box and rho ones, got {op.path} and {op.weight}")
        if self.share is not None and not set(size if isinstance(size, tuple) else (size,)) <= {1, 3}:
            raise ValueError(f"channel_shift: share goes with window sizes 1 and 3, got {op.path}")
