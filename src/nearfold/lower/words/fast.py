"""`additive`, `delta`, `mlstm` and `rwkv7`: matrices that a scan writes and reads.

Each says what its steps are made of; alpha is made of them here, one step after the other, and by the backend at once.

Shape legend: B batch, C channels, H heads, N positions in the order of the scan, s numbers of a state, p channels of a
head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import MLSTM, RWKV7, Additive, Delta, Scan
from nearfold.lower.call import Call
from nearfold.lower.meaning import RhoMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, linear
from nearfold.lower.weighting import wide_dtype
from nearfold.lower.words.scan import visited

RANK = 16  # of gated linear attention's decays, and the root that is taken of them
SLOWEST = math.exp(-0.5)  # of RWKV-7: a feature keeps exp(-exp(-0.5)) of its state at least


Operands = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # of `fast_weights`, in its order


@dataclass
class Steps:
    """What `nearfold.kernels.fast_weights.fast_weights` takes; ``own`` (B, N, H) is what a position reads of itself."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    own: Tensor | None = None

    def operands(self) -> Operands:
        """In the order of the kernel's arguments."""
        return self.query, self.key, self.value, self.log_decay, self.beta, self.left, self.right


@dataclass
class Along:
    """A call's positions in the order of the scan: input (B, N, C), value (B, N, H, p), which are there (B, N)."""

    x: Tensor
    value: Tensor
    keep: Tensor | None
    params: dict[str, Tensor]
    heads: int
    wide: torch.dtype

    def heads_of(self, made: Tensor) -> Tensor:
        """(B, N, H s) -> (B, N, H, s), in float32 at least."""
        return made.unflatten(2, (self.heads, -1)).to(self.wide)

    def map(self, name: str, x: Tensor | None = None) -> Tensor:
        """A pointwise map of the input, or of x."""
        return F.linear(self.x if x is None else x, self.params[f"{name}_weight"], self.params.get(f"{name}_bias"))

    def rows(self, name: str) -> Tensor:
        """A pointwise map of the input, by heads."""
        return self.heads_of(self.map(name))

    def param(self, name: str) -> Tensor:
        """A parameter in float32 at least."""
        return self.params[name].to(self.wide)

    def absent(self, x: Tensor | None, fill: float = 0.0) -> Tensor | None:
        """x (B, N, ...), ``fill`` where no position is."""
        if x is None or self.keep is None:
            return x
        return x.masked_fill(~self.keep.view(*self.keep.shape, *(1,) * (x.dim() - 2)), fill)

    def time(self) -> Tensor:
        """How many positions came before (B|1, N), which are there."""
        if self.keep is not None:
            return self.keep.cumsum(1) - 1
        return torch.arange(self.x.shape[1], device=self.x.device)[None]


def along(call: Call) -> Along:
    """A call in the order of its scan."""
    x_BNC, value_BNC, keep = call.x.flatten(2).mT, call.value.flatten(2).mT, call.keep
    order = visited(cast(Scan, call.op.path), call.grid, value_BNC.device)
    if order is not None:
        x_BNC, value_BNC, keep = x_BNC[:, order], value_BNC[:, order], None if keep is None else keep[:, order]
    heads, wide = call.op.weight.heads, wide_dtype(call)
    return Along(x_BNC, value_BNC.unflatten(2, (heads, -1)).to(wide), keep, call.params, heads, wide)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| along the last axis, with a gradient at zero."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


class FastMeaning(RhoMeaning):
    """What the steps of a rho are, and what follows them."""

    def queries_and_keys(self, op: Basic, sizes: Sizes, query: str = "q_proj") -> dict[str, Parameter]:
        """The two maps that all of them have."""
        made = op.weight.heads * cast(Scan, op.path).state
        return linear(query, made, sizes.in_channels, False) | linear("k_proj", made, sizes.in_channels, False)

    def steps(self, call: Call, at: Along) -> Steps:
        """Of a call, a step that changes nothing where no position is."""
        raise NotImplementedError

    def result(self, steps: Steps, y_BNHp: Tensor) -> Tensor:
        """What the layer makes of what was read."""
        return y_BNHp if steps.own is None else y_BNHp + steps.own[..., None] * steps.value

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        """From the recurrence: alpha (B, H, N, N), positions in raster order."""
        alpha = self.alpha(self.steps(call, along(call)))
        order = visited(cast(Scan, call.op.path), call.grid, valid.device)
        if order is not None:
            time_N = order.argsort()
            alpha = alpha[:, :, time_N][..., time_N]
        return alpha * valid

    def alpha(self, steps: Steps) -> Tensor:
        """What every position still has of every earlier one's key, read by its query: (B, H, N, N)."""
        query, key, decay, beta, left, right = (
            None if x is None else x.transpose(1, 2)
            for x in (steps.query, steps.key, steps.log_decay, steps.beta, steps.left, steps.right)
        )
        assert query is not None and key is not None
        N, lines = query.shape[2], []
        held_BHns = key[:, :, :0]
        for t in range(N):
            kept = held_BHns if decay is None else held_BHns * decay[:, :, t, None].exp()
            own = key[:, :, t, None]
            if beta is not None:
                share = beta[:, :, t, None, None]
                kept, own = kept - share * (kept * own).sum(-1, keepdim=True) * own, share * own
            if left is not None and right is not None:
                read = (held_BHns * right[:, :, t, None]).sum(-1, keepdim=True)
                kept = kept + read * left[:, :, t, None]
            held_BHns = torch.cat([kept, own], 2)
            lines.append(F.pad((held_BHns * query[:, :, t, None]).sum(-1), (0, N - 1 - t)))
        alpha = torch.stack(lines, 2)
        return alpha if steps.own is None else alpha + torch.diag_embed(steps.own.transpose(1, 2))


