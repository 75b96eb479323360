"""`scan` and `selective`: every position before the query, through a state.

Shape legend: B batch, C channels, H heads, M outputs, N positions, s numbers of a state.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Scan, Selective
from nearfold.lower.call import Call
from nearfold.lower.meaning import PathMeaning, Sizes, means
from nearfold.lower.parameters import Parameter, require_divides
from nearfold.lower.selection import Selection
from nearfold.lower.weighting import RhoMeaning, wide_dtype
from nearfold.lower.words.all import every


@means(Scan)
class ScanMeaning(PathMeaning):
    """What came before, along one order."""

    everywhere = True

    def select(self, call: Call) -> Selection:
        return every(call)

    def allowed(self, call: Call, query_M: Tensor, key_N: Tensor) -> Tensor | None:
        time_N = scan_order(cast(Scan, call.op.path), call.grid, query_M.device).argsort()
        return time_N[key_N][None, :] <= time_N[query_M][:, None]


# --- orders in which the positions of a grid are visited


def _raster(index: Tensor) -> Tensor:
    return index.reshape(-1)


def _columns(index: Tensor) -> Tensor:
    last = index.dim() - 1
    return index.permute([last - axis for axis in range(index.dim())]).reshape(-1)


def _snake(index: Tensor) -> Tensor:
    """Rows of the last axis, every other one backwards, so that neighbours in time are neighbours on the grid."""
    rows = index.new_zeros(1)
    for n in index.shape:
        # an axis turns round whenever those before it have moved on
        line = torch.arange(n, device=index.device).expand(rows.shape[0], n)
        backwards = torch.arange(rows.shape[0], device=index.device)[:, None] % 2 == 1
        rows = (rows[:, None] * n + torch.where(backwards, n - 1 - line, line)).reshape(-1)
    return rows


_ORDERS = {"raster": _raster, "columns": _columns, "snake": _snake}


def scan_order(path: Scan, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """The raster index of the position visited at every time (N,)."""
    count = 1
    for n in grid:
        count *= n
    order = _ORDERS[path.order](torch.arange(count, device=device).reshape(grid))
    return order.flip(0) if path.reverse else order


def visited(path: Scan, grid: tuple[int, ...], device: torch.device) -> Tensor | None:
    """As `scan_order`; None where that is the raster."""
    plain = path.order == "raster" or len(grid) == 1
    return None if plain and not path.reverse else scan_order(path, grid, device)


# --- the weight


@means(Selective)
class SelectiveMeaning(RhoMeaning):
    """A selective state space; parameters as in Mamba's code, x_proj makes (dt, B, C)."""

    generating = ("x_proj", "dt_proj", "dt", "A_log")

    def parameters(self, op: Basic, sizes: Sizes) -> dict[str, Parameter]:
        rho, state, channels = cast(Selective, op.weight.rho), cast(Scan, op.path).state, sizes.inner
        if rho.scan_heads is not None:
            heads = rho.scan_heads
            require_divides(op, "heads", heads, channels, "channels of the value")
            return {
                "x_proj_weight": Parameter((heads + 2 * state, channels), "uniform", channels),
                "dt_bias": Parameter((heads,), "step", decays=False),
                "A_log": Parameter((heads,), "decay", decays=False),
                "D": Parameter((heads,), "constant:1", decays=False),
            }
        rank = rho.rank or -(-channels // 16)
        return {
            "x_proj_weight": Parameter((rank + 2 * state, channels), "uniform", channels),
            "dt_proj_weight": Parameter((channels, rank), "uniform", rank),
            "dt_proj_bias": Parameter((channels,), "step", decays=False),
            "A_log": Parameter((channels, state), "decay", decays=False),
            "D": Parameter((channels,), "constant:1", decays=False),
        }

    def looks(self, rho: Selective, heads: int, channels: int) -> int:
        return rho.scan_heads or channels

    def constant(self, call: Call, valid: Tensor, index: Tensor) -> Tensor:
        """From the definition: alpha (B, C|H, N, N), positions in raster order."""
        path, rho = cast(Scan, call.op.path), cast(Selective, call.op.weight.rho)
        _, delta_BNh, write_BNs, read_BNs = state_space(call)
        rate = -call.params["A_log"].to(delta_BNh.dtype).exp()
        rate_hs = rate if rho.scan_heads is None else rate[:, None].expand(-1, path.state)
        # differences of long sums: exact enough in float64 only
        sum_BhN = delta_BNh.double().cumsum(1).transpose(1, 2)
        before_NN = torch.ones(valid.shape[-2:], dtype=torch.bool, device=valid.device).tril()
        span_BhNN = (sum_BhN[..., :, None] - sum_BhN[..., None, :]).masked_fill(~before_NN, 0).to(delta_BNh.dtype)
        alpha = torch.zeros_like(span_BhNN)
        for s in range(path.state):
            pair_B1NN = (read_BNs[:, :, None, s] * write_BNs[:, None, :, s])[:, None]
            alpha = alpha + pair_B1NN * torch.exp(rate_hs[None, :, s, None, None] * span_BhNN)
        alpha = (alpha * delta_BNh.transpose(1, 2)[:, :, None]).masked_fill(~before_NN, 0)
        alpha = alpha + torch.diag_embed(call.params["D"].to(alpha.dtype)[:, None].expand(-1, alpha.shape[-1]))
        time_N = scan_order(path, call.grid, valid.device).argsort()
        return alpha[:, :, time_N][..., time_N] * valid


def state_space(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a scan is made of, positions in its order: value (B, N, C), delta (B, N, C|H), B and C (B, N, s)."""
    path, rho, params = cast(Scan, call.op.path), cast(Selective, call.op.weight.rho), call.params
    value_BNC, keep_BN = call.value.flatten(2).transpose(1, 2), call.keep
    order = visited(path, call.grid, value_BNC.device)
    if order is not None:
        value_BNC, keep_BN = value_BNC[:, order], None if keep_BN is None else keep_BN[:, order]
    made = F.linear(value_BNC, params["x_proj_weight"])
    step, write, read = made.split([made.shape[-1] - 2 * path.state, path.state, path.state], -1)
    if rho.scan_heads is None:
        step = F.linear(step, params["dt_proj_weight"])
        bias = params["dt_proj_bias"]
    else:
        bias = params["dt_bias"]
    wide = wide_dtype(call)
    delta = F.softplus(step.to(wide) + bias.to(wide))
    if keep_BN is not None:  # no time passes at a position that is not there
        delta = delta.masked_fill(~keep_BN[..., None], 0)
    return value_BNC, delta, write.to(wide), read.to(wide)
