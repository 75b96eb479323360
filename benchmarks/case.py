"""What a benchmark case is: ours, the peers, and what of them can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Forward = Callable[..., Tensor]
OURS = "nearfold"


def whole(y: Tensor, *inputs: Tensor) -> Tensor:
    """All of an output."""
    return y


def nothing() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True)
class Peer:
    """One that ours is compared with.

    Attributes:
        forward: inputs -> output.
        same: whether it computes what ours does; then its results are compared before any clock runs.
        backward: whether it has a backward pass.
        timed: False for one that only checks ours.
        engine: False runs it without the compiled engine.
        dtype: in which it is compared. Float64 where it can: in float32 near-ties are ranked by rounding.
        part: (output, *inputs) -> what of ours and of its output must agree.
        gradients: of the module's parameters by name, where the peer has parameters of its own.
        allocator: whether its memory comes from torch's allocator, and can be counted there.
    """

    forward: Forward
    same: bool = True
    backward: bool = True
    timed: bool = True
    engine: bool = True
    dtype: torch.dtype = torch.float64
    part: Callable[..., Tensor] = whole
    gradients: Callable[[], dict[str, Tensor]] | None = None
    allocator: bool = True


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        inputs: of every forward.
        ours: inputs -> output.
        peers: by name.
        absent: peers that are not there, and why.
        module: whose parameters' gradients are computed and compared.
        others: modules of peers.
        before: run before every call, untimed.
        backward: whether ours has a backward pass.
    """

    inputs: tuple[Tensor, ...]
    ours: Forward
    peers: dict[str, Peer]
    absent: dict[str, str] = field(default_factory=dict)
    module: nn.Module | None = None
    others: tuple[nn.Module, ...] = ()
    before: Callable[[], None] = nothing
    backward: bool = True

    def timed(self, backward: bool) -> dict[str, Peer]:
        """Ours and the peers that can be timed, forward or forward and backward."""
        everyone = {OURS: Peer(self.ours, backward=self.backward), **self.peers}
        return {n: p for n, p in everyone.items() if p.timed and (p.backward or not backward)}

    def modules(self) -> list[nn.Module]:
        """Ours and the peers'."""
        return [m for m in (self.module, *self.others) if m is not None]

    def clear(self, inputs: tuple[Tensor, ...]) -> None:
        """Before a call: no gradients held, the same random state."""
        for x in inputs:
            x.grad = None
        for module in self.modules():
            module.zero_grad(set_to_none=True)
        self.before()
