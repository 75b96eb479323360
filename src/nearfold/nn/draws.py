"""Which candidates a layer drew, for when activation checkpointing runs its forward pass again.

A layer's own generator has moved on by then, and torch.utils.checkpoint restores torch's generators only. So a pass
that may be run again takes a number from torch's generator as a name, and finds its draw under that name the second
time. Other passes take none, and leave torch's generator as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.kernels.sample import drawn

MOST = 64  # passes whose draws are remembered; what is not found is refused, never guessed


class Draws:
    """The draws of one layer."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor | None] = {}

    def next(self, sampler: Tensor) -> Tensor:
        """(seed, draws) of this pass; counts on in ``sampler``, unless the pass is one that is run again.

        RuntimeError where a pass is run again whose draw is not known.
        """
        if torch.compiler.is_compiling():
            sampler[1:].add_(1)
            return drawn(sampler)
        again = torch._C._current_graph_task_id() != -1
        name = int(torch.randint(2**62, (), device="cpu")) if again or _may_run_again() else None
        if again:
            assert name is not None
            earlier = self._known.pop(name, None)
            return drawn(sampler) if earlier is None else earlier  # the operator refuses
        sampler[1:].add_(1)
        draw = drawn(sampler)
        if name is not None:
            # two passes of one name, as when torch is seeded between them, cannot be told apart
            self._known[name] = None if name in self._known else draw
            if len(self._known) > MOST:
                del self._known[next(iter(self._known))]
        return draw


def _may_run_again() -> bool:
    """As seen from inside, checkpointing turns gradients off (reentrant) or watches what is saved (not reentrant)."""
    watched = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return watched or not torch.is_grad_enabled()
