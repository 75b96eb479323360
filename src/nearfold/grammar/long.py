"""Kernels as long as the map: a number for every offset, made by a function of it or by its spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nearfold.grammar.paths import Size
from nearfold.grammar.weights import Kernel
from nearfold.grammar.word import all_ones, check, number, one_of, positive, sizes

if TYPE_CHECKING:
    from nearfold.grammar.operation import Basic


class Long(Kernel):
    """A kernel whose slots are the offsets i - j of a whole map: y_i = sum over j of W[i - j] value_j.

    With shape row the offsets are those of the grid, with causal the distances in raster order. Positions beyond the
    border read nothing, but for ``circular`` kernels: there the grid closes around its border.
    """

    everywhere = True
    circular: ClassVar[bool] = False
    shapes: ClassVar[tuple[str, ...]] = ("row", "causal")
    rhos: ClassVar[tuple[str, ...]] = ("ones", "identity")
    paths: ClassVar[tuple[str, ...]] = ("all",)
    primitive = ("SHARED_KERNEL", 1)

    def require(self, op: Basic) -> None:
        plain = all_ones(getattr(op.path, "stride", 1)) and not op.cross
        fits = one_of(op.path, self.paths) and one_of(op.shape, self.shapes) and one_of(op.weight.rho, self.rhos)
        if not (plain and fits):
            raise ValueError(
                f"{self.word} has a number for every offset of the map: it goes with path all (without stride and "
                f"cross), shape {' or '.join(self.shapes)} and rho {' or '.join(self.rhos)}, such as "
                f"all | {self.shapes[0]} | {self}; got {op}"
            )


def _length(word: Any) -> None:
    positive(word, length=word.length)
    number(word, "omega", word.omega)
    check(word.omega > 0, word, "omega", word.omega, "above 0")
    object.__setattr__(word, "omega", float(word.omega))


@dataclass(frozen=True)
class Hyena(Long):
    """One kernel per channel, made of the distance by an MLP with sines, times an exponential decay (arXiv 2302.10866).

    ``width`` numbers between its four maps, ``bands`` frequencies encode the distance, ``omega`` is where the learned
    frequencies of the sines start. Distances are measured in maps of ``length`` positions; longer maps go on. The
    channels' decays fall to a hundredth after 1.5 to 0.3 of a length. What is read is added by a learned number.

    With rho identity it is the operator with its gates, y = q * (W * (k value)): one head for every channel is Hyena's
    (order 2, without its short convolutions), fewer are the heads of arXiv 2310.18780.
    """

    word = "hyena"
    examples: ClassVar[dict[str, str]] = {
        "all_hyena": "all | causal | hyena(4, length=16)",
        "all_hyena_gates": "all(dot) | causal | identity(heads=2)*hyena(3, length=64, bands=3, omega=2.0)",
    }
    shapes = ("causal",)
    width: int
    length: int = 1024
    bands: int = 1
    omega: float = 10.0

    def __post_init__(self) -> None:
        positive(self, width=self.width, bands=self.bands)
        _length(self)


@dataclass(frozen=True)
class S4D(Long):
    """One kernel per channel, the response of a diagonal state space: 2 Re sum of C exp(A t) B, discretised.

    ``state`` numbers in conjugate pairs, held for a learned step (arXiv 2206.11893); a skip is added. With shape row
    there is a kernel for both directions of every axis, and their product is the map's (arXiv 2210.06583).
    """

    word = "s4d"
    examples: ClassVar[dict[str, str]] = {
        "all_s4d_both": "all | row | ones(project=o)*s4d(2)",
    }
    state: int

    def __post_init__(self) -> None:
        positive(self, state=self.state)
        check(self.state % 2 == 0, self, "state", self.state, "even: conjugate pairs")


@dataclass(frozen=True)
class Continuous(Long):
    """A full kernel, made of the offset by an MLP with sines: a continuous kernel (CKConv, arXiv 2102.02611).

    ``hidden`` numbers between its three maps, sin(omega (W t + b)); offsets t are measured in maps of ``length``
    positions per axis. The kernel is made for every offset and pair of channels.
    """

    word = "continuous"
    examples: ClassVar[dict[str, str]] = {
        "all_continuous_groups": "all | causal | continuous(3, length=16, omega=2.0, groups=2)",
    }
    rhos = ("ones",)
    hidden: int
    length: int = 64
    omega: float = 10.0
    groups: int = 1

    def __post_init__(self) -> None:
        positive(self, hidden=self.hidden, groups=self.groups)
        _length(self)


@dataclass(frozen=True)
class ContinuousDepthwise(Long):
    """A continuous kernel with one weight per channel and offset (arXiv 2206.03398); arguments as `continuous`."""

    word = "continuous_depthwise"
    examples: ClassVar[dict[str, str]] = {
        "all_continuous_gates": "all(cosine) | row | identity(heads=4)*continuous_depthwise(3, length=9, omega=2.0)",
    }
    hidden: int
    length: int = 64
    omega: float = 10.0

    def __post_init__(self) -> None:
        positive(self, hidden=self.hidden)
        _length(self)


@dataclass(frozen=True)
class Spectral(Long):
    """A full kernel on the grid closed around its border, with learned complex weights for its lowest frequencies.

    ``modes`` of them per axis, on every axis but the last of both signs: the spectral convolution of Fourier neural
    operators (arXiv 2010.08895). Frequencies that a map does not have are left out, so that any size is taken.
    """

    word = "spectral"
    examples: ClassVar[dict[str, str]] = {
        "all_spectral_axes": "all | row | spectral((2, 4))",
    }
    circular = True
    shapes = ("row",)
    rhos = ("ones",)
    modes: Size

    def __post_init__(self) -> None:
        sizes(self, modes=self.modes)


@dataclass(frozen=True)
class GlobalFilter(Long):
    """One kernel per channel on the grid closed around its border, by a learned complex spectrum.

    It is one for maps of ``size`` (GFNet, arXiv 2107.00645); for other maps it is interpolated (bicubic, ends kept).
    """

    word = "global_filter"
    examples: ClassVar[dict[str, str]] = {
        "all_filter_axes": "all(dot) | row | identity(heads=4)*global_filter((7, 6))",
    }
    circular = True
    shapes = ("row",)
    size: Size

    def __post_init__(self) -> None:
        sizes(self, size=self.size)
