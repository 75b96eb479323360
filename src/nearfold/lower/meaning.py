"""What a word means as tensors: one class for each kind of word, and the table of them.

A path, a rho or a kernel says all that it means in one class, in a file of `nearfold.lower.words` or outside the
package (`nearfold.extend`). The rest of `lower` asks `meaning(word)` and never which word it is. Every method gets what
it works on as an argument: there is one meaning for all operations that have the word.

Shape legend: B batch, C channels, H heads, O output channels, M outputs, N positions, S slots, `out` the output grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from nearfold._numbers import parts
from nearfold.grammar.word import Word, as_tuple
from nearfold.grammar.words import Kernel, Path, Rho

if TYPE_CHECKING:
    from nearfold.grammar import Basic
    from nearfold.lower.call import Call
    from nearfold.lower.parameters import Parameter
    from nearfold.lower.selection import Selection

Lengths = tuple[int, ...]
"""Of a grid's axes."""


@dataclass(frozen=True)
class Sizes:
    """What the shapes of parameters follow from.

    Attributes:
        in_channels: of the input.
        out_channels: of the output.
        inner: channels of query, key and value.
        ndim: grid axes.
        bias: whether maps have biases.
    """

    in_channels: int
    out_channels: int
    inner: int
    ndim: int
    bias: bool


class Meaning:
    """What all kinds of words say."""

    generating: ClassVar[tuple[str, ...]] = ()
    """Parameters, without _weight and _bias, of which what a slot reads or weighs is made anew for every input."""

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        """The parameters that the word brings along, in the order in which they are drawn."""
        return {}


