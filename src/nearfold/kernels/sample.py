"""Random candidates from a counter-based generator.

The state is a tensor (seed, draws), so that it is part of the state dict, resumes exactly, is the same on every
device and is traced by torch.compile (docs/decisions/0004).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold._scrambled import scrambled
from nearfold.kernels.operator import operator

_MASK = 0xFFFFFFFF


def draw_positions(state: Tensor, total: int, count: int) -> Tensor:
    """``count`` distinct positions of 0 .. total-1, ascending, drawn by state = (seed, draws), int64 of shape (2,).

    >>> draw_positions(torch.tensor([0, 1]), 10, 3).numel()
    3
    """
    stream = scrambled((state[0] & _MASK) ^ scrambled(state[1] & _MASK))
    keys = scrambled(scrambled(torch.arange(total, device=state.device) ^ stream) + stream & _MASK)
    # the position in the low bits makes the keys distinct, whatever order equal ones would be sorted in
    chosen = (keys * total + torch.arange(total, device=state.device)).topk(count, sorted=False).indices
    return chosen.sort().values


@operator("nearfold::drawn")
def drawn(state: Tensor) -> Tensor:
    """A copy of ``state`` for one forward pass; RuntimeError in a backward pass, which would find it moved on.

    An operator, for compiled code that recomputes a checkpointed region must come by here too.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "random candidates would be drawn anew where activation checkpointing runs this layer again in the "
            "backward pass, and gradients would be wrong: in compiled code, in checkpoints within checkpoints, without "
            "preserve_rng_state, or where torch was seeded alike for two passes. Checkpoint around this layer, or put "
            "it in evaluation mode, where all candidates are searched"
        )
    return state.clone()


@drawn.register_fake
def _(state: Tensor) -> Tensor:
    return torch.empty_like(state)
