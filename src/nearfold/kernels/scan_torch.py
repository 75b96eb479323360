"""The selective scan in PyTorch, for whatever the engine does not serve: parallel over chunks of the sequence.

A loop over the positions of a chunk runs for all chunks at once, from zero; what one chunk hands to the next is then a
recurrence over chunks, solved in log2(chunks) steps; a second loop starts each chunk from its true state. Decays are
only ever multiplied, and the decay of a chunk is exp(A * sum of delta): no division, no exponential of anything
positive unless A is.

Shape legend: B batch, N positions, C channels, S states, T positions of a chunk, K chunks. The arguments B and C of the
scan are `inp` and `out` in here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._numbers import parts

CHUNK = 32
SLAB = 2**23  # numbers (chunks, B, S, C, T) that the backward holds at a time


def chunks_of(positions: int) -> int:
    """K: how many chunks N positions are."""
    return parts(positions, CHUNK)


def _chunked(x: Tensor) -> Tensor:
    """(B, N, F) -> (B, K, T, F); zeros after the last position, where delta = 0 changes no state."""
    B, N, features = x.shape
    T = min(CHUNK, N)
    K = chunks_of(N)
    if K * T > N:
        x = F.pad(x, (0, 0, 0, K * T - N))
    return x.reshape(B, K, T, features)


def _flat(steps: list[Tensor], positions: int) -> Tensor:
    """T tensors (B, K, F) -> (B, N, F)."""
    return torch.stack(steps, 2).flatten(1, 2)[:, :positions]


def _before(decay: Tensor, end: Tensor) -> Tensor:
    """x_k for every k, of x_0 = 0 and x_{k+1} = decay_k x_k + end_k; all (B, K, S, C)."""
    step = 1
    while step < end.shape[1]:
        end = torch.cat((end[:, :step], torch.addcmul(end[:, step:], decay[:, step:], end[:, :-step])), 1)
        decay = torch.cat((decay[:, :step], decay[:, step:] * decay[:, :-step]), 1)
        step *= 2
    return torch.cat((torch.zeros_like(end[:, :1]), end[:, :-1]), 1)


class _Steps:
    """The operands by chunks, and the pieces of one position of every chunk."""

    def __init__(self, u: Tensor, delta: Tensor, A: Tensor, inp: Tensor, out: Tensor) -> None:
        self.u, self.delta, self.inp, self.out = (_chunked(x) for x in (u, delta, inp, out))
        self.x = self.delta * self.u
        self.rate = A.t()
        self.T = self.u.shape[2]

    def chunks(self, first: int, last: int) -> _Steps:
        """The same of the chunks first..last."""
        part = object.__new__(_Steps)
        part.u, part.delta, part.inp, part.out, part.x = (
            x[:, first:last] for x in (self.u, self.delta, self.inp, self.out, self.x)
        )
        part.rate, part.T = self.rate, self.T
        return part

    def decay(self, t: int) -> Tensor:
        """(B, K, S, C)."""
        return (self.delta[:, :, t, None] * self.rate).exp_()

    def step(self, t: int, h: Tensor | None) -> Tensor:
        """The state after position t; None for zeros before."""
        new = self.inp[:, :, t, :, None] * self.x[:, :, t, None]
        return new if h is None else new.addcmul_(self.decay(t), h)

    def whole(self) -> Tensor:
        """The decay over a chunk."""
        return (self.delta.sum(2)[:, :, None] * self.rate).exp_()

    def read(self, t: int, h: Tensor) -> Tensor:
        """(B, K, C)."""
        return (self.out[:, :, t, None] @ h)[:, :, 0]


def forward(u: Tensor, delta: Tensor, A: Tensor, inp: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, N, C), and the states (B, K, S, C) before every chunk."""
    if u.shape[1] == 0:
        return torch.empty_like(u), u.new_empty(u.shape[0], 0, A.shape[1], A.shape[0])
    steps = _Steps(u, delta, A, inp, out)
    h: Tensor | None = None
    for t in range(steps.T):
        h = steps.step(t, h)
    assert h is not None
    states = h = _before(steps.whole(), h)
    y = []
    for t in range(steps.T):
        h = steps.step(t, h)
        y.append(steps.read(t, h))
    return _flat(y, u.shape[1]), states


def backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, inp: Tensor, out: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients at u, delta, A, inp and out."""
    N = u.shape[1]
    if u.numel() == 0 or A.numel() == 0:
        zeros = torch.zeros_like
        return zeros(u), zeros(delta), zeros(A), zeros(inp), zeros(out)
    steps = _Steps(u, delta, A, inp, out)
    upstream = _chunked(grad)
    back: Tensor | None = None  # decay times the state's gradient: what the position before receives
    for t in reversed(range(steps.T)):
        adjoint = steps.out[:, :, t, :, None] * upstream[:, :, t, None]
        back = steps.decay(t) * (adjoint if back is None else adjoint.add_(back))
    assert back is not None
    after = _before(steps.whole().flip(1), back.flip(1)).flip(1)

    B, K, S, C = states.shape
    size = max(1, SLAB // (B * S * C * steps.T))
    parts = [
        _part(
            steps.chunks(k, k + size), upstream[:, k : k + size], states[:, k : k + size], after[:, k : k + size], A.t()
        )
        for k in range(0, K, size)
    ]
    du, ddelta, dB, dC = (torch.cat([p[i] for p in parts], 1).flatten(1, 2)[:, :N] for i in range(4))
    return du, ddelta, torch.stack([p[4] for p in parts]).sum(0).t(), dB, dC


def _part(steps: _Steps, grad: Tensor, states: Tensor, back: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
    """Gradients at u, delta, inp and out (B, K, T, F) and at the rates (S, C), of some chunks."""
    before = [states]
    for t in range(steps.T):
        before.append(steps.step(t, before[-1]))
    found: tuple[list[Tensor], ...] = ([], [], [], [])
    d_rate = torch.zeros_like(rate)
    for t in reversed(range(steps.T)):
        g = grad[:, :, t]
        d_out = (before.pop() @ g[..., None])[..., 0]
        adjoint = (steps.out[:, :, t, :, None] * g[:, :, None]).add_(back)
        d_inp = (adjoint @ steps.x[:, :, t, :, None])[..., 0]
        d_x = (steps.inp[:, :, t, None] @ adjoint)[:, :, 0]
        back = adjoint.mul_(steps.decay(t))
        d_exponent = back * before[-1]
        d_delta = torch.addcmul((d_exponent * rate).sum(2), d_x, steps.u[:, :, t])
        d_rate += d_exponent.mul_(steps.delta[:, :, t, None]).sum((0, 1))
        for into, one in zip(found, (d_x * steps.delta[:, :, t], d_delta, d_inp, d_out), strict=True):
            into.append(one)
    return (*(torch.stack(each[::-1], 2) for each in found), d_rate)
