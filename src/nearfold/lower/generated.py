"""Alpha that is not made from scores: tables, kernels generated from the input, state spaces, the largest value.

Shape legend: B batch, C channels, H heads, G groups, M outputs, N positions, S slots, s numbers of a state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.grammar.words import Generated, Max, Mean, Modulated, Ones, Rho, Scan, Selective, Table
from nearfold.lower.call import Call, count_positions, pointwise
from nearfold.lower.geometry import crop
from nearfold.lower.orders import scan_order
from nearfold.lower.weighting import mean_of


def wide_dtype(call: Call) -> torch.dtype:
    """The dtype of alpha: float32 at least."""
    return torch.promote_types(call.value.dtype, torch.float32)


def generated(call: Call) -> Tensor:
    """Alpha of `generated` (B, G, M, S), before slots outside the grid are taken out."""
    rho = call.op.weight.rho
    assert isinstance(rho, Generated)
    hidden = crop(call.x, (0,) * call.ndim, call.grid, call.stride)
    home = tuple(hidden.shape[2:])
    if home != call.out_grid:
        raise ValueError(
            f"{call.op}: makes a kernel for each of {home} positions, but has outputs {call.out_grid}; use padding=same"
        )
    if rho.reduction:
        hidden = F.relu(pointwise(hidden, call.params["reduce_weight"], call.params.get("reduce_bias"), True))
    span = pointwise(hidden, call.params["span_weight"], call.params.get("span_bias"), True)
    alpha = span.flatten(2).unflatten(1, (rho.heads, -1)).transpose(2, 3).to(wide_dtype(call))
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda a: a,
        "softmax": lambda a: torch.softmax(a, -1),
        "sigmoid": torch.sigmoid,
    }
    return activations[rho.activation](alpha)


def require_table(call: Call) -> None:
    """ValueError where the grid is not the table's."""
    rho = call.op.weight.rho
    assert isinstance(rho, Table)
    if count_positions(call.grid) != rho.inputs:
        raise ValueError(
            f"{call.op}: the table is for {rho.inputs} positions, got a grid of {call.grid} = "
            f"{count_positions(call.grid)}"
        )


def _table(call: Call, valid: Tensor) -> Tensor:
    require_table(call)
    return call.params["table_weight"].to(wide_dtype(call))[None, None]


def _largest(call: Call, valid: Tensor, index: Tensor) -> Tensor:
    value_BCN = call.value.flatten(2)
    read = value_BCN[:, :, index[0, 0]].masked_fill(~valid, float("-inf"))
    first = read.argmax(-1, keepdim=True)
    return torch.zeros_like(read, dtype=wide_dtype(call)).scatter_(-1, first, 1.0) * valid


def state_space(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a scan is made of, positions in its order: value (B, N, C), delta (B, N, C|H), B and C (B, N, s)."""
    path, rho, params = call.op.path, call.op.weight.rho, call.params
    assert isinstance(path, Scan) and isinstance(rho, Selective)
    value_BNC = call.value.flatten(2).transpose(1, 2)
    if not (path.order == "raster" or call.ndim == 1) or path.reverse:
        value_BNC = value_BNC[:, scan_order(path, call.grid, value_BNC.device)]
    made = F.linear(value_BNC, params["x_proj_weight"])
    step, write, read = made.split([made.shape[-1] - 2 * path.state, path.state, path.state], -1)
    if rho.scan_heads is None:
        step = F.linear(step, params["dt_proj_weight"])
        bias = params["dt_proj_bias"]
    else:
        bias = params["dt_bias"]
    wide = wide_dtype(call)
    return value_BNC, F.softplus(step.to(wide) + bias.to(wide)), write.to(wide), read.to(wide)


def _selective(call: Call, valid: Tensor) -> Tensor:
    """From the definition: alpha (B, C|H, N, N), positions in raster order."""
    path, rho = call.op.path, call.op.weight.rho
    assert isinstance(path, Scan) and isinstance(rho, Selective)
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
    return alpha[:, :, time_N][..., time_N]


def constant_alpha(call: Call, valid: Tensor, index: Tensor) -> Tensor | None:
    """Alpha (B|1, H|1, M, S) of a rho that looks at no score; None for those that do. ``valid`` (B|1, H|1, M, S)."""
    rho, wide = call.op.weight.rho, wide_dtype(call)
    if isinstance(rho, (Ones, Modulated)):  # what is modulated are the coefficients, which come with the positions
        return valid.to(wide)
    if isinstance(rho, Mean):
        return mean_of(valid, wide)
    if isinstance(rho, Max):
        return _largest(call, valid, index)
    found = _RULES.get(type(rho))
    return None if found is None else found(call, valid) * valid


_RULES: dict[type[Rho], Callable[[Call, Tensor], Tensor]] = {
    Table: _table,
    Generated: lambda call, valid: generated(call),
    Selective: _selective,
}