@means(Additive)
class AdditiveMeaning(FastMeaning):
    """Retention, gated retention, gated linear attention."""

    generating = ("q_proj", "k_proj", "g_proj", "g_down", "g_up")

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        rho, found = cast(Additive, op.weight.rho), self.queries_and_keys(op, sizes)
        if rho.decay == "head":
            found |= linear("g_proj", rho.heads, sizes.in_channels, True)
        if rho.decay == "channel":
            found |= linear("g_down", RANK, sizes.in_channels, False)
            found |= linear("g_up", rho.heads * cast(Scan, op.path).state, RANK, True)
        return found

    def steps(self, call: Call, at: Along) -> Steps:
        rho = cast(Additive, call.op.weight.rho)
        query, key = at.rows("q_proj"), at.rows("k_proj")
        query = query * query.shape[-1] ** -0.5
        if rho.decay == "fixed":
            head = torch.arange(rho.heads, dtype=torch.float64, device=query.device)
            log = torch.log1p(-torch.exp2(-5 - head)).to(at.wide)
            decay = log[:, None].expand(*query.shape[:3], 1)
        elif rho.decay == "head":
            decay = F.logsigmoid(at.rows("g_proj")) / RANK
        else:
            decay = F.logsigmoid(at.heads_of(at.map("g_up", at.map("g_down")))) / RANK
        if rho.decay != "channel":
            turn = _angles(at.time(), query.shape[-1])
            query, key = _turned(query, turn), _turned(key, turn)
        return Steps(query, cast(Tensor, at.absent(key)), at.value, at.absent(decay))