class PathMeaning(Meaning):
    """What a path means. The defaults are a path's that answers at every stride-th position of the input's grid."""

    groups: ClassVar[str] = "heads"  # what its groups of channels that look on their own are called
    table: ClassVar[bool] = False  # whether its slots' positions are whole and follow from the grid alone
    everywhere: ClassVar[bool] = False  # whether all positions play a part, whatever they hold
    pieces: ClassVar[bool] = False  # whether it parts the map into pieces that nobody looks out of
    slots: ClassVar[str] = ""  # how it has a window's slots: by "place", by "rank" of their distance, or not at all
    planes: ClassVar[bool] = False  # whether its backends read maps, not rows of channels

    def is_table(self, path: Any) -> bool:
        """Whether the positions of its slots are whole and follow from the grid alone."""
        return self.table

    def output(self, op: Basic, grid: Lengths) -> Lengths:
        """The output grid; ValueError where there is none."""
        stride = as_tuple(getattr(op.path, "stride", 1), len(grid), "stride")
        return tuple(parts(n, s) for n, s in zip(grid, stride, strict=True))

    def border(self, op: Basic) -> int:
        """Zero inputs that it adds on every side of the grid, and that can be read like any other."""
        return 0

    def fill(self, op: Basic, grid: Lengths) -> Lengths:
        """Zero inputs that it adds behind the end of every axis."""
        return (0,) * len(grid)

    def fit(self, op: Basic, grid: Lengths, source: Lengths, drawing: bool) -> Basic:
        """The operation with no more slots than the map can fill; itself where it has no more.

        ``source`` is the grid of keys and values, a border included; ``drawing``: random candidates are drawn.
        """
        return op

    def narrow(self, fitted: Basic, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters without what `fit` left out."""
        return params

    def unfilled(self, op: Basic, grid: Lengths, context: Lengths | None) -> str | None:
        """One sentence where it asks for more slots than there are positions to fill them."""
        return None

    def takes_mask(self, op: Basic) -> bool:
        """Whether a call may say which keys each query reads."""
        return False

    def select(self, call: Call) -> Selection:
        """What every slot reads."""
        raise NotImplementedError

    def own(self, call: Call) -> Tensor:
        """Raster positions (M,) of the queries among the values."""
        return call.query_index()

    def allowed(self, call: Call, query_M: Tensor, key_N: Tensor) -> Tensor | None:
        """Which keys a query may read at all (M, N); None for every one."""
        return call.op.shape.allows(query_M, key_N)

    def bias(self, op: Basic, params: dict[str, Tensor], grid: Lengths, query_M: Tensor, like: Tensor) -> Tensor:
        """What a similarity with a bias adds to the scores (H, M, S)."""
        raise NotImplementedError

    # of a table

    def index(self, op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
        """Raster positions (M, S) that the slots read, ``missing`` where they read none, and which read one."""
        raise NotImplementedError

    def home(self, op: Basic, grid: Lengths, device: torch.device) -> Tensor:
        """Raster positions (M,) of the queries."""
        raise NotImplementedError


class RhoMeaning(Meaning):
    """What a rho means. A rho gives `weigh` where it reads scores, `constant` where it reads none, or both."""

    per_slot: ClassVar[bool] = False  # whether its parameters hold a number for each slot
    apart: ClassVar[bool] = False  # whether each channel is weighed by nothing but itself
    first: ClassVar[float | None] = None  # alpha of every slot in a new layer, where it is one number
    takes_mask: ClassVar[bool] = True  # whether a call may say which keys each query reads
    adds: ClassVar[bool] = False  # whether a call may add numbers to the scores that it weighs by
    shares: ClassVar[bool] = False  # whether a query's weights are made of its scores and add up to one

    def start(self, op: Basic, ndim: int) -> float | None:
        """Alpha of every slot in a new layer on so many grid axes, where it is one number."""
        return self.first

    def output(self, op: Basic, grid: Lengths, out: Lengths) -> Lengths:
        """The output grid, where it is another one than the path's, ``out``."""
        return out

    def queries(self, call: Call) -> Tensor:
        """The positions (M,) that path `all` answers for."""
        return call.query_index()

    def looks(self, rho: Any, heads: int, channels: int) -> int:
        """How many groups of channels have an alpha of their own, where the layer has so many heads."""
        return heads

    def weigh(self, rho: Any, score: Tensor, valid: Tensor) -> Tensor:
        """Scores (B, H, M, S), -inf where they are not ``valid``, to alpha, zero there."""
        raise NotImplementedError

    def weigh_fast(self, rho: Any, score: Tensor, valid: Tensor) -> Tensor:
        """The same for the fast backends, where there is a faster way."""
        return self.weigh(rho, score, valid)

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor | None:
        """Alpha (B|1, H|1, M, S) made of the call, zero where not ``valid``; None where it is made of the scores."""
        return None

    def finish(self, call: Call, y: Tensor) -> Tensor:
        """What it adds to the output (B, O, *out)."""
        return y


class KernelMeaning(Meaning):
    """What a kernel means. The defaults are those of one that leaves the channels as they are."""

    maps_channels: ClassVar[bool] = False  # whether it makes the output's channels of those that it reads
    reads_features: ClassVar[bool] = False  # whether it reads query and key beside the value
    of_the_map: ClassVar[bool] = False  # whether its numbers are made of all positions of the input
    bias_of: ClassVar[str] = "weight"  # the parameter that its bias is drawn like; empty: it has none
    late_bias: ClassVar[bool] = False  # whether `finish` must have happened before a bias can be added

    def messages(self, call: Call, read_BCMS: Tensor, own_BCM1: Tensor) -> Tensor:
        """What slots bring (B, C', M, S) of what they read and the query's own value, of a kernel with ``edges``."""
        return read_BCMS

    def groups(self, kernel: Any, channels: int) -> int | None:
        """In how many groups of so many channels it maps them, as a convolution does; None where it is no such map."""
        return None

    def copies(self, kernel: Any) -> int:
        """How many such maps it has."""
        return 1

    def neutral(self, op: Basic, specs: dict[str, Parameter]) -> dict[str, Tensor] | None:
        """Values of its parameters with which it sums its slots up, channel by channel; None where there are none."""
        return None

    def fill_plain(self, kernel: Any, weight: Tensor, each: float) -> None:
        """Write into its parameter `weight` numbers that add up its slots, ``each`` times, channel by channel."""
        out = torch.arange(len(weight))
        weight.zero_()[out, out % weight.shape[1]] = each

    def reads_more(self, kernel: Any) -> bool:
        """Whether the slots read anything but the value: `values` then says what."""
        return False

    def values(self, call: Call) -> Tensor:
        """What the slots read (B, C, N)."""
        return call.value.flatten(2)

    def weight(self, call: Call) -> tuple[Tensor, int] | None:
        """The kernel as (O, C / groups, *slots), and its groups; None without one."""
        return call.params["weight"], call.params["weight"].shape[0]

    def finish(self, call: Call, y: Tensor, with_bias: bool = True) -> Tensor:
        """What follows the sum over slots: (B, O, *out) -> (B, O, *out)."""
        bias = call.params.get("bias")
        return y if bias is None or not with_bias else y + bias.view(-1, *(1,) * call.ndim).to(y.dtype)

    def blocks(self, call: Call) -> Tensor | None:
        """The kernel of every input by groups of channels (B|1, G, O / G, C / G, S); None without one."""
        found = self.weight(call)
        return None if found is None else found[0].flatten(2).unflatten(0, (found[1], -1))[None]

    def made(self, call: Call) -> int:
        """Output channels, before an output projection."""
        return call.params["weight"].shape[0] if self.maps_channels else call.value.shape[1]


MEANINGS: dict[type, Any] = {}
M = TypeVar("M", bound=Meaning)


def means(*words: type) -> Callable[[type[M]], type[M]]:
    """Register a class as the meaning of words; it takes no arguments."""

    def register(cls: type[M]) -> type[M]:
        for word in words:
            MEANINGS[word] = cls()
        return cls

    return register


@overload
def meaning(word: Path) -> PathMeaning: ...
@overload
def meaning(word: Rho) -> RhoMeaning: ...
@overload
def meaning(word: Kernel | None) -> KernelMeaning: ...
@overload
def meaning(word: Word | None) -> Any: ...


def meaning(word: Word | None) -> Any:
    """What a word means; a class that derives from a word means the same, unless it is registered itself.

    Raises:
        ValueError: for a word from outside whose meaning nobody registered.
    """
    found = MEANINGS.get(type(word))
    if found is not None:
        return found
    for base in type(word).__mro__:
        if base in MEANINGS:
            return MEANINGS[base]
    assert word is not None
    raise ValueError(
        f"{word.kind} {word.word} has no meaning yet: register one for {type(word).__name__} with nearfold.extend"
    )
