"""Words for slots that the input moves: windows that bend, and points that each query chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nearfold.grammar.paths import UNUSED, Path, Size, Window
from nearfold.grammar.similarity import Dot, Scaled, Similarity
from nearfold.grammar.word import check, number, one_of, positive, sizes

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic

NETS = ("window", "pointwise", "depthwise")


class _Moved(Path):
    """A path whose slots lie where the input says, in groups of channels on their own."""

    primitive = ("CONTENT_AWARE", 2)
    dynamic = True
    joins = False
    shapes = ("box",)
    groups: int

    @property
    def similarity(self) -> Similarity:  # type: ignore[override]
        """Nothing is compared here."""
        return UNUSED

    @property
    def groups_of_channels(self) -> int:
        """As many as there are fields of offsets."""
        return self.groups

    def require(self, op: Basic) -> None:
        super().require(op)
        if not (one_of(op.weight.rho, ("ones", "modulated")) and op.weight.rho.heads == 1):
            raise ValueError(
                f"{self.word} goes with rho ones or modulated (groups of channels: {self.word}(3, groups=4)), got "
                f"{op.weight.rho}"
            )


@dataclass(frozen=True)
class Deformable(_Moved):
    """A window whose every slot is moved by a learned, fractional offset; values are interpolated between positions.

    The offsets are made of the input, for ``groups`` groups of channels on their own, by a ``net``: window, a
    convolution over the same window (arXiv 1703.06211); pointwise, a map of the position's own features (DCNv4, arXiv
    2401.06197); or depthwise, the same of features that a depthwise convolution over a window of this size, a norm over
    the channels and a GELU make first (DCNv3, arXiv 2211.05778). It starts at zero: as the window.
    """

    word = "deformable"
    examples: ClassVar[dict[str, str]] = {
        "deformable_groups": "deformable((3, 2), groups=2, stride=2, padding=1) | box | modulated*kernel(groups=2)",
        "deformable_bare": "deformable(3, dilation=2) | box | ones(project=v)",
        "deformable_separable": "deformable(2) | box | modulated*separable(coordinates=fourier)",
        "deformable_pointwise": "deformable((2, 3), stride=2, net=pointwise) | box"
        " | modulated(activation=softmax)*kernel",
        "deformable_features": "deformable(2, groups=4, stride=2, dilation=2, net=depthwise) | box"
        " | modulated(project=o)",
    }
    size: Size
    stride: Size = 1
    dilation: Size = 1
    padding: Size | str = "same"
    groups: int = 1
    net: str = "window"

    def __post_init__(self) -> None:
        window = Window(self.size, stride=self.stride, dilation=self.dilation, padding=self.padding)
        assert window.mode == "zeros"
        positive(self, groups=self.groups)
        check(self.net in NETS, self, "net", self.net, ", ".join(NETS[:-1]) + f" or {NETS[-1]}")
        same = self.net == "window" or self.padding == "same"
        check(same, self, "padding", self.padding, f"same with net={self.net}")


@dataclass(frozen=True)
class Points(_Moved):
    """``count`` points that each query chooses around itself; values are interpolated between positions.

    A pointwise map of the query's features makes their offsets, in positions, for ``groups`` groups of channels on
    their own: Deformable DETR's attention on one map (arXiv 2010.04159, eq. 2), with `modulated` for its weights. At
    first the groups' points go off in different directions, one after another. With ``cross`` values are those of the
    context, a map of any size, on which a query lies where it lies on its own, by shares of the axes. With ``levels``
    the context is a list of so many maps, with ``count`` points on each (eq. 3).
    """

    word = "points"
    examples: ClassVar[dict[str, str]] = {
        "points_bare": "points(3, groups=2) | box | ones",
        "points_cross": "points(2, groups=2, cross) | box | modulated(activation=softmax, project=vo)",
        "points_kernel": "points(3, groups=2) | box | modulated(activation=none)*kernel(groups=4)",
    }
    places = True
    count: int
    groups: int = 1
    levels: int = 1
    cross: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, count=self.count, groups=self.groups, levels=self.levels)
        check(self.levels == 1 or self.cross, self, "levels", self.levels, "left out without cross: x is one map")

    def slot_shape(self, ndim: int) -> tuple[int, ...]:
        return (self.levels * self.count,)


@dataclass(frozen=True)
class Sampled(Path):
    """Keys and values read at points of a grid, every ``step`` positions, that the input moves: all queries share them.

    A net moves them, for ``groups`` groups of heads on their own, by at most ``reach`` steps: a depthwise convolution
    of the queries over a window of ``size``, every ``step`` positions, a GELU and a pointwise map, the same for all
    groups, then a tanh. Points beyond the map read its border. With ``bias=n`` scores get a number for each head and
    offset, of a table for maps of n positions an axis (2 n - 1 offsets), interpolated where a point lies and, by shares
    of the axes, on maps of other sizes. Deformable attention (DAT, arXiv 2201.00520, eq. 4 to 8).
    """

    word = "sampled"
    examples: ClassVar[dict[str, str]] = {
        "sampled_groups": "sampled(3, dot, groups=2, size=3, reach=2.0) | row | softmax(heads=4)",
        "sampled_axes": "sampled((2, 3)) | row | softmax(heads=2, scale=0.5, project=qk)",
        "sampled_bias": "sampled(2, groups=2, bias=3) | row | softmax(heads=4, scale=0.5)",
    }
    primitive = ("CONTENT_AWARE", 2)
    dynamic = True
    takes_keys = False  # a point may lie between a position that is there and one that is not
    shapes = ("row",)
    rhos = ("softmax",)
    takes_kernel = False
    joins = False
    step: Size
    similarity: Similarity = field(default=Scaled(), metadata={"positional": True})
    groups: int = 1
    size: int = 5
    reach: float = 1.0
    bias: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes(self, step=self.step)
        positive(self, groups=self.groups, size=self.size)
        check(self.size % 2 == 1, self, "size", self.size, "odd")
        check(type(self.bias) is int and self.bias >= 0, self, "bias", self.bias, "an integer >= 0")
        number(self, "reach", self.reach)
        check(self.reach >= 0, self, "reach", self.reach, "0 or more")
        object.__setattr__(self, "reach", float(self.reach))
        plain = isinstance(self.similarity, (Dot, Scaled)) and not (
            self.similarity.placed or self.similarity.relative or self.similarity.bias != "none"
        )
        check(plain, self, "similarity", str(self.similarity), "dot or scaled, without places and biases")

    def require(self, op: Basic) -> None:
        super().require(op)
        if op.heads % self.groups or op.weight.rho.kv is not None:
            raise ValueError(f"sampled: groups={self.groups} must divide the heads, without kv; got {op.weight}")
