"""What all conversions share: the public arguments, the public parameters, and the module that holds them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.nn.mixer import Mixer, register_dotted

State = dict[str, Tensor]


class UnsupportedReference(ValueError):
    """The public layer is at fault for this configuration or input, and the fault is not reproduced."""


@dataclass(frozen=True)
class Conversion:
    """A Nearfold layer, how its parameters come from the public ones, and which inputs are refused."""

    layer: Mixer
    mapping: Callable[[State], State]
    check: Callable[[Tensor], None] = lambda x: None
    after: Callable[[Tensor, State], Tensor] | None = None  # a fault that no operation expresses


class _Read(dict[str, Tensor]):
    """A state that remembers which tensors were asked for."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


class ReferenceLayer(nn.Module):
    """The public layer's parameters (same names and shapes), computed by a Nearfold layer."""

    def __init__(self, conversion: Conversion, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            register_dotted(self, name, tensor.detach().clone())
        # kept out of the module tree: its own parameters are never used
        self._conversion = (conversion,)
        self._names = tuple(state)
        read = _Read(state)
        conversion.mapping(read)  # names and shapes are checked now, not at the first call
        self._mapped()
        unread = [name for name in state if name not in read.names]
        if unread:
            raise ValueError(f"state has {', '.join(unread)}, which config does not; pass the state dict alone")

    def _state(self) -> State:
        # by attribute: torch.func.functional_call puts plain tensors in the parameters' place
        return {name: functools.reduce(getattr, name.split("."), self) for name in self._names}  # type: ignore[misc]

    def _mapped(self) -> State:
        mapped = self._conversion[0].mapping(self._state())
        wanted = {name: tuple(p.shape) for name, p in self._conversion[0].layer.named_parameters()}
        got = {name: tuple(p.shape) for name, p in mapped.items()}
        if wanted != got:
            wrong = sorted(n for n in wanted.keys() | got.keys() if wanted.get(n) != got.get(n))
            detail = ", ".join(f"{n}: expected {wanted.get(n)}, got {got.get(n)}" for n in wrong)
            raise ValueError(f"state does not fit config ({detail}); pass the state dict of the same layer")
        return mapped

    def forward(self, x: Tensor) -> Tensor:
        """What the public layer maps: images, sequences (B, C, N) or tokens (B, N, D)."""
        conversion = self._conversion[0]
        conversion.check(x)
        y: Tensor = torch.func.functional_call(conversion.layer, self._mapped(), (x,))
        if conversion.after is None:
            return y
        return conversion.after(y, self._state())

    def to_nearfold(self) -> Mixer:
        """The Nearfold layer itself, weights copied; it no longer follows this module's parameters.

        Raises:
            UnsupportedReference: where the public layer does something no operation expresses.
        """
        if self._conversion[0].after is not None:
            raise UnsupportedReference(
                "with several heads the public ConvNN attention mixes up positions and channels when it puts the "
                "heads together; no operation does that, so the weights only work in this ReferenceLayer"
            )
        layer = copy.deepcopy(self._conversion[0].layer)
        mapped = self._mapped()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.data = mapped[name].detach().clone()
        return layer


class Config:
    """Constructor arguments, with a clear error for the missing ones."""

    def __init__(self, layer: str, values: dict[str, Any]) -> None:
        self.layer, self.values = layer, values

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"config of {self.layer} lacks {name!r}; it has: {', '.join(self.values)}")
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def choose(self, name: str, choices: dict[str, Any], *default: str) -> Any:
        chosen = self.get(name, *default) if default else self[name]
        if chosen not in choices:
            raise ValueError(f"config of {self.layer}: {name}={chosen!r} is not one of: {', '.join(choices)}")
        return choices[chosen]

    def no_dropout(self) -> None:
        if self.get("attention_dropout", 0.0):
            raise UnsupportedReference(
                f"{self.layer}: attention_dropout={self['attention_dropout']} has no counterpart here; pass 0.0 "
                "(evaluation is the same)"
            )


def random_is_refused(c: Config) -> None:
    """UnsupportedReference where the public layer draws its candidates anew at every call."""
    if c["sampling_type"] == "random":
        raise UnsupportedReference(
            f"{c.layer}: sampling_type='random' draws new candidates in evaluation too, so its output is not a "
            f"function of its input; build the layer with candidates='random({c['num_samples']})' instead"
        )
