"""What a run shows, and the calls that it is in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn

from nearfold.recognise.compared import Compared
from nearfold.recognise.foreign import Match
from nearfold.recognise.place import Place


@dataclass
class Observation:
    """What a run showed, by the layers' names.

    Attributes:
        ran: layers and containers that were called.
        flops: multiply and add as two, in the layer, for one input.
        fields: behind the layer, as they are printed.
        linears: what lies along the last axis of an nn.Linear's input: channels, positions, all (every position
            and channel, flattened) or both (positions that were gathered).
        calls: what a call replaces: another `Match`, or the reason why there is none.
        glue: operations that mix positions in the forward of a container or an unknown layer itself, by its name, and
            how often.
        compared: attention that such a forward was seen to be made of; its operations are no glue.
        lies: where the entries of a module's input come from: of its first call, the first map or sequence it is given.
        means: containers whose own forward takes the mean over positions: the field behind it, and of which it is.
    """

    ran: set[str] = field(default_factory=set)
    flops: dict[str, int] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    linears: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Match | str] = field(default_factory=dict)
    glue: dict[str, Counter[str]] = field(default_factory=dict)
    compared: dict[str, Compared] = field(default_factory=dict)
    lies: dict[str, Place] = field(default_factory=dict)
    means: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(eq=False)
class Frame:
    """A call of a module that has not returned yet.

    Attributes:
        module: of the copy.
        flops: when it began.
        given: its tensors.
        position: of the first of them, where it is known.
        called: names of layers that have returned in it.
        compared: whether it has attended already.
    """

    module: nn.Module
    flops: int
    given: list[Tensor]
    position: Tensor | None
    called: list[str] = field(default_factory=list)
    compared: bool = False