def _angles(time_BN: Tensor, features: int) -> Tensor:
    """How far each pair of features turns until then (B|1, N, 1, features / 2), in float64: times are long."""
    rate = 10000 ** -torch.linspace(0, 1, features // 2, dtype=torch.float64, device=time_BN.device)
    return (time_BN[..., None] * rate)[:, :, None]


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Each pair of features that lie next to one another, turned."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


@means(Delta)
class DeltaMeaning(FastMeaning):
    """DeltaNet, gated DeltaNet, Kimi delta attention."""

    generating = ("q_proj", "k_proj", "b_proj", "a_proj", "f_down", "f_up", "A_log", "dt")

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        rho, state, found = cast(Delta, op.weight.rho), cast(Scan, op.path).state, self.queries_and_keys(op, sizes)
        found |= linear("b_proj", rho.heads, sizes.in_channels, False)
        if rho.decay == "none":
            return found
        decays = rho.heads * (1 if rho.decay == "head" else state)
        if rho.decay == "head":
            found |= linear("a_proj", decays, sizes.in_channels, False)
        else:
            found |= linear("f_down", state, sizes.in_channels, False) | linear("f_up", decays, state, False)
        return found | {
            "A_log": Parameter((rho.heads,), "decay", decays=False),
            "dt_bias": Parameter((decays,), "step", decays=False),
        }

    def steps(self, call: Call, at: Along) -> Steps:
        rho = cast(Delta, call.op.weight.rho)
        query, key = (unit(F.silu(at.rows(name))) for name in ("q_proj", "k_proj"))
        beta = torch.sigmoid(at.map("b_proj").to(at.wide))
        decay = None
        if rho.decay != "none":
            step = at.map("a_proj") if rho.decay == "head" else at.map("f_up", at.map("f_down"))
            step = F.softplus(at.heads_of(step.to(at.wide) + at.param("dt_bias")))
            decay = -at.param("A_log").exp()[:, None] * step
        query = query * query.shape[-1] ** -0.5
        return Steps(query, cast(Tensor, at.absent(key)), at.value, at.absent(decay), at.absent(beta))


@means(MLSTM)
class MLSTMMeaning(FastMeaning):
    """The matrix memory of xLSTM."""

    generating = ("q_proj", "k_proj", "i_proj", "f_proj")

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        heads, found = op.weight.heads, self.queries_and_keys(op, sizes)
        found |= linear("i_proj", heads, sizes.in_channels, True)
        found |= {"f_proj_weight": Parameter((heads, sizes.in_channels), "uniform", sizes.in_channels)}
        return found | {"f_proj_bias": Parameter((heads,), "constant:3")}  # a new layer forgets a 20th of it a step

    def gates(self, at: Along) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key (B, N, H, s), and the logarithms of input and forget gates (B, N, H)."""
        query, key = at.rows("q_proj"), at.rows("k_proj")
        opened, kept = at.map("i_proj").to(at.wide), F.logsigmoid(at.map("f_proj").to(at.wide))
        opened, kept = cast(Tensor, at.absent(opened, -math.inf)), cast(Tensor, at.absent(kept))
        return query, key * key.shape[-1] ** -0.5, opened, kept

    def steps(self, call: Call, at: Along) -> Steps:
        query, key, opened, kept = self.gates(at)
        # All gates are divided by exp(m), the largest share that any has, or 1. The result is the same for any m, so
        # that it needs no gradient; the value's last channel is the sum
        with torch.no_grad():
            since = kept.double().cumsum(1)
            top = since + (opened.double() - since).cummax(1).values if since.numel() else since
            top = top.clamp(min=0).to(at.wide)
            before = F.pad(top[:, :-1], (0, 0, 1, 0))
        decay = (kept + (before - top))[..., None]
        key = key * torch.exp(opened - top)[..., None]
        return Steps(query, key, F.pad(at.value, (0, 1), value=1.0), decay, own=top)

    def result(self, steps: Steps, y_BNHp: Tensor) -> Tensor:
        assert steps.own is not None
        total = y_BNHp[..., -1:].abs()
        return y_BNHp[..., :-1] / torch.maximum(total, torch.exp(-steps.own)[..., None])

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        at = along(call)
        query, key, opened, kept = (x.transpose(1, 2).double() for x in self.gates(at))
        N = opened.shape[2]
        before_NN = torch.ones(N, N, dtype=torch.bool, device=valid.device).tril()
        since = kept.cumsum(2)
        span = (since[..., :, None] - since[..., None, :]).masked_fill(~before_NN, 0) + opened[..., None, :]
        c = (query @ key.mT * span.exp()).masked_fill(~before_NN, 0)
        alpha = (c / c.sum(-1, keepdim=True).abs().clamp(min=1)).to(at.wide)
        order = visited(cast(Scan, call.op.path), call.grid, valid.device)
        if order is not None:
            time_N = order.argsort()
            alpha = alpha[:, :, time_N][..., time_N]
        return alpha * valid


@means(RWKV7)
class RWKV7Meaning(FastMeaning):
    """The generalised delta rule of RWKV-7."""

    generating = ("r_proj", "k_proj", "w_down", "w_up", "a_down", "a_up", "k_k", "k_a", "r_k")

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        rho, found = cast(RWKV7, op.weight.rho), self.queries_and_keys(op, sizes, "r_proj")
        made = rho.heads * cast(Scan, op.path).state
        for name in ("w", "a"):
            found |= linear(f"{name}_down", rho.rank, sizes.in_channels, False)
            found |= linear(f"{name}_up", made, rho.rank, True)
        for name in ("k_k", "k_a", "r_k"):
            found[name] = Parameter((made,), "constant:0" if name == "r_k" else "constant:1")
        return found

    def steps(self, call: Call, at: Along) -> Steps:
        read, key = at.rows("r_proj"), at.rows("k_proj")
        decay = -SLOWEST * torch.sigmoid(at.heads_of(at.map("w_up", torch.tanh(at.map("w_down")))))
        rate = torch.sigmoid(at.heads_of(at.map("a_up", at.map("a_down"))))
        by_removed, by_rate, by_own = (at.param(name).unflatten(0, (at.heads, -1)) for name in ("k_k", "k_a", "r_k"))
        removed = unit(key * by_removed, 1e-12)
        key = key * (1 + (rate - 1) * by_rate)
        own = (read * key * by_own).sum(-1)
        key, left, decay = (cast(Tensor, at.absent(x)) for x in (key, removed * rate, decay))
        return Steps(read, key, at.value, decay, None, left, -removed, own)
