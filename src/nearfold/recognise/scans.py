"""Selective state spaces of any class, by their members: Mamba, Mamba-2, and what is built like them.

As with attention, what is read is run: a copy with random weights, next to the recurrence as the words say it.

Shape legend: B batch, N positions, C channels, S numbers of the state, H heads, p channels of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold._images import first_line
from nearfold.grammar import Basic, Weight
from nearfold.grammar.words import Causal, Depthwise, Scan, Selective, Window
from nearfold.recognise.checked import BATCH, POSITIONS, random_copy, remembered, require_alike, signature
from nearfold.recognise.foreign import Match, Unsaid, count

MEMBERS = ("in_proj", "conv1d", "out_proj", "A_log", "D")
NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
REFUSAL = (
    "a scan that its layer wraps in a gate, a short convolution and a state kept between calls: there is no rule to "
    "replace one"
)


def is_scan(module: nn.Module) -> bool:
    """Whether a module has the members of a Mamba's mixer."""
    return all(getattr(module, name, None) is not None for name in MEMBERS) and isinstance(module.conv1d, nn.Conv1d)


def scan_of(module: nn.Module) -> Match | None:
    """What a module is as a selective state space; None where it does not look like one.

    Raises:
        Unsaid: why it looks like one and is none that the words can say.
    """
    if not is_scan(module) or "forward" in vars(module):
        return None
    return remembered(_READ, signature(module), lambda: _read(module))


_READ: dict[Any, Match | str] = {}


def _read(module: Any) -> Match:
    one = getattr(module, "x_proj", None) is not None
    operation, notes = _first(module) if one else _second(module)
    width = module.in_proj.in_features
    try:
        twin = random_copy(module)
        x = torch.randn(BATCH, POSITIONS, width, generator=torch.Generator().manual_seed(1), dtype=torch.double)
        with torch.no_grad():
            y, ours = twin(x), (_run_first if one else _run_second)(twin, x)
    except Exception as error:
        raise Unsaid(f"it does not run by itself on ({BATCH}, {POSITIONS}, {width}): {first_line(error)}") from error
    require_alike(y, ours, str(operation))
    makers = [getattr(module, name) for name in ("x_proj", "dt_proj") if getattr(module, name, None) is not None]
    own = [getattr(module, name) for name in ("A_log", "dt_bias") if getattr(module, name, None) is not None]
    path = cast(Scan, operation.path)
    made = 0 if one else width * (2 * _groups(module) * path.state + module.A_log.shape[0])
    generating = count(*makers) + sum(p.numel() for p in own) + made
    short = Basic(Window(module.conv1d.kernel_size[0]), Causal(), Weight(kernel=Depthwise()))
    beside = (("in_proj", None), ("out_proj", None), ("conv1d", Match(short)))
    return Match(operation, generating, axis=-1, note="; ".join(notes), beside=beside)


def _first(m: Any) -> tuple[Basic, list[str]]:
    channels, state = m.A_log.shape
    rank = m.dt_proj.in_features
    usual = rank == -(-channels // 16)
    notes = ["the short convolution before it and the gate behind it stand around it"]
    if any(getattr(m, name, None) is not None for name in NORMS):
        notes.append("its steps, B and C are normalised")
    return Basic(Scan(state), Causal(), Weight(Selective(rank=None if usual else rank))), notes


def _second(m: Any) -> tuple[Basic, list[str]]:
    heads = m.A_log.shape[0]
    state = getattr(m, "ssm_state_size", None)
    if m.A_log.dim() != 1 or not isinstance(state, int) or getattr(m, "dt_bias", None) is None:
        raise Unsaid("its parts are not those of Mamba or Mamba-2")
    notes = ["the short convolution before it, and the gate and the norm behind it, stand around it"]
    notes.append("steps, B and C are made of the layer's input, next to what is scanned")
    if _groups(m) > 1:
        notes.append(f"{_groups(m)} groups of heads have a B and C each")
    return Basic(Scan(state), Causal(), Weight(Selective(heads))), notes


def _groups(m: Any) -> int:
    return int(getattr(m, "n_groups", 1))


def _short(m: Any, x_BNC: Tensor) -> Tensor:
    """The causal depthwise convolution, and its activation."""
    size = m.conv1d.kernel_size[0]
    padded = F.pad(x_BNC.mT, (size - 1, 0))
    return F.silu(F.conv1d(padded, m.conv1d.weight, m.conv1d.bias, groups=m.conv1d.groups)).mT


def recurrence(x_BNHp: Tensor, step_BNHp: Tensor, A_HpS: Tensor, B_BNHS: Tensor, C_BNHS: Tensor) -> Tensor:
    """The state space itself, one position after the other: (B, N, H, p).

    h_i = exp(A delta_i) h_{i-1} + delta_i B_i x_i, and y_i = C_i h_i.
    """
    h, made = torch.zeros(1, dtype=x_BNHp.dtype), []
    for i in range(x_BNHp.shape[1]):
        step = step_BNHp[:, i, ..., None]
        h = torch.exp(A_HpS * step) * h + step * B_BNHS[:, i, :, None] * x_BNHp[:, i, ..., None]
        made.append((h * C_BNHS[:, i, :, None]).sum(-1))
    return torch.stack(made, 1)


def _run_first(m: Any, x: Tensor) -> Tensor:
    z, gate = m.in_proj(x).chunk(2, -1)
    z = _short(m, z)
    state = m.A_log.shape[1]
    parts = m.x_proj(z).split([m.dt_proj.in_features, state, state], -1)
    norms = (getattr(m, name, None) or nn.Identity() for name in NORMS)
    step, B, C = (norm(part) for norm, part in zip(norms, parts, strict=True))
    step = F.softplus(m.dt_proj(step))
    one = [t[:, :, None] for t in (z, step, B, C)]
    y = recurrence(one[0], one[1], -m.A_log.exp()[None], one[2], one[3])[:, :, 0] + m.D * z
    return m.out_proj(y * F.silu(gate))


def _run_second(m: Any, x: Tensor) -> Tensor:
    heads, state, groups = m.A_log.shape[0], m.ssm_state_size, _groups(m)
    inner = m.out_proj.in_features
    gate, z, step = m.in_proj(x).split([inner, inner + 2 * groups * state, heads], -1)
    z, B, C = _short(m, z).split([inner, groups * state, groups * state], -1)
    step = F.softplus(step + m.dt_bias)[..., None]
    z = z.unflatten(-1, (heads, -1))
    B, C = (t.unflatten(-1, (groups, state)).repeat_interleave(heads // groups, 2) for t in (B, C))
    y = recurrence(z, step, -m.A_log.exp()[:, None, None], B, C) + m.D[:, None] * z
    return m.out_proj(m.norm(y.flatten(2), gate))
